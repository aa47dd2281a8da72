"""Block devices as primaries: a real loop device over a file."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdp import storage
from cdp.collector.primary import FilePrimary
from cdp.journal import batch
from tests.collector.helpers import MIB, Journal, Runner, fio, qemu_io, refusal

SIZE = 16 * MIB


@pytest.fixture
def device(tmp_path: Path) -> Iterator[str]:
    """A loop device of 24 MiB: larger than the volume that is put on it."""
    backing = tmp_path / "disk.img"
    backing.write_bytes(os.urandom(24 * MIB))
    made = subprocess.run(["losetup", "--show", "-f", str(backing)], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no loop device here: {made.stderr.strip()}")
    yield made.stdout.strip()
    subprocess.run(["losetup", "-d", made.stdout.strip()], check=True)


def content(device: str, size: int = SIZE) -> bytes:
    with open(device, "rb") as f:
        return f.read(size)


def test_a_device_is_synced_written_trimmed_killed_and_proved(tmp_path: Path, device: str) -> None:
    """Promises 1, 2 and 8 on a block device: zeroes at any alignment, refused beyond its volume, a kill under load."""
    runner = Runner(tmp_path, [("db", f"file:{device}", SIZE)]).start()
    runner.wait_for("initial sync", lambda f: f["state"] == "protected")
    done = qemu_io(runner, "write -P 1 0 3M", "discard 512k 64k", "write -z 100 1000", "write -z -u 1M 64k", "flush")
    assert done.returncode == 0, done.stdout
    assert qemu_io(runner, "read -P 0 512k 64k", "read -P 0 100 1000", "read -P 1 1100 100").returncode == 0
    other = tmp_path / "other"
    other.mkdir()
    second = Runner(other, [("db", f"file:{device}", SIZE)], lock_wait_seconds=0.1)
    assert refusal(second.start).code in ("busy", "locked")
    fio(runner, "--rw=randwrite", "--bsrange=512-20k", "--iodepth=16", "--size=16m", "--io_size=8m", "--norandommap")
    runner.kill()
    with runner:
        assert runner.figures()["state"] == "protected"
        runner.command("verify", volume="db")
    journal = Journal(runner.journal, {0: SIZE})
    assert bytes(journal.images[0]) == content(device)
    assert journal.of(batch.VERIFY)


def test_zeroing_at_any_alignment_writes_less_than_two_blocks(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 9: what one request makes the loop write does not grow with its length."""
    primary = FilePrimary(device, SIZE)
    expected, written = bytearray(content(device)), 0
    real = storage.pwrite

    def counted(fd: int, data: bytes, offset: int) -> int:
        nonlocal written
        written += len(data)
        return real(fd, data, offset)

    monkeypatch.setattr(storage, "pwrite", counted)
    assert primary.can_zero
    regions = ((100, 9 * MIB), (10 * MIB + 512, 4096), (11 * MIB + 7, 100), (12 * MIB, SIZE - 12 * MIB - 1))
    for offset, length in regions:
        written = 0
        primary.zero(offset, length, punch=length % 2 == 0)
        assert written < 2 * storage.PAGE_BYTES
        expected[offset : offset + length] = bytes(length)
    primary.sync()
    primary.close()
    assert content(device) == expected


def test_a_device_written_while_the_collector_was_away_is_refused(tmp_path: Path, device: str) -> None:
    """Starting again: a device has no mtime, but the kernel counts what is written to it."""
    runner = Runner(tmp_path, [("db", f"file:{device}", SIZE)])
    with runner:
        runner.wait_for("initial sync", lambda f: f["state"] == "protected")
        assert qemu_io(runner, "write -P 1 0 1M", "flush").returncode == 0
    with runner:
        assert runner.figures()["state"] == "protected"
    with open(device, "r+b") as f:
        f.write(b"x" * 4096)
        f.flush()
        os.fsync(f.fileno())
    with runner:
        assert runner.figures()["volumes"]["db"]["reason"]["code"] == "primary_changed"


def test_a_device_restored_after_a_kill_is_refused(tmp_path: Path, device: str) -> None:
    """Starting again: more was written to it than the journal can tell of; what a kill itself leaves is no doubt."""
    runner = Runner(tmp_path, [("db", f"file:{device}", SIZE)]).start()
    runner.wait_for("initial sync", lambda f: f["state"] == "protected")
    for _ in range(2):
        assert qemu_io(runner, "write -P 1 0 1M").returncode == 0
        runner.kill()
        runner.start()
        assert runner.figures()["state"] == "protected"
    assert qemu_io(runner, "write -P 2 0 64k", "flush").returncode == 0
    runner.kill()
    with open(device, "r+b") as f:
        f.write(os.urandom(SIZE))
        f.flush()
        os.fsync(f.fileno())
    with runner:
        assert runner.figures()["volumes"]["db"]["reason"]["code"] == "primary_changed"
        runner.command("trust", volume="db", side="primary")
        runner.wait_for("compared", lambda f: f["state"] == "protected")
    assert bytes(Journal(runner.journal, {0: SIZE}).images[0]) == content(device)


def test_a_volume_that_grew_is_compared(tmp_path: Path, device: str) -> None:
    """Promise 8: what was behind the old end of a device is no zeros; the replica must get it."""
    with Runner(tmp_path, [("db", f"file:{device}", SIZE)]) as runner:
        runner.wait_for("initial sync", lambda f: f["state"] == "protected")
    with Runner(tmp_path, [("db", f"file:{device}", 20 * MIB)]) as runner:
        runner.wait_for("compared", lambda f: f["state"] == "protected")
    assert bytes(Journal(runner.journal, {0: 20 * MIB}).images[0]) == content(device, 20 * MIB)
