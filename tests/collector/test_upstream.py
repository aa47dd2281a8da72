"""A primary behind a real NBD server: order, outage, refused writes."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdp import storage
from cdp.collector import primary_nbd
from cdp.journal import batch
from cdp.journal.reader import EmbeddedReader
from cdp.nbd import wire
from cdp.nbd.connection import Connection
from tests.collector.helpers import MIB, Journal, Runner, fio, qemu_io
from tests.nbd.memory_export import FileExport, OneExport
from tests.nbd.serving import serving


class QemuNbd:
    """The upstream: a qemu-nbd that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.path, self.socket = folder / "upstream.raw", folder / "upstream.sock"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            ["qemu-nbd", "-f", "raw", "-e", "4", "--persistent", "--discard=unmap", "-k", self.socket, self.path]
        )
        while subprocess.run(["nbdinfo", "--size", self.uri], capture_output=True).returncode:
            assert self.process.poll() is None

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.socket}"


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[QemuNbd]:
    server = QemuNbd(tmp_path)
    server.path.write_bytes(bytes(16 * MIB))
    server.start()
    yield server
    server.kill()


def start(tmp_path: Path, upstream: QemuNbd) -> Runner:
    runner = Runner(tmp_path, [("db", upstream.uri, 16 * MIB)]).start()
    runner.wait_for("initial sync", lambda f: f["state"] == "protected")
    return runner


def test_everything_arrives_in_order(tmp_path: Path, upstream: QemuNbd) -> None:
    with start(tmp_path, upstream) as runner:
        pass
    runner = Runner(tmp_path, [("db", upstream.uri, 16 * MIB)])
    with runner:
        fio(runner, "--rw=randwrite", "--bs=4k", "--iodepth=16", "--size=1m", "--io_size=8m", "--norandommap")
        done = qemu_io(runner, "write -P 1 4M 3M", "write -z 5M 64k", "discard 6M 64k", "flush", "read -P 1 4M 1M")
        assert done.returncode == 0, done.stdout
        runner.command("verify", volume="db")
    journal = Journal(runner.journal, {0: 16 * MIB})
    assert bytes(journal.images[0]) == upstream.path.read_bytes()


