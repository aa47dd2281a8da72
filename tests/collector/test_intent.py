"""The write-intent map in a real collector: set before the first write, and all that a power cut makes it compare."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from cdp.journal import batch
from tests.collector.helpers import MIB, Journal, Runner, qemu_io
from tests.support.nbd import FLUSH, WRITE, WRITE_ZEROES, NbdClient

SIZE = 64 * MIB


def one_volume(folder: Path, **more: Any) -> Runner:
    return Runner(folder, [("db", f"file:{folder}/db.raw", SIZE)], **more)


def another_boot(folder: Path) -> None:
    checkpoint = folder / "collector/groups/shop/checkpoint"
    checkpoint.write_text(checkpoint.read_text().replace('"boot_id": "', '"boot_id": "x'))


def change(folder: Path, offset: int, content: bytes) -> None:
    """As the collector itself wrote it last: its time stamp is that of then."""
    path = folder / "db.raw"
    was = path.stat()
    with open(path, "r+b") as f:
        f.seek(offset)
        f.write(content)
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


def the_map(folder: Path) -> Path:
    return folder / "collector/groups/shop/intent-0"


def test_after_a_power_cut_what_was_written_is_compared_and_healed(tmp_path: Path) -> None:
    """Promise 2: a write that reached the primary and not the disk of the journal is found by its region's bit."""
    runner = one_volume(tmp_path).start()
    qemu_io(runner, "write -P 1 0 1M", "write -P 2 32M 1M", "flush")
    runner.kill()
    another_boot(tmp_path)
    change(tmp_path, 32 * MIB + 4096, b"lost by the journal")
    with runner:
        runner.wait_for("in sync", lambda f: f["state"] == "protected")
    journal = Journal(runner.journal, {0: SIZE})
    assert bytes(journal.images[0]) == (tmp_path / "db.raw").read_bytes()
    assert sum(r.length for r in journal.of(batch.SYNC)) == 2 * MIB and len(journal.gaps()) == 1


def test_a_power_cut_in_the_middle_of_a_comparison(tmp_path: Path) -> None:
    """Promise 2: and a kill; what is not compared yet stays due."""
    runner = one_volume(tmp_path).start()
    qemu_io(runner, "write -P 1 0 64M", "flush")
    for _ in range(3):
        runner.kill()
        another_boot(tmp_path)
        change(tmp_path, 63 * MIB, os.urandom(4096))
        runner.start()
    with runner:
        runner.wait_for("in sync", lambda f: f["state"] == "protected")
    journal = Journal(runner.journal, {0: SIZE})
    assert bytes(journal.images[0]) == (tmp_path / "db.raw").read_bytes()


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_without_a_map_all_of_it_is_compared(tmp_path: Path, damage: str) -> None:
    """Promise 2."""
    runner = one_volume(tmp_path).start()
    qemu_io(runner, "write -P 1 0 1M", "flush")
    runner.kill()
    another_boot(tmp_path)
    if damage == "missing":
        the_map(tmp_path).unlink()
    else:
        the_map(tmp_path).write_bytes(os.urandom(8192))
    runner.start()
    runner.kill()  # whoever died right behind its start left it due
    with runner:
        runner.wait_for("in sync", lambda f: f["state"] == "protected")
    journal = Journal(runner.journal, {0: SIZE})
    assert sum(r.length for r in journal.of(batch.SYNC)) >= SIZE


def test_nothing_written_is_nothing_compared(tmp_path: Path) -> None:
    runner = one_volume(tmp_path).start()
    runner.kill()
    another_boot(tmp_path)
    with runner:
        assert runner.figures()["state"] == "protected"


@pytest.mark.parametrize("command", [WRITE, WRITE_ZEROES])
def test_a_write_waits_for_its_regions_bit_and_nobody_else_does(tmp_path: Path, command: int) -> None:
    """Promise 2: the bit is durable before the write is journaled or reaches the primary."""
    slow = {"suffix": "intent-", "seconds": 1.0}
    with one_volume(tmp_path, slow_sync=slow) as runner:
        client, other = NbdClient(runner.socket, "db"), NbdClient(runner.socket, "db")
        client.write(0, b"a" * 4096)
        if command == WRITE:
            cookie = client.send(WRITE, 8 * MIB, data=b"b" * 4096)
        else:
            cookie = client.send(WRITE_ZEROES, 8 * MIB, 16 * MIB)
        other.write(4096, b"c" * 4096)  # that region is set
        other.flush()
        assert other.read(8 * MIB, 4096) == bytes(4096)
        assert Journal(runner.journal, {0: SIZE}).images[0][8 * MIB : 8 * MIB + 4096] == bytes(4096)
        assert client.receive()[:2] == (cookie, 0)
        client.flush()
        client.socket.close()
        other.socket.close()
    image = Journal(runner.journal, {0: SIZE}).images[0]
    assert bytes(image) == (tmp_path / "db.raw").read_bytes()
    assert image[8 * MIB] == (ord("b") if command == WRITE else 0)


def test_who_vanished_while_it_waited_writes_nothing(tmp_path: Path) -> None:
    """Promise 7: a rollback that disconnects its clients must not meet a late write of theirs."""
    with one_volume(tmp_path, slow_sync={"suffix": "intent-", "seconds": 0.5}) as runner:
        client = NbdClient(runner.socket, "db")
        client.send(WRITE, 8 * MIB, data=b"late" * 1024)
        client.send(FLUSH)
        runner.wait_for("connected", lambda f: f["volumes"]["db"]["clients"] == 1)
        runner.command("lock", volumes=["db"], secret="s", disconnect=True)
        with NbdClient(runner.socket, "db!s") as rollback:
            rollback.write(16 * MIB, b"r" * 4096)  # waits for a later sync of the map
            assert rollback.read(8 * MIB, 4096) == bytes(4096)
        runner.command("unlock", volumes=["db"], secret="s")
    assert [r.offset for r in Journal(runner.journal, {0: SIZE}).of(batch.WRITE)] == [16 * MIB]


def test_a_map_on_a_disk_that_fails_refuses_what_it_would_not_know_of(tmp_path: Path) -> None:
    """Promise 2: regions that are set go on; it is tried again with the next write."""
    broken = tmp_path / "broken"
    slow = {"suffix": "intent-", "seconds": 0, "fail_file": str(broken)}
    with one_volume(tmp_path, slow_sync=slow) as runner, NbdClient(runner.socket, "db") as client:
        client.write(0, b"a" * 4096)
        broken.touch()
        with pytest.raises(OSError) as failed:
            client.write(8 * MIB, b"b" * 4096)
        assert failed.value.errno == errno.EIO
        client.write(4096, b"c" * 4096)
        broken.unlink()
        client.write(8 * MIB, b"d" * 4096)
        client.flush()
        assert client.read(8 * MIB, 4096) == b"d" * 4096
    assert len(Journal(runner.journal, {0: SIZE}).of(batch.WRITE)) == 3
