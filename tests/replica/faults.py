"""A kill at any step: from the n-th file operation of a replayer's threads on, each fails as if the process were gone.

The operation that the kill hits may have been done, not done, or (a write) half done. What the threads leave behind
is what a killed process leaves: files as they are, nothing committed.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cdp import storage

OPERATIONS = (
    "pwrite", "pwritev", "punch_hole", "ftruncate", "fdatasync", "write_file", "rename", "unlink", "sync_folder",
)  # fmt: skip
THREADS = ("replayer-", "undo-sync", "replica-sync")


class Killed(RuntimeError):
    """Not an OSError: nothing may treat it as one and go on."""


def _ours() -> bool:
    return threading.current_thread().name.startswith(THREADS)


@contextmanager
def killed_at(step: int, half_done: bool) -> Iterator[None]:
    """Kills at the `step`-th operation (from 1); lasts to the end of the `with`."""
    lock, count = threading.Lock(), 0
    originals = {name: getattr(storage, name) for name in OPERATIONS}

    def stand_in(name: str) -> Any:
        original = originals[name]

        def operation(*arguments: Any) -> Any:
            nonlocal count
            if not _ours():
                return original(*arguments)
            with lock:
                count += 1
                at = count
            if at < step:
                return original(*arguments)
            if at == step and half_done:
                _half(name, original, arguments)
            raise Killed(f"{name} was operation {at}")

        return operation

    for name in OPERATIONS:
        setattr(storage, name, stand_in(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(storage, name, original)


def _half(name: str, original: Any, arguments: tuple[Any, ...]) -> None:
    if name == "pwrite":
        fd, data, offset = arguments
        original(fd, memoryview(data)[: len(data) // 2], offset)
    elif name == "pwritev":
        fd, pieces, offset = arguments
        original(fd, pieces[: len(pieces) // 2 or 1], offset)
    else:
        original(*arguments)


@contextmanager
def no_space(name: str, path_part: str) -> Iterator[threading.Event]:
    """`name` fails with ENOSPC on descriptors of files whose path contains `path_part`; the event says that it did."""
    original, met = getattr(storage, name), threading.Event()

    def operation(fd: int, *arguments: Any) -> Any:
        if _ours() and path_part in os.readlink(f"/proc/self/fd/{fd}"):
            met.set()
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(fd, *arguments)

    setattr(storage, name, operation)
    try:
        yield met
    finally:
        setattr(storage, name, original)

