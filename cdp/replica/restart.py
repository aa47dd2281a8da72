"""Starting again: the replica is put back to its committed seq by the undo of what came after (promise 5)."""

from __future__ import annotations

import re
import shutil

from cdp import storage
from cdp.errors import CorruptionError
from cdp.history.history import History
from cdp.replica import position as position_file
from cdp.replica.course import Course
from cdp.replica.position import Position
from cdp.replica.replica import BLOCK_BYTES, Replica, sync_files

REPLICA_FOLDER, HISTORY_FOLDER = "replica", "history"
LOCK_FILE = "lock"
_LATER_HISTORY = re.compile(HISTORY_FOLDER + r"-(\d+)")


def open_position(folder: str) -> Position:
    """The committed position; a group that never had one gets that of seq 0, durably, before anything else is made.

    Raises CorruptionError when it is missing although there is a replica or a history.
    """
    found = position_file.load(folder)
    if found is not None:
        return found
    for part in (REPLICA_FOLDER, HISTORY_FOLDER):
        if storage.exists(f"{folder}/{part}") and storage.listdir(f"{folder}/{part}"):
            raise CorruptionError(
                f"{folder}/{position_file.FILE_NAME} is missing, but there is a {part}.",
                "Put it back with the rest of its folder, or remove the folder and resync the group's volumes.",
            )
    storage.makedirs(folder, exist_ok=True)
    position_file.store(folder, Position())
    return Position()


def open_replica(folder: str, position: Position) -> Replica:
    """The files that the position names; what a declaration that was never committed left behind is kept out."""
    replica = Replica(f"{folder}/{REPLICA_FOLDER}")
    replica.kept = dict(position.kept)
    for volume, name, file, size in position.volumes:
        path = f"{folder}/{REPLICA_FOLDER}/{file}"
        if not storage.exists(path):
            replica.close()
            raise CorruptionError(f"The replica {path} is missing.", "Put it back, or resync the group's volumes.")
        # Lengthened here, cut only after the way back: undo may lie beyond the size at the committed seq.
        replica.open(volume, name, file, max(size, storage.stat(path).st_size))
    return replica


def put_back(history: History, replica: Replica, position: Position) -> int:
    """The replica as it was at the committed seq, durably; then the history ends there too. Blocks written.

    Extents of a volume that was declared after the committed seq need no way back: its file begins empty again.
    Raises CorruptionError, OSError; may be repeated.
    """
    blocks = 0
    # What lies beyond the size at the committed seq is cut off below, and a power cut may have taken it already.
    ends = {volume: -(-size // BLOCK_BYTES) for volume, _, _, size in position.volumes}
    for extent in history.recover(position.seq):
        file = replica.files.get(extent.volume)
        if file is not None and extent.block < ends[extent.volume]:
            before = None if extent.before is None else memoryview(extent.before)
            file.write_range(extent.block, extent.count, before)
            blocks += extent.count
    for volume, _, _, size in position.volumes:
        replica.files[volume].resize(size)
    sync_files(replica.take_dirty())
    history.cut(position.seq)
    return blocks


def open_group(folder: str, position: Position, segment_bytes: int, compress: bool) -> tuple[Replica, History, int]:
    """Replica and history of a group at the committed seq, and the blocks put back. CorruptionError, OSError."""
    replica = open_replica(folder, position)
    try:
        history = History(f"{folder}/{position.history}", segment_bytes=segment_bytes, compress=compress)
        try:
            blocks = put_back(history, replica, position)
        except BaseException:
            history.close()
            raise
    except BaseException:
        replica.close()
        raise
    return replica, history, blocks


def position_after_reset(old: Position, after_seq: int) -> Position:
    """Where a new history begins; the replica files wait for volumes of their names."""
    kept = {**old.kept, **{name: file for _, name, file, _ in old.volumes}}
    number = int(old.history.partition("-")[2] or 1) + 1
    course = Course().plain() | {"awaited": sorted(kept)}
    return Position(seq=after_seq, course=course, history=f"{HISTORY_FOLDER}-{number}", kept=kept)


def position_before_reset(folder: str, volumes: list[str]) -> Position:
    """The committed position; where that is damaged, what its folder still says, files by their usual names."""
    try:
        return open_position(folder)
    except CorruptionError:
        kept = {name: f"{name}.raw" for name in volumes if storage.exists(f"{folder}/{REPLICA_FOLDER}/{name}.raw")}
        numbers = [int(found[1]) for name in storage.listdir(folder) if (found := _LATER_HISTORY.fullmatch(name))]
        return Position(history=f"{HISTORY_FOLDER}-{max(numbers)}" if numbers else HISTORY_FOLDER, kept=kept)


def old_histories(folder: str, current: str) -> list[str]:
    """The folders that resets left behind."""
    names = (name for name in storage.listdir(folder) if name.partition("-")[0] == HISTORY_FOLDER)
    return [f"{folder}/{name}" for name in names if name != current]


def check_group(folder: str, segment_bytes: int) -> dict[str, object]:
    """Puts one group's replica to its committed seq with nothing running. The caller holds the lock."""
    position = open_position(folder)
    replica, history, blocks = open_group(folder, position, segment_bytes, compress=True)
    for left in old_histories(folder, position.history):
        shutil.rmtree(left)
    files = {f.name: f.path for f in replica.files.values()}
    history.close()
    replica.close()
    return {
        "committed_seq": position.seq, "time_ns": position.time_ns, "blocks_put_back": blocks, "replicas": files,
    }  # fmt: skip


def check(replayer_folder: str, segment_bytes: int) -> dict[str, dict[str, object]]:
    """For `cdp check`: every group under STATE/replayer, by name, with the replayer's lock held.

    Raises RefusedError (`locked`) when the replayer runs, CorruptionError, OSError.
    """
    storage.makedirs(replayer_folder, exist_ok=True)
    lock = storage.lock_file(f"{replayer_folder}/{LOCK_FILE}", 0, "The replayer's state")
    try:
        groups = f"{replayer_folder}/groups"
        names = sorted(storage.listdir(groups)) if storage.exists(groups) else []
        return {name: check_group(f"{groups}/{name}", segment_bytes) for name in names}
    finally:
        storage.close(lock)
