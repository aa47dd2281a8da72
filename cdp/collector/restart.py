"""Opening a group: who the primaries are, the journal's tail onto them, and a checkpoint to begin from.

The rules of "Starting again": a primary must be the one that was left (identity, size), and nobody may have written
it since: after a clean stop its mtime is the recorded one, after a kill it is at most 2 s past the last batch. In
doubt the volume is `stopped` until `trust` says which side is right. Blocks; runs before clients are served.
"""

from __future__ import annotations

import errno
import logging
from dataclasses import dataclass, field

from cdp import storage
from cdp.collector import tail
from cdp.collector.group import CHECKPOINT_CONSUMER, Group, NewRecord
from cdp.collector.intent import IntentMap
from cdp.collector.primary import FilePrimary, NonePrimary, Primary
from cdp.collector.primary_nbd import NbdPrimary
from cdp.collector.replicated import Replicated
from cdp.collector.resync import INITIAL_SYNC, UNCLEAN_RESTART, gap_open
from cdp.collector.rolling import note_rollback
from cdp.collector.state import Checkpoint, GroupState, boot_id, load_checkpoint, load_group, save
from cdp.collector.volume import GroupSpec, Reason, Volume, VolumeSpec
from cdp.errors import ConfigError, JournalFullError, StorageError
from cdp.journal import batch, consumers
from cdp.journal.batch import Identity
from cdp.journal.writer import JournalWriter

log = logging.getLogger(__name__)

# A write reaches the primary at most this long after its batch: file systems stamp coarsely, disks stall.
MTIME_TOLERANCE_NS = 2_000_000_000
# While a start writes the journal's tail the primaries' mtimes move on: heartbeats say that it was this collector.
TAIL_HEARTBEAT_NS = MTIME_TOLERANCE_NS // 2
# After a kill a device may have taken what the journal says once in the life before, once by the start, which may
# itself have been killed, and once when it was healed; more than that, and this little, was written by somebody else.
REWRITTEN, UNTOLD_BYTES, SECTOR_BYTES = 4, 1 << 20, 512
# Volume numbers are 16 bits, and one of them means "the whole group".
MAX_VOLUME_IDS = batch.NO_VOLUME


@dataclass
class _Tail:
    """The journal since the checkpoint: wall time of its last batch, pages that each volume's writes lie in."""

    written_ns: int
    pages: dict[int, int] = field(default_factory=dict)


def open_group(
    spec: GroupSpec, folder: str, worker: storage.Worker, *, segment_bytes: int, max_bytes: int
) -> Group:
    """The group, ready to serve; volumes whose `sync` is set have their GAP open in the journal already.

    Raises ConfigError, RefusedError, StorageError and its kinds.
    """
    storage.makedirs(f"{folder}/journal", exist_ok=True)
    state = load_group(f"{folder}/group.json")
    checkpoint = load_checkpoint(f"{folder}/checkpoint")
    volumes: list[Volume] = []
    journal: JournalWriter | None = None
    try:
        for volume_spec in spec.volumes:
            volumes.append(_open_volume(volume_spec, state, checkpoint, folder, worker))
        state["epoch"] += 1
        save(f"{folder}/group.json", state)
        identity = Identity(bytes.fromhex(state["group_id"]), state["epoch"], storage.random_bytes(16))
        known_durable_seq = checkpoint["seq"] if checkpoint else 0
        journal = _open_journal(f"{folder}/journal", identity, segment_bytes, max_bytes, known_durable_seq)
        for name in (CHECKPOINT_CONSUMER, *spec.consumers):
            consumers.register(f"{folder}/journal", name, journal.first_seq - 1, identity.group_id)
        group = Group(spec.name, folder, state, volumes, journal, worker, max_bytes)
        _begin(group, checkpoint)
        if spec.replicated is not None:
            group.replicated = Replicated(group, spec.replicated, f"{folder}/journal")
        return group
    except BaseException:
        for volume in volumes:
            _close_volume(volume)
        if journal is not None:
            journal.close()
        raise


