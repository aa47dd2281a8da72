"""A collector in a process of its own for the tests: loop and collector, commands as JSON lines on stdin.

Started with one JSON argument: state, listen, groups, segment_bytes, max_bytes, and faults of the disk.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
from typing import Any

from cdp import storage
from cdp.collector import flusher, locks
from cdp.collector.replicated import ReplicatedSpec
from cdp.collector.service import Collector, GroupSpec, VolumeSpec
from cdp.errors import CdpError
from cdp.nbd.contract import Limits
from cdp.nbd.loop import Loop


class SlowSyncs:
    """A disk whose syncs of some files are slow or fail: the door to files, with a fault in it."""

    def __init__(self, suffix: str, seconds: float, fail_file: str) -> None:
        self.suffix, self.seconds, self.fail_file = suffix, seconds, fail_file
        self.real = storage.fdatasync

    def __call__(self, fd: int) -> None:
        if self.suffix in os.readlink(f"/proc/self/fd/{fd}"):
            storage.pause(self.seconds)
            if self.fail_file and os.path.exists(self.fail_file):
                raise OSError(errno.EIO, "the disk failed")
        self.real(fd)


class Failing:
    """A disk on which one operation of the door fails for some files, while `fail_file` is there."""

    def __init__(self, operation: str, part: str, fail_file: str) -> None:
        self.part, self.fail_file = part, fail_file
        self.real = getattr(storage, operation)
        setattr(storage, operation, self)

    def __call__(self, file: int | str, *arguments: Any) -> Any:
        path = file if isinstance(file, str) else os.readlink(f"/proc/self/fd/{file}")
        if self.part in path and os.path.exists(self.fail_file):
            raise OSError(errno.EIO, "the disk failed")
        return self.real(file, *arguments)


def no_zeroing(fd: int, offset: int, length: int) -> None:
    """A file system that can neither punch holes nor zero ranges."""
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")


class WatchedWriting:
    """The door to files: notes the name of every file that is given to the disk before its sync."""

    def __init__(self, log_path: str) -> None:
        self.log = open(log_path, "a", buffering=1)
        self.real = storage.start_writing

    def __call__(self, fd: int) -> None:
        self.log.write(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")) + "\n")
        self.real(fd)


def answer(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> None:
    config = json.loads(sys.argv[1])
    logging.basicConfig(stream=sys.stderr, level=config.get("log_level", "WARNING"))
    if faults := config.get("slow_sync"):
        storage.fdatasync = SlowSyncs(faults["suffix"], faults["seconds"], faults.get("fail_file", ""))
    if faults := config.get("failing"):
        Failing(**faults)
    if config.get("no_zeroing"):
        storage.punch_hole = storage.zero_range = no_zeroing
    if log_path := config.get("watch_writing"):
        storage.start_writing = WatchedWriting(log_path)
    flusher.EARLY_ROUND_NS = config.get("early_round_ns", flusher.EARLY_ROUND_NS)
    locks.LOCK_WAIT_SECONDS = config.get("lock_wait_seconds", locks.LOCK_WAIT_SECONDS)
    groups = [
        GroupSpec(
            g["name"], [VolumeSpec(*v) for v in g["volumes"]], consumers=g.get("consumers", ["replayer"]),
            replicated=ReplicatedSpec(**g["replicated"]) if g.get("replicated") else None,
        )
        for g in config["groups"]
    ]
    collector = Collector(
        config["state"], groups, segment_bytes=config["segment_bytes"], max_bytes=config["max_bytes"],
        small_batches=config.get("small_batches", False),
    )  # fmt: skip
    loop = Loop(collector, Limits())
    try:
        collector.start(loop)
        loop.listen(config["listen"])
    except CdpError as e:
        answer({"error": e.to_dict(), "exit_code": e.exit_code})
        sys.exit(e.exit_code)
    buffer = bytearray()

    def read_commands() -> None:
        received = os.read(0, 1 << 16)
        if not received:
            loop.stop()
        buffer.extend(received)
        while (end := buffer.find(b"\n")) >= 0:
            request = json.loads(buffer[:end])
            del buffer[: end + 1]
            if request["command"] == "figures":
                answer({"result": collector.figures()})
            else:
                collector.command(request["command"], request["arguments"], finished)

    def finished(result: dict[str, Any] | None, error: CdpError | None) -> None:
        answer({"result": result} if error is None else {"error": error.to_dict(), "exit_code": error.exit_code})

    signal.signal(signal.SIGTERM, lambda *_: loop.stop())
    loop.add_reader(0, read_commands)
    answer({"result": "ready"})
    try:
        if profile := config.get("profile"):
            import cProfile

            profiler = cProfile.Profile()
            profiler.enable()
            loop.run()
            profiler.disable()
            profiler.dump_stats(profile)
        else:
            loop.run()
    finally:
        collector.stop()


if __name__ == "__main__":
    main()
