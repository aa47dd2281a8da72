"""What a start makes of the state that the last life left: volumes that were away, doubts, kills during a start."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cdp import storage
from cdp.collector import restart, tail
from cdp.collector.reads import ReadPool
from cdp.collector.restart import open_group
from cdp.collector.splitter import Splitter
from cdp.collector.state import load_checkpoint
from cdp.collector.volume import GroupSpec, VolumeSpec
from cdp.errors import ConfigError
from cdp.journal import batch
from tests.collector.helpers import MIB, Journal, Runner, qemu_io, refusal

LIMIT_SECONDS = 10.0


@pytest.fixture
def worker() -> Iterator[storage.Worker]:
    made = storage.Worker(2, "test")
    yield made
    made.close()


def two(tmp_path: Path) -> list[tuple[str, str, int]]:
    return [("db", f"file:{tmp_path}/db.raw", 4 * MIB), ("log", f"file:{tmp_path}/log.raw", 4 * MIB)]


def test_volume_that_was_out_of_the_config_is_compared(tmp_path: Path) -> None:
    """Promises 2 and 8: nobody watched a primary while its volume was not configured, so it is compared as a whole."""
    volumes = two(tmp_path)
    with Runner(tmp_path, volumes) as runner:
        assert qemu_io(runner, "write -P 1 0 1M", "flush").returncode == 0
    with Runner(tmp_path, volumes[1:]):
        pass
    with (tmp_path / "db.raw").open("r+b") as f:
        f.write(b"x" * 65536)
    with Runner(tmp_path, volumes) as runner:
        figures = runner.wait_for("compared", lambda f: f["state"] == "protected")
        assert figures["volumes"]["db"]["id"] == 0
    journal = Journal(runner.journal, {0: 4 * MIB, 1: 4 * MIB})
    assert bytes(journal.images[0]) == (tmp_path / "db.raw").read_bytes()
    assert journal.gaps() and journal.gaps()[-1][1] is not None


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_doubt_about_one_volume_is_none_about_the_others(tmp_path: Path, end: str) -> None:
    """Starting again: while one volume waits for a decision the others are written, stopped and started."""
    volumes = two(tmp_path)
    with Runner(tmp_path, volumes) as runner:
        assert qemu_io(runner, "write -P 1 0 1M", "flush").returncode == 0
    with (tmp_path / "db.raw").open("r+b") as f:
        f.write(b"somebody else")
    runner.start()
    for fill in (1, 2):
        assert qemu_io(runner, f"write -P {fill} 0 1M", "flush", volume="log").returncode == 0
        getattr(runner, end)()
        runner.start()
        states = {name: v["state"] for name, v in runner.figures()["volumes"].items()}
        assert states == {"db": "stopped", "log": "protected"}
    runner.command("trust", volume="db", side="primary")
    runner.wait_for("compared", lambda f: f["state"] == "protected")
    runner.stop()
    images = Journal(runner.journal, {0: 4 * MIB, 1: 4 * MIB}).images
    assert bytes(images[0]) == (tmp_path / "db.raw").read_bytes()
    assert bytes(images[1]) == (tmp_path / "log.raw").read_bytes()


def open_again(tmp_path: Path, worker: storage.Worker) -> Any:
    spec = GroupSpec("shop", [VolumeSpec("db", f"file:{tmp_path}/db.raw", 4 * MIB)], consumers=["replayer"])
    folder = f"{tmp_path}/collector/groups/shop"
    return open_group(spec, folder, worker, segment_bytes=8 * MIB, max_bytes=256 * MIB)


def test_a_start_killed_while_it_writes_the_tail_is_not_somebody_else(
    tmp_path: Path, worker: storage.Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starting again: writing the tail moves the primary's mtime on; the next start must know that it was us."""
    tolerance_ns = 300_000_000
    runner = Runner(tmp_path, [("db", f"file:{tmp_path}/db.raw", 4 * MIB)]).start()
    assert qemu_io(runner, "write -P 1 0 1M", "flush").returncode == 0
    runner.kill()
    monkeypatch.setattr(restart, "MTIME_TOLERANCE_NS", tolerance_ns)
    monkeypatch.setattr(restart, "TAIL_HEARTBEAT_NS", tolerance_ns // 3, raising=False)
    real, written = tail.TailWriter.apply, []

    def pass_time() -> None:
        begin = time.monotonic_ns()
        while time.monotonic_ns() < begin + tolerance_ns // 2:
            pass

    def killed(self: tail.TailWriter, found: Any) -> None:
        pass_time()  # a disk this slow
        real(self, found)
        written.append(found)
        if len(written) == 3:
            raise KeyboardInterrupt

    for _ in range(3):
        pass_time()

    with monkeypatch.context() as patch:
        patch.setattr(tail.TailWriter, "apply", killed)
        with pytest.raises(KeyboardInterrupt):
            open_again(tmp_path, worker)
    group = open_again(tmp_path, worker)
    assert [v.doubt for v in group.volumes] == [None]
    restart.close_group(group)


def test_volumes_never_shrink(tmp_path: Path) -> None:
    """A smaller size is refused even where the primary itself would do: a mirror sink, a device, a file cut short."""
    with Runner(tmp_path, [("db", "none", 2 * MIB)]):
        pass
    error = refusal(Runner(tmp_path, [("db", "none", MIB)]).start)
    assert isinstance(error, ConfigError) or error.exit_code == 2
    other = tmp_path / "other"
    path = other / "db.raw"
    other.mkdir()
    with Runner(other, [("db", f"file:{path}", 2 * MIB)]):
        pass
    with path.open("r+b") as f:
        f.truncate(0)
    assert refusal(Runner(other, [("db", f"file:{path}", 2 * MIB)]).start).exit_code == 2
    assert path.stat().st_size == 0


def test_names_of_bookmarks_are_durable_before_the_checkpoint_behind_them(
    tmp_path: Path, worker: storage.Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bookmarks stay unique: a checkpoint past a bookmark's record is the only other place that its name is found."""
    group = open_again(tmp_path, worker)
    before = load_checkpoint(f"{group.folder}/checkpoint")
    group.bookmarks.add("one")
    real = storage.write_file

    def no_room(path: str, content: bytes) -> None:
        if path.endswith("/bookmarks"):
            raise OSError(28, "No space left on device")
        real(path, content)

    monkeypatch.setattr(storage, "write_file", no_room)
    seq = group.append([(7, 0, 0xFFFF, 0, 0, b"")])
    group.checkpoint(seq)
    drain_until(worker, lambda: not group._checkpointing)
    assert load_checkpoint(f"{group.folder}/checkpoint") == before
    monkeypatch.undo()
    group.checkpoint(seq)
    drain_until(worker, lambda: not group._checkpointing)
    after = load_checkpoint(f"{group.folder}/checkpoint")
    assert after is not None and after["seq"] == seq
    restart.close_group(group)


def test_a_write_that_breaks_off_behind_the_journal_is_read_back(
    tmp_path: Path, worker: storage.Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 2: whatever ends a batch between journal and primary (no memory, a bug), the journal then says what the
    primary really holds; nothing is left that replica and primary differ in."""
    group = open_again(tmp_path, worker)
    volume = group.volumes[0]
    splitter = Splitter(volume, group, ReadPool())
    data = memoryview(b"\1" * 8192)
    requests = [(1, 0, b"cookie-1", 0, 8192, data), (1, 0, b"cookie-2", 4096, 8192, data)]
    connection: Any = SimpleNamespace(done_many=lambda cookies: None)

    def no_memory(fd: int, content: memoryview, offset: int) -> int:
        raise MemoryError

    monkeypatch.setattr(storage, "pwrite", no_memory)
    with pytest.raises(MemoryError):
        splitter._commit(connection, list(requests), [
            batch.DESCRIPTOR.pack(batch.WRITE, 0, 0, 8192, r[3], 8192) for r in requests
        ], 16384, True, False)  # fmt: skip
    monkeypatch.undo()
    restart.close_group(group)
    journal = Journal(f"{group.folder}/journal", {0: 4 * MIB})
    assert bytes(journal.images[0]) == (tmp_path / "db.raw").read_bytes() == bytes(4 * MIB)
    assert len(journal.gaps()) == 2


def drain_until(worker: storage.Worker, condition: Any) -> None:
    end = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < end
        storage.wait_readable([worker.fileno()], 0.1)
        worker.drain()