def _open_journal(
    folder: str, identity: Identity, segment_bytes: int, max_bytes: int, known_durable_seq: int
) -> JournalWriter:
    """A journal that is full begins its segment all the same: else nobody could read the volumes, and nothing would
    look whether its consumers have gone on. It is larger than it may be by a segment or two for that life."""

    def make(limit_bytes: int) -> JournalWriter:
        return JournalWriter(
            folder, identity, segment_bytes=segment_bytes, max_bytes=limit_bytes, known_durable_seq=known_durable_seq
        )

    try:
        return make(max_bytes)
    except JournalFullError:
        used_bytes = sum(storage.stat(f"{folder}/{name}").st_size for name in storage.listdir(folder))
        return make(max(used_bytes, max_bytes) + segment_bytes)


def open_primary(spec: VolumeSpec, known_bytes: int | None) -> Primary:
    """Raises ConfigError, RefusedError, StorageError."""
    if spec.primary == "none":
        return NonePrimary()
    kind, _, path = spec.primary.partition(":")
    if kind == "file" and path:
        return FilePrimary(path, spec.size_bytes, known_bytes)
    if kind in ("nbd", "nbd+unix"):
        return NbdPrimary(spec.primary, spec.size_bytes)
    raise ConfigError(f"{spec.primary!r} is no primary.", "Write file:PATH, nbd://…, nbd+unix://… or none.")


def _close_volume(volume: Volume) -> None:
    volume.primary.close()
    if volume.intent is not None:
        volume.intent.close()


def _open_volume(
    spec: VolumeSpec, state: GroupState, checkpoint: Checkpoint | None, folder: str, worker: storage.Worker
) -> Volume:
    known = state["volumes"].get(spec.name)
    if known is not None and spec.size_bytes < known["size"]:
        raise ConfigError(
            f"{spec.name} has {known['size']} bytes, but is configured with {spec.size_bytes}.",
            "A volume's size may grow, never shrink: set `size` to what it had.",
        )
    primary = open_primary(spec, known["size"] if known else None)
    if known is not None and primary.readable:
        reason = _unwatched(spec, known["size"], checkpoint)
        known["sync"] = reason or known.get("sync")  # an initial sync would pass over holes
    is_new = known is None
    if known is None:
        if state["next_id"] >= MAX_VOLUME_IDS:
            raise ConfigError(f"Too many volumes were ever in the group of {spec.name}.", "Make a new group.")
        known = state["volumes"][spec.name] = {"id": state["next_id"], "size": spec.size_bytes}
        state["next_id"] += 1
        if primary.readable and _holds_data(primary, spec.size_bytes):
            text = f"{spec.name} held data when it was added; points are offered once all of it is in the journal."
            known["sync"] = {"code": INITIAL_SYNC, "text": text}
    known["size"] = spec.size_bytes
    volume = Volume(spec.name, known["id"], spec.size_bytes, primary)
    volume.sync, volume.lock, volume.rollback = known.get("sync"), known.get("lock"), known.get("rollback")
    _set_doubt(volume, known.get("doubt"))
    if primary.readable:
        volume.intent = IntentMap(f"{folder}/intent-{volume.id}", spec.size_bytes, worker, is_new)
    return volume


def _unwatched(spec: VolumeSpec, known_bytes: int, checkpoint: Checkpoint | None) -> Reason | None:
    """Why a volume must be compared although nothing is wrong with its primary."""
    if spec.size_bytes > known_bytes:
        return {"code": "grown", "text": f"{spec.name} was made larger; it is compared."}
    if checkpoint is not None and spec.name not in checkpoint["primaries"]:
        text = f"{spec.name} was not configured at the last start, so nobody watched its primary; it is compared."
        return {"code": "returned", "text": text}
    return None


def _set_doubt(volume: Volume, doubt: Reason | None) -> None:
    volume.doubt = volume.reason = doubt
    volume.refuse = 0 if doubt is None else errno.EIO


def _holds_data(primary: Primary, size_bytes: int) -> bool:
    return not primary.inline or any(data for _, data in primary.extents(0, size_bytes))


