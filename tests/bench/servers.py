"""The servers we are measured against, started and proven to serve what they should.

`qemu-nbd` and `nbdkit file` serve a raw file, unprotected; QEMU's mirror (`qemu-storage-daemon`, write-blocking)
protects, without history. All are up for the whole run; only one is loaded at a time.
"""

from __future__ import annotations

import json
import random
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.running import die_with_parent, wait_for

BASE = "qemu-nbd"
MIRROR = "qemu mirror"
# A full initial copy of a few GiB by the mirror.
MIRROR_SECONDS = 300


def nothing() -> None:
    """A server that needs no preparation."""


@dataclass
class Target:
    """One server under measurement: where it is, what it is made of, what to do around a cell."""

    name: str
    uri: str
    pids: list[int]
    files: list[Path]  # what it serves from: paged in (or out) before a cell
    before: Callable[[], None] = nothing  # drained and quiet, ready to be loaded
    after: Callable[[], None] = nothing
    jobs: frozenset[str] | None = None  # None: all
    notes: list[str] = field(default_factory=list)


def listening(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as s:
        try:
            s.connect(str(path))
        except OSError:
            return False
        return True


def uri(path: Path, export: str = "") -> str:
    return f"nbd+unix:///{export}?socket={path}"


class Starter:
    """Starts peers in one work folder; their logs stand beside their files."""

    def __init__(self, folder: Path, started: list[subprocess.Popen[bytes]]) -> None:
        self.folder, self.started = folder, started

    def spawn(self, name: str, command: list[str]) -> int:
        with open(self.folder / f"{name}.log", "ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=die_with_parent
            )
        self.started.append(process)
        return process.pid

    def qemu_nbd(self, path: Path, sock: Path, log: str = BASE) -> int:
        image = f"driver=raw,file.driver=file,file.locking=off,file.filename={path}"
        command = ["qemu-nbd", "--image-opts", "--cache=writeback", "--persistent", "-e", "8", "-k", str(sock), image]
        pid = self.spawn(log, command)
        wait_for(lambda: listening(sock), f"qemu-nbd listens on {sock}")
        return pid

    def base(self, data: Path) -> Target:
        sock = self.folder / "qemu-nbd.sock"
        return checked(Target(BASE, uri(sock), [self.qemu_nbd(data, sock)], [data]))

    def nbdkit(self, data: Path) -> Target:
        sock = self.folder / "nbdkit.sock"
        pid = self.spawn("nbdkit", ["nbdkit", "-f", "-U", str(sock), "file", f"file={data}"])
        wait_for(lambda: listening(sock), "nbdkit listens")
        return checked(Target("nbdkit file", uri(sock), [pid], [data]))

    def mirror(self, source: Path, copy: Path) -> Target:
        copy_sock, sock, qmp_sock = (self.folder / f"mirror-{n}.sock" for n in ("target", "export", "qmp"))
        copy_pid = self.qemu_nbd(copy, copy_sock, "mirror-target")
        pid = self.spawn("mirror", [
            "qemu-storage-daemon",
            "--blockdev", f"driver=file,node-name=srcfile,filename={source}",
            "--blockdev", "driver=raw,node-name=src,file=srcfile",
            "--blockdev", f"driver=nbd,node-name=tgt,server.type=unix,server.path={copy_sock}",
            "--nbd-server", f"addr.type=unix,addr.path={sock}",
            "--chardev", f"socket,id=qmp,path={qmp_sock},server=on,wait=off",
            "--monitor", "chardev=qmp",
        ])  # fmt: skip
        wait_for(qmp_sock.exists, "the storage daemon's monitor")
        qmp = Qmp(qmp_sock)
        # The export first: so the job's filter is inserted below it.
        qmp("block-export-add", type="nbd", id="e0", node_name="src", name="", writable=True)
        qmp("blockdev-mirror", job_id="m0", device="src", target="tgt", sync="full", copy_mode="write-blocking",
            filter_node_name="mirror-top")  # fmt: skip
        wait_for(lambda: qmp("query-jobs")[0]["status"] == "ready", "the mirror is ready", MIRROR_SECONDS)
        node = qmp("query-block-exports")[0]["node-name"]
        if node != "mirror-top":
            raise RuntimeError(f"the mirror's export sits on {node}, not on the filter: writes would not be copied")
        return checked(Target(MIRROR, uri(sock), [pid, copy_pid], [source, copy]))


class Qmp:
    """QEMU's monitor protocol: one command at a time."""

    def __init__(self, path: Path) -> None:
        def connected() -> socket.socket | None:
            s = socket.socket(socket.AF_UNIX)
            try:
                s.connect(str(path))
            except OSError:
                s.close()
                return None
            return s

        self._file = wait_for(connected, f"{path} answers").makefile("rw")
        self._file.readline()
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: Any) -> Any:
        message = {"execute": command, "arguments": {k.replace("_", "-"): v for k, v in arguments.items()}}
        self._file.write(json.dumps(message) + "\n")
        self._file.flush()
        while True:
            answer = json.loads(self._file.readline())
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']}")


def checked(target: Target) -> Target:
    """A write through the export must be found in every file behind it. Raises RuntimeError."""
    pattern = random.randrange(1, 255)
    subprocess.run(
        ["qemu-io", "-f", "raw", "-c", f"write -P {pattern} 3M 64k", "-c", "flush", target.uri],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    for path in target.files:
        with open(path, "rb") as f:
            f.seek(3 << 20)
            if f.read(65536) != bytes([pattern]) * 65536:
                raise RuntimeError(f"{target.name}: what was written is not in {path}")
    return target