def test_outage_gets_the_tail_before_anything_else(tmp_path: Path, upstream: QemuNbd) -> None:
    """Promise 1 and 3: what the upstream may have lost is sent again, in order."""
    with start(tmp_path, upstream) as runner:
        assert qemu_io(runner, "write -P 1 0 2M", "write -P 2 1M 2M", "flush").returncode == 0
        load = subprocess.Popen(
            ["fio", "--name=x", "--ioengine=nbd", f"--uri={runner.uri()}", "--rw=randwrite", "--bs=4k", "--iodepth=8",
             "--size=1m", "--offset=8m", "--time_based", "--runtime=20", "--thread"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        before = runner.figures()["journal"]["last_seq"]
        runner.wait_for("load", lambda f: f["journal"]["last_seq"] > before + 100)
        upstream.kill()
        away = runner.wait_for("away", lambda f: f["volumes"]["db"]["reason"])
        assert away["volumes"]["db"]["reason"]["code"] == "primary_unreachable"
        assert qemu_io(runner, "flush").returncode != 0
        assert runner.figures()["volumes"]["db"]["reason"]["code"] == "primary_unreachable"
        with upstream.path.open("r+b") as f:  # what a power cut takes back
            f.write(bytes(2 * MIB))
        load.kill()  # and with it its only job, which is a thread of it
        load.wait()
        upstream.start()
        runner.wait_for("back", lambda f: f["state"] == "protected")
        done = qemu_io(runner, "read -P 1 0 1M", "read -P 2 1M 2M", "write -P 3 4M 64k", "flush")
        assert done.returncode == 0, done.stdout
    journal = Journal(runner.journal, {0: 16 * MIB})
    assert bytes(journal.images[0]) == upstream.path.read_bytes()


def test_a_tail_that_cannot_be_read_keeps_the_volume_stopped(tmp_path: Path, upstream: QemuNbd) -> None:
    """Promise 3: an upstream that did not get all of what it may have lost is not back."""
    fail = tmp_path / "fail"
    start(tmp_path, upstream).stop()
    failing = {"operation": "pread", "part": "/segment-", "fail_file": str(fail)}
    with Runner(tmp_path, [("db", upstream.uri, 16 * MIB)], failing=failing) as runner:
        assert qemu_io(runner, "write -P 1 0 2M", "flush").returncode == 0
        fail.touch()
        upstream.kill()
        assert qemu_io(runner, "read 0 4k").returncode != 0
        runner.wait_for("away", lambda f: f["state"] == "stopped")
        with upstream.path.open("r+b") as f:  # what a power cut takes back
            f.write(bytes(2 * MIB))
        upstream.start()
        runner.wait_for("told", lambda f: "cannot be read" in (f["volumes"]["db"]["reason"] or {"text": ""})["text"])
        assert runner.figures()["state"] == "stopped"
        fail.unlink()
        runner.wait_for("back", lambda f: f["state"] == "protected")
        assert qemu_io(runner, "read -P 1 0 2M", "flush").returncode == 0
    assert bytes(Journal(runner.journal, {0: 16 * MIB}).images[0]) == upstream.path.read_bytes()


class FailingFlush(FileExport):
    """A server that may refuse a FLUSH, and then has lost what it had not synced."""

    failing = False

    def rarer(self, connection: Connection, command: int, flags: int, cookie: bytes, offset: int, length: int) -> None:
        if command == wire.FLUSH and self.failing:
            os.pwrite(self.fd, bytes(2 * MIB), 0)
            return connection.fail(cookie, errno.EIO)
        super().rarer(connection, command, flags, cookie, offset, length)


def test_an_upstream_whose_sync_failed_gets_the_tail_again(tmp_path: Path) -> None:
    """Promise 3: flushes fail until what it took since the checkpoint is written again, and then they do not."""
    path = tmp_path / "upstream.raw"
    path.write_bytes(bytes(16 * MIB))
    export = FailingFlush(str(path))
    folder = tmp_path / "upstream"
    folder.mkdir()
    with serving(OneExport(export), folder) as server, Runner(tmp_path, [("db", server.uri(), 16 * MIB)]) as runner:
        runner.wait_for("initial sync", lambda f: f["state"] == "protected")
        assert qemu_io(runner, "write -P 1 0 2M").returncode == 0
        export.failing = True
        assert qemu_io(runner, "write -P 2 4M 64k", "flush").returncode != 0
        export.failing = False
        runner.wait_for("healed", lambda f: f["volumes"]["db"]["reason"] is None)
        assert qemu_io(runner, "read -P 1 0 2M", "write -P 3 8M 4k", "flush").returncode == 0
    assert bytes(Journal(runner.journal, {0: 16 * MIB}).images[0]) == path.read_bytes()


def test_refused_by_the_upstream(tmp_path: Path) -> None:
    """Promise 2: read back, journaled, withheld."""
    server = subprocess.Popen(
        ["nbdkit", "-f", "-U", str(tmp_path / "e.sock"), "--filter=error", "memory", "16M",
         "error-pwrite=ENOSPC", "error-pwrite-rate=100%", f"error-file={tmp_path}/fail"],
    )  # fmt: skip
    uri = f"nbd+unix:///?socket={tmp_path}/e.sock"
    try:
        while subprocess.run(["nbdinfo", "--size", uri], capture_output=True).returncode:
            assert server.poll() is None
        with Runner(tmp_path, [("db", uri, 16 * MIB)]) as runner:
            runner.wait_for("initial sync", lambda f: f["state"] == "protected")
            assert qemu_io(runner, "write -P 1 0 64k").returncode == 0
            (tmp_path / "fail").touch()
            assert "No space" in qemu_io(runner, "write -P 2 0 64k").stdout
            (tmp_path / "fail").unlink()
            assert qemu_io(runner, "read -P 1 0 64k", "write -P 3 1M 4k", "flush").returncode == 0
        journal = Journal(runner.journal, {0: 16 * MIB})
        assert journal.images[0][:65536] == b"\1" * 65536
        refused = next(r for r in journal.of(batch.WRITE) if bytes(r.data[:1]) == b"\2")
        assert journal.gaps()[-1][0] == refused.seq
    finally:
        server.terminate()
        server.wait()


def test_a_refusal_that_comes_late_is_seen_with_its_gap(tmp_path: Path) -> None:
    """Promise 2: no reader meets the refused record before what was journaled about it is durable too."""
    server = subprocess.Popen(
        ["nbdkit", "-f", "-U", str(tmp_path / "e.sock"), "--filter=delay", "--filter=error", "memory", "16M",
         "error-pwrite=ENOSPC", "error-pwrite-rate=100%", f"error-file={tmp_path}/fail", "delay-write=1"],
    )  # fmt: skip
    uri = f"nbd+unix:///?socket={tmp_path}/e.sock"
    slow = {"suffix": "/segment-", "seconds": 0.3}
    try:
        while subprocess.run(["nbdinfo", "--size", uri], capture_output=True).returncode:
            assert server.poll() is None
        with Runner(tmp_path, [("db", uri, 16 * MIB)], slow_sync=slow) as runner:
            runner.wait_for("initial sync", lambda f: f["state"] == "protected")
            (tmp_path / "fail").touch()
            load = subprocess.Popen(
                ["qemu-io", "-f", "raw", "-c", "write -P 2 0 64k", runner.uri()], stdout=subprocess.DEVNULL
            )
            reader = EmbeddedReader(runner.journal, "replayer", 0)
            seen: list[int] = []
            refused = 0
            while not refused:
                storage.wait_readable([reader.fileno()], 5)
                reader.drain()
                while batches := reader.read(8 * MIB):
                    for record in (r for found in batches for r in found.records()):
                        seen.append(record.kind)
                        if record.kind == batch.WRITE:
                            refused = len(seen)
            assert batch.GAP in seen[refused:]
            assert load.wait(20) is not None
            reader.close()
    finally:
        server.terminate()
        server.wait()


def test_lost_right_after_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn that ends with a refused write and a lost connection: one reconnect, and the tail before anything else."""
    calls: list[str] = []

    class Peer:
        size, read_only, flags = MIB, False, 0

        def write(self, offset: int, data: bytes) -> None:
            if offset == 0:
                raise OSError(28, "No space left on device")
            raise ConnectionResetError(104, "gone")

        def close(self) -> None:
            calls.append("closed")

    monkeypatch.setattr(primary_nbd.Client, "connect", lambda *a, **k: Peer())
    monkeypatch.setattr(primary_nbd, "_RECONNECT_SECONDS", 0.0)
    primary = primary_nbd.NbdPrimary("nbd+unix:///x?socket=/y", MIB)
    primary.on_lost = lambda error: calls.append("lost")
    primary.on_back = lambda: calls.append("back")

    def read_back(_: object, error: BaseException | None) -> None:
        primary.read_later(0, 4096, lambda data, failed: calls.append("read failed" if failed else "read"))

    primary._busy = True
    primary.write_later(0, 4096, bytes(4096), False, read_back)
    primary.write_later(4096, 4096, bytes(4096), False, lambda *_: calls.append("written"))
    primary._busy = False
    primary._go()
    end = time.monotonic() + 5
    while calls.count("back") < 2 and time.monotonic() < end:
        if not storage.wait_readable([primary.worker.fileno()], 0.5):
            break
        primary.worker.drain()
    assert calls == ["lost", "read failed", "back"]
    primary.close()