def _begin(group: Group, checkpoint: Checkpoint | None) -> None:
    """Doubts, the tail, the first records, and all of it durable."""
    after_seq = checkpoint["seq"] if checkpoint else 0
    if checkpoint is not None:
        tail_ = _survey(group, checkpoint)
        for volume in group.volumes:
            _judge(volume, checkpoint, tail_)
        # The next start could not tell any more what was found: this one writes to the journal and to the primaries.
        group.save_state_now()
        save(f"{group.folder}/checkpoint", group.checkpoint_content(after_seq, clean=False))
    trusted = {v.id: v for v in group.volumes if not v.refuse}
    writer = tail.TailWriter(trusted, group.refused)
    _write_tail(group, writer, after_seq)
    for name in writer.bookmarks:
        group.bookmarks.add(name)
    for volume in group.volumes:
        if volume.id in writer.open_gaps and volume.sync is None:
            volume.sync = writer.open_gaps[volume.id]
    for note in writer.rollbacks:
        note_rollback(group.volumes, note)
    group.hold_checkpoint = any(v.doubt for v in group.volumes)
    group.first_records = _first_records(group)
    group.checkpoint_seq = after_seq
    group.begin()
    if not group.journal_dead:
        _make_durable(group)


def _write_tail(group: Group, writer: tail.TailWriter, after_seq: int) -> None:
    said_ns = 0
    for found in group.journal.batches_after(after_seq):
        if storage.monotonic_ns() - said_ns >= TAIL_HEARTBEAT_NS:
            said_ns = storage.monotonic_ns()
            group.try_append([(batch.HEARTBEAT, 0, batch.NO_VOLUME, 0, 0, b"")])
        writer.apply(found)


