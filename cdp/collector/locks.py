"""Who may open what: one collector for a state folder, one writer for a primary (a running QEMU counts as one).

QEMU marks an open image by byte locks on an open file description: byte 100+p for each permission p that it uses
and 200+p for each that it does not share with others. Holding all of these bytes exclusively keeps any QEMU from
opening the file (unless told to ignore locks), and cannot be had while one has it open.
"""

from __future__ import annotations

from cdp import storage
from cdp.errors import RefusedError

# A predecessor that is being torn down lets go within this time.
LOCK_WAIT_SECONDS = 10.0
_QEMU_TAKEN, _QEMU_UNSHARED = 100, 200
# QEMU knows five permissions (consistent read, write, write unchanged, resize, graph change).
_QEMU_PERMISSIONS = 5
_RETRY_SECONDS = 0.05


def lock_state(folder: str) -> int:
    """The collector's own lock; held until the descriptor is closed. Raises RefusedError (`locked`)."""
    return storage.lock_file(f"{folder}/lock", LOCK_WAIT_SECONDS, f"The collector's state folder {folder}")


def lock_primary(fd: int, path: str, wait_seconds: float | None = None) -> None:
    """Holds an image for as long as `fd` is open. Raises RefusedError (`locked`) when somebody else keeps it."""
    wait_seconds = LOCK_WAIT_SECONDS if wait_seconds is None else wait_seconds
    end = storage.monotonic_ns() + int(wait_seconds * 1e9)
    while not all(storage.lock_ofd(fd, start, _QEMU_PERMISSIONS, True) for start in (_QEMU_TAKEN, _QEMU_UNSHARED)):
        if storage.monotonic_ns() >= end:
            raise RefusedError(
                f"The primary {path} is open in another process.",
                "Stop the virtual machine or the collector that uses it; clients connect over NBD instead.",
                code="locked",
            )
        storage.pause(_RETRY_SECONDS)
