"""Opening a group: who the primaries are, the journal's tail onto them, and a checkpoint to begin from.

The rules of "Starting again": a primary must be the one that was left (identity, size), and nobody may have written
it since: after a clean stop its mtime is the recorded one, after a kill it is at most 2 s past the last batch. In
doubt the volume is `stopped` until `trust` says which side is right. Blocks; runs before clients are served.
"""

from __future__ import annotations

import contextlib
import logging

from cdp import storage
from cdp.collector import tail
from cdp.collector.group import CHECKPOINT_CONSUMER, Group, NewRecord
from cdp.collector.intent import IntentMap
from cdp.collector.judging import MTIME_TOLERANCE_NS, judge, set_doubt, survey
from cdp.collector.primary import FilePrimary, NonePrimary, Primary
from cdp.collector.primary_nbd import NbdPrimary
from cdp.collector.refused import gap_open
from cdp.collector.replicated import Replicated
from cdp.collector.rolling import note_rollback
from cdp.collector.state import Checkpoint, GroupState, load_checkpoint, load_group, save
from cdp.collector.tracking import due_behind
from cdp.collector.volume import INITIAL_SYNC, GroupSpec, Reason, Volume, VolumeSpec
from cdp.errors import ConfigError, JournalFullError, StorageError
from cdp.journal import batch, consumers
from cdp.journal.batch import Identity
from cdp.journal.writer import JournalWriter

log = logging.getLogger(__name__)

# While a start writes the journal's tail the primaries' mtimes move on: heartbeats say that it was this collector.
TAIL_HEARTBEAT_NS = MTIME_TOLERANCE_NS // 2
# Volume numbers are 16 bits, and one of them means "the whole group".
MAX_VOLUME_IDS = batch.NO_VOLUME


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
    with contextlib.ExitStack() as on_error:
        for volume_spec in spec.volumes:
            volumes.append(_open_volume(volume_spec, state, checkpoint, folder, worker, on_error))
        state["epoch"] += 1
        save(f"{folder}/group.json", state)
        identity = Identity(bytes.fromhex(state["group_id"]), state["epoch"], storage.random_bytes(16))
        known_durable_seq = checkpoint["seq"] if checkpoint else 0
        journal = _open_journal(f"{folder}/journal", identity, segment_bytes, max_bytes, known_durable_seq)
        on_error.callback(journal.close)
        for name in (CHECKPOINT_CONSUMER, *spec.consumers):
            consumers.register(f"{folder}/journal", name, journal.first_seq - 1, identity.group_id)
        group = Group(spec.name, folder, state, volumes, journal, worker, max_bytes)
        on_error.callback(group.tracking.close)
        if spec.replicated is not None:
            group.replicated = Replicated(group, spec.replicated, f"{folder}/journal")
            on_error.callback(group.replicated.close)
        _begin(group, checkpoint)
        on_error.pop_all()
    return group


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


def _open_volume(
    spec: VolumeSpec, state: GroupState, checkpoint: Checkpoint | None, folder: str, worker: storage.Worker,
    on_error: contextlib.ExitStack,
) -> Volume:  # fmt: skip
    known = state["volumes"].get(spec.name)
    if known is not None and spec.size_bytes < known["size"]:
        raise ConfigError(
            f"{spec.name} has {known['size']} bytes, but is configured with {spec.size_bytes}.",
            "A volume's size may grow, never shrink: set `size` to what it had.",
        )
    primary = open_primary(spec, known["size"] if known else None)
    on_error.callback(primary.close)
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
    set_doubt(volume, known.get("doubt"))
    if primary.readable:
        volume.intent = IntentMap(f"{folder}/intent-{volume.id}", spec.size_bytes, worker, is_new)
        on_error.callback(volume.intent.close)
    return volume


def _unwatched(spec: VolumeSpec, known_bytes: int, checkpoint: Checkpoint | None) -> Reason | None:
    """Why a volume must be compared although nothing is wrong with its primary."""
    if spec.size_bytes > known_bytes:
        return {"code": "grown", "text": f"{spec.name} was made larger; it is compared."}
    if checkpoint is not None and spec.name not in checkpoint["primaries"]:
        text = f"{spec.name} was not configured at the last start, so nobody watched its primary; it is compared."
        return {"code": "returned", "text": text}
    return None


def _holds_data(primary: Primary, size_bytes: int) -> bool:
    return not primary.inline or any(data for _, data in primary.extents(0, size_bytes))


def _begin(group: Group, checkpoint: Checkpoint | None) -> None:
    """Doubts, the tail, the first records, and all of it durable."""
    after_seq = checkpoint["seq"] if checkpoint else 0
    if checkpoint is not None:
        tail_ = survey(group, checkpoint)
        for volume in group.volumes:
            judge(volume, checkpoint, tail_, group.tracking.noted)
        # The next start could not tell any more what was found: this one writes to the journal and to the primaries.
        group.save_state_now()
        save(f"{group.folder}/checkpoint", group.checkpoint_content(after_seq, clean=False))
    # Where writes went by the journal, its tail is older than what the primaries hold.
    trusted = {} if group.tracking.noted else {v.id: v for v in group.volumes if not v.refuse}
    writer = tail.TailWriter(trusted, group.refused)
    _write_tail(group, writer, after_seq)
    for name in writer.bookmarks:
        group.bookmarks.add(name)
    for volume in group.volumes:
        if volume.id in writer.open_gaps and volume.sync is None:
            volume.sync = writer.open_gaps[volume.id]
    for note in writer.rollbacks:
        note_rollback(group.volumes, note)
    if group.tracking.noted:
        for volume in group.volumes:
            volume.sync = due_behind(volume)
    group.hold_checkpoint = any(v.doubt for v in group.volumes)
    group.first_records = _first_records(group)
    group.checkpoint_seq = after_seq
    group.begin()
    if not group.journal_dead:
        _make_durable(group)
    if not group.first_records:
        group.tracking.resume()
        group.tracking.checkpointed(group.checkpoint_seq)


def _write_tail(group: Group, writer: tail.TailWriter, after_seq: int) -> None:
    said_ns = 0
    for found in group.journal.batches_after(after_seq):
        if storage.monotonic_ns() - said_ns >= TAIL_HEARTBEAT_NS:
            said_ns = storage.monotonic_ns()
            group.try_append([(batch.HEARTBEAT, 0, batch.NO_VOLUME, 0, 0, b"")])
        writer.apply(found)


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
        failed = failed or group.tracking.noted  # the next start must not write the tail
        failed = failed or group.answered_seq != journal.durable_seq
        if not failed:
            seq = group.checkpoint_seq if group.hold_checkpoint else journal.durable_seq
            save(f"{group.folder}/checkpoint", group.checkpoint_content(seq, clean=True))
            consumers.acknowledge(f"{group.folder}/journal", CHECKPOINT_CONSUMER, seq)
    except (OSError, StorageError) as e:
        log.error("group %s: not stopped cleanly: %s", group.name, e)
    for volume in group.volumes:
        volume.primary.close()
        if volume.intent is not None:
            volume.intent.close()
    journal.close()
    group.tracking.close()
    if group.replicated is not None:
        group.replicated.close()