def _survey(group: Group, checkpoint: Checkpoint) -> _Tail:
    """What the journal says of the time since the checkpoint. Lengths are only asked for after a kill, of devices."""
    found = _Tail(checkpoint["wall_ns"])
    devices = not checkpoint["clean"] and any("written_sectors" in v.primary.identity() for v in group.volumes)
    for one in group.journal.batches_after(checkpoint["seq"], header_only=not devices):
        found.written_ns = one.wall_ns
        for record in one.records() if devices else ():
            if record.kind in (batch.WRITE, batch.ZERO, batch.SYNC):
                pages = -(-(record.offset + record.length) // storage.PAGE_BYTES) - record.offset // storage.PAGE_BYTES
                found.pages[record.volume] = found.pages.get(record.volume, 0) + pages
    return found


def _judge(volume: Volume, checkpoint: Checkpoint, tail_: _Tail) -> None:
    """Stops the volume when its primary may not be what was left; asks for a comparison after a power cut."""
    left = checkpoint["primaries"].get(volume.name)
    if left is None:
        return  # it is new
    doubt = None if volume.doubt else _doubt(volume, left, checkpoint, tail_)
    if doubt is not None:
        log.error("volume %s stopped (%s): %s", volume.name, doubt["code"], doubt["text"])
        _set_doubt(volume, doubt)
    elif not checkpoint["clean"] and checkpoint["boot_id"] != boot_id() and volume.primary.readable:
        volume.sync = volume.sync or _unclean(volume)


def _unclean(volume: Volume) -> Reason | None:
    """Why a primary is compared after the machine went down; None where nothing was written for long."""
    assert volume.intent is not None  # it can be read
    touched = sum(length for _, length in volume.intent.touched())
    if not touched and volume.intent.known:
        return None
    text = f"The machine went down while it was written; {touched} of its {volume.size} bytes are compared."
    return {"code": UNCLEAN_RESTART, "text": text}


def _doubt(volume: Volume, left: dict[str, object], checkpoint: Checkpoint, tail_: _Tail) -> Reason | None:
    there = volume.primary.identity()
    same_boot = checkpoint["boot_id"] == boot_id()
    advice = f"Say which side is right: `cdp trust {volume.name} primary` or `cdp trust {volume.name} journal`."
    grown = left.get("size") != there.get("size") and volume.size == there.get("size")
    # Device numbers may change with a start of the machine; the size when the volume was made larger.
    skipped = {"mtime_ns", "written_sectors"} | (set() if same_boot else {"dev"}) | ({"size"} if grown else set())
    if {k: v for k, v in left.items() if k not in skipped} != {k: v for k, v in there.items() if k not in skipped}:
        return {"code": "other_primary", "text": f"The primary of {volume.name} is not the one it was. {advice}"}
    if grown:
        return None  # it is compared
    pages = tail_.pages.get(volume.id, 0)
    if _changed(left, there, checkpoint["clean"], same_boot, tail_.written_ns, pages):
        text = f"The primary of {volume.name} was written while the collector was away. {advice}"
        return {"code": "primary_changed", "text": text}
    return None


def _changed(
    left: dict[str, object], there: dict[str, int | str], clean: bool, same_boot: bool, written_ns: int, pages: int
) -> bool:
    """Whether somebody else wrote the primary, as far as that can be seen."""
    mtime_ns = there.get("mtime_ns")
    if isinstance(mtime_ns, int):
        return mtime_ns != left.get("mtime_ns") if clean else mtime_ns > written_ns + MTIME_TOLERANCE_NS
    before, now = left.get("written_sectors"), there.get("written_sectors")
    if not same_boot or not isinstance(before, int) or not isinstance(now, int) or min(before, now) < 0:
        return False
    if clean:
        return now != before
    return (now - before) * SECTOR_BYTES > pages * storage.PAGE_BYTES * REWRITTEN + UNTOLD_BYTES


def _first_records(group: Group) -> list[NewRecord]:
    """RESIZE for every volume, and a GAP for those that are to be compared or are in doubt."""
    records: list[NewRecord] = [(batch.RESIZE, 0, v.id, 0, v.size, v.name.encode()) for v in group.volumes]
    for volume in group.volumes:
        reason = volume.doubt or volume.sync
        if reason is not None:
            records.append(gap_open(volume, reason))
            volume.in_gap = True
    return records


def _make_durable(group: Group) -> None:
    """Everything that was written is synced, readers may see it, and the next start begins here."""
    journal = group.journal
    token = journal.begin_sync()
    if token is not None:
        journal.sync(token)
        journal.end_sync(token)
    for volume in group.volumes:
        try:
            volume.primary.sync()
        except OSError as e:
            raise StorageError(f"The primary {volume.primary.address} cannot be synced: {e}.") from e
        volume.dirty = False
    group.publish()
    group.save_state_now()
    if group.hold_checkpoint:
        return  # the journal behind the old one is kept
    if group.refusals.first_seq is not None:
        return  # a checkpoint is the end of a batch; the rounds take one once this is settled
    seq = journal.durable_seq
    save(f"{group.folder}/bookmarks", group.bookmarks.content())
    save(f"{group.folder}/checkpoint", group.checkpoint_content(seq, clean=False))
    consumers.acknowledge(f"{group.folder}/journal", CHECKPOINT_CONSUMER, seq)
    group.checkpoint_seq = seq
    journal.release()


def close_group(group: Group) -> None:
    """A clean stop: everything synced, readers see all of it, and the primaries' mtimes are recorded.

    Blocks. What fails is logged: the next start then treats it as a kill.
    """
    journal = group.journal
    try:
        group.refusals.end_storms(at_once=True)
        token = group.begin_sync()
        if token is not None:
            journal.sync(token)
            journal.end_sync(token)
        for volume in group.volumes:
            volume.primary.sync()
            if volume.primary.fd >= 0:
                storage.fsync(volume.primary.fd)  # the mtime too: the next start compares it
        group.publish()
        group.save_state_now()
        save(f"{group.folder}/bookmarks", group.bookmarks.content())
        failed = group.journal_dead or any(v.sync_failed for v in group.volumes)
        failed = failed or group.answered_seq != journal.durable_seq
        if not failed:
            seq = group.checkpoint_seq if group.hold_checkpoint else journal.durable_seq
            save(f"{group.folder}/checkpoint", group.checkpoint_content(seq, clean=True))
            consumers.acknowledge(f"{group.folder}/journal", CHECKPOINT_CONSUMER, seq)
    except (OSError, StorageError) as e:
        log.error("group %s: not stopped cleanly: %s", group.name, e)
    for volume in group.volumes:
        _close_volume(volume)
    journal.close()
    if group.replicated is not None:
        group.replicated.close()

