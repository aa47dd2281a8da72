"""A past point as a file: raw (sparse) by ourselves, qcow2 by `qemu-img`, which is what people trust that format to.

The file appears under its name only when it is whole: a temporary file beside it, fsync, then a link that fails if
the name was taken meanwhile. The open connection pins the point for as long as the export runs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from urllib.parse import quote

from cdp import storage
from cdp.errors import RefusedError, StorageError, UsageError
from cdp.nbd import wire
from cdp.nbd.client import Client
from cdp.recovery.copying import DEPTH, pieces, with_zeros

RAW, QCOW2 = "raw", "qcow2"
_PERCENT = re.compile(rb"\(([0-9.]+)/100%\)")

OnBytes = Callable[[int, int], None]  # done, total; bytes of the volume's size


def export(
    replayer_address: str, name: str, output: str, on_bytes: OnBytes = lambda done, total: None, form: str | None = None
) -> int:
    """Writes the export `name` (`db@seq:N`) to the file `output`; returns the volume's size in bytes.

    Raises UsageError for a name with an unknown ending, RefusedError (`exists`, `unsupported`), StorageError, OSError.
    """
    form = form or form_of(output)
    if os.path.lexists(output):
        raise _exists(output)
    qemu_img = shutil.which("qemu-img")
    if form == QCOW2 and qemu_img is None:
        raise RefusedError(
            "Writing qcow2 needs `qemu-img`, which is not installed.",
            "Install qemu-utils, or export to a .raw file.",
            code="unsupported",
        )
    temporary = f"{output}.{storage.random_bytes(6).hex()}.partial"
    try:
        if form == QCOW2 and qemu_img is not None:
            size = _write_qcow2(qemu_img, replayer_address, name, temporary, on_bytes)
        else:
            size = _write_raw(replayer_address, name, temporary, on_bytes)
        _publish(temporary, output)
        return size
    finally:
        with contextlib.suppress(FileNotFoundError):
            storage.unlink(temporary)


def form_of(output: str) -> str:
    """The format that a file's name asks for. Raises UsageError."""
    ending = os.path.splitext(output)[1].lower()
    forms = {".raw": RAW, ".img": RAW, ".qcow2": QCOW2}
    if ending not in forms:
        raise UsageError(f"{output!r} does not say its format.", "End the name with .raw or .qcow2.")
    return forms[ending]


def _exists(output: str) -> RefusedError:
    return RefusedError(f"{output} exists.", "Remove it or choose another name.", code="exists")


def _publish(temporary: str, output: str) -> None:
    """Durable first; then the name, unless somebody took it meanwhile."""
    fd = storage.open_file(temporary)
    try:
        storage.fsync(fd)
    finally:
        storage.close(fd)
    try:
        os.link(temporary, output)
    except FileExistsError:
        raise _exists(output) from None
    except OSError as e:
        if e.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        if os.path.lexists(output):  # a file system without hard links
            raise _exists(output) from None
        storage.rename(temporary, output)
    storage.sync_folder(os.path.dirname(output) or ".")


def _write_raw(address: str, name: str, path: str, on_bytes: OnBytes) -> int:
    """A sparse file: what the point says are zeros is never written."""
    fd = storage.open_file(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        with Client.connect(address, name, (wire.BASE_ALLOCATION,)) as source:
            storage.ftruncate(fd, source.size)
            reads = source.pipeline(DEPTH)
            for offset, length, zero in pieces(with_zeros(source, [(0, source.size)], ask_bytes=0)):
                if not zero:
                    reads.read(offset, length, lambda at, content: _write_all(fd, memoryview(content), at))
                on_bytes(offset, source.size)
            reads.finish()
            on_bytes(source.size, source.size)
            return source.size
    finally:
        storage.close(fd)


def _write_all(fd: int, content: memoryview, offset: int) -> None:
    while content:
        done = storage.pwrite(fd, content, offset)
        content, offset = content[done:], offset + done


def nbd_uri(address: str, name: str) -> str:
    """The URI of an export at `unix:/path` or `tcp:host:port`, as QEMU and libnbd read it."""
    kind, _, where = address.partition(":")
    if kind == "unix":
        return f"nbd+unix:///{quote(name, safe='')}?socket={quote(where)}"
    return f"nbd://{where}/{quote(name, safe='')}"


def _write_qcow2(qemu_img: str, address: str, name: str, path: str, on_bytes: OnBytes) -> int:
    with Client.connect(address, name) as source:  # pins the point, and says what is wrong with it in our words
        size = source.size
        command = [qemu_img, "convert", "-p", "-f", "raw", "-O", "qcow2", nbd_uri(address, name), path]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
        try:
            assert process.stdout is not None and process.stderr is not None
            while chunk := process.stdout.read(4096):
                if found := _PERCENT.findall(chunk):
                    on_bytes(int(size * float(found[-1]) / 100), size)
            complaint = process.stderr.read(4096).decode("utf-8", "replace").strip()
            if process.wait() != 0:
                raise StorageError(f"qemu-img could not write {path}: {complaint}", "Is there space for it?")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        return size
