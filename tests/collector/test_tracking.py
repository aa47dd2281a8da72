"""`tracking`: production without a journal, and back; whoever dies in between (promises 2, 3, 8 and 10)."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cdp.collector.tracking import NOTE_BYTES
from cdp.errors import StorageError
from cdp.journal import batch
from cdp.journal.batch import Record
from cdp.journal.chain import Chain
from cdp.journal.reader import EmbeddedReader
from tests.collector.helpers import MIB, Journal, Runner, qemu_io, refusal
from tests.support.disk import small_disk
from tests.support.nbd import FUA, TRIM, WRITE_ZEROES, NbdClient

SIZE = 256 * MIB
STATE = "collector/groups/shop"


def small_journal(folder: Path, **more: Any) -> Runner:
    """A journal that some 12 MiB fill, because its consumer takes nothing."""
    return Runner(folder, [("db", f"file:{folder}/db.raw", SIZE)], segment_bytes=4 * MIB, max_bytes=16 * MIB, **more)


def fill(runner: Runner) -> None:
    """1 MiB at each MiB but the first, until it is tracking."""
    assert qemu_io(runner, *[f"write -P {i} {i}M 1M" for i in range(1, 30)], "flush").returncode == 0
    figures = runner.figures()
    assert (figures["state"], figures["reason"]["code"]) == ("tracking", "journal_full")


class Consumer:
    """Takes the journal when it is told to, and lays it over plain bytes."""

    def __init__(self, runner: Runner, size: int = SIZE) -> None:
        self.runner = runner
        self.records: list[Record] = []
        self.image = bytearray(size)
        self.chain = Chain(b"")

    def take(self) -> None:
        reader = EmbeddedReader(self.runner.journal, "replayer", self.chain.seq)
        try:
            while batches := reader.read(8 * MIB):
                for found in batches:
                    assert self.chain.check(found)
                    for record in found.records():
                        self._apply(record)
                reader.acknowledge(self.chain.seq)
        finally:
            reader.close()

    def _apply(self, record: Record) -> None:
        if record.kind in (batch.WRITE, batch.ZERO, batch.SYNC):
            content = bytes(record.data) or bytes(record.length)
            self.image[record.offset : record.offset + record.length] = content
        self.records.append(record._replace(data=memoryview(b"")))

    def makes_room(self) -> None:
        """Until nothing is due any more."""

        def healed(figures: Any) -> bool:
            self.take()
            return bool(figures["state"] == "protected")

        self.runner.wait_for("healed", healed)

    @property
    def gaps(self) -> list[Record]:
        return [r for r in self.records if r.kind == batch.GAP]


def another_boot(folder: Path) -> None:
    checkpoint = folder / STATE / "checkpoint"
    checkpoint.write_text(checkpoint.read_text().replace('"boot_id": "', '"boot_id": "x'))


def is_noted(folder: Path) -> bool:
    return (folder / STATE / "tracking").read_bytes()[8] == 1


def test_a_full_journal_does_not_stop_production(tmp_path: Path) -> None:
    """Promise 10: and when there is space again, what was written meanwhile is in the journal, behind a gap."""
    with small_journal(tmp_path) as runner:
        consumer, client = Consumer(runner), NbdClient(runner.socket, "db")
        client.write(0, b"first" * 100)
        client.flush()
        fill(runner)
        last = runner.figures()["journal"]["last_seq"]
        client.write(0, b"again" * 100)
        client.write(40 * MIB, b"fua" * 100, FUA)
        client.call(TRIM, 20 * MIB, MIB)
        client.call(WRITE_ZEROES, 21 * MIB, MIB)
        client.flush()
        assert client.read(0, 500) == b"again" * 100 and client.read(20 * MIB, 512) == bytes(512)
        figures = runner.figures()
        assert (figures["state"], figures["journal"]["last_seq"]) == ("tracking", last) and is_noted(tmp_path)
        assert refusal(lambda: runner.command("bookmark", group="shop", name="a")).code == "stopped"
        consumer.makes_room()
        assert runner.command("bookmark", group="shop", name="a")["withheld"] == []
        client.write(50 * MIB, b"behind" * 100)
        client.flush()
        client.socket.close()
        runner.wait_for("the note taken back", lambda f: not is_noted(tmp_path))
    content = (tmp_path / "db.raw").read_bytes()
    assert content[:500] == b"again" * 100 and content[20 * MIB : 22 * MIB] == bytes(2 * MIB)
    consumer.take()
    opened, ended = consumer.gaps
    assert opened.seq == last + 1 and opened.flags & batch.OPEN
    assert ended.offset == opened.seq and not ended.flags & batch.OPEN
    assert bytes(consumer.image) == content
    compared = sum(r.length for r in consumer.records if r.kind == batch.SYNC)
    assert compared < SIZE  # what nobody wrote is not read


def test_killed_while_tracking_the_journals_tail_stays_where_it_is(tmp_path: Path) -> None:
    """Promise 2: it is older than what the primary took meanwhile."""
    runner = small_journal(tmp_path).start()
    consumer = Consumer(runner)
    with NbdClient(runner.socket, "db") as client:
        client.write(0, b"old" * 1000)
        fill(runner)
        client.write(0, b"new" * 1000)
    for boot in ("this", "another"):
        runner.kill()
        if boot == "another":
            another_boot(tmp_path)
        runner.start()
        with NbdClient(runner.socket, "db") as client:
            assert client.read(0, 3000) == b"new" * 1000
            assert runner.figures()["state"] in ("tracking", "resyncing")
            client.write(1 * MIB, boot.encode())
            client.flush()
    with runner:
        consumer.makes_room()
        runner.kill()  # right behind it: the checkpoint may not be there yet
        runner.start()
        with NbdClient(runner.socket, "db") as client:
            assert client.read(0, 3000) == b"new" * 1000 and client.read(MIB, 7) == b"another"
        consumer.makes_room()
    consumer.take()
    assert bytes(consumer.image) == (tmp_path / "db.raw").read_bytes()


def test_stopped_while_tracking(tmp_path: Path) -> None:
    """A clean stop then is none: the next start compares."""
    runner = small_journal(tmp_path).start()
    consumer = Consumer(runner)
    fill(runner)
    with NbdClient(runner.socket, "db") as client:
        client.write(MIB, b"last" * 1000)
    assert runner.stop() == 0 and is_noted(tmp_path)
    with runner.start():
        with NbdClient(runner.socket, "db") as client:
            assert client.read(MIB, 4000) == b"last" * 1000
        consumer.makes_room()
    consumer.take()
    assert bytes(consumer.image) == (tmp_path / "db.raw").read_bytes()


@pytest.mark.parametrize("broken", ["/journal/", "/segment-"])
def test_a_journal_that_fails_does_not_stop_production(tmp_path: Path, broken: str) -> None:
    """Promises 3 and 10: what was flushed before is in the journal again, what came meanwhile is compared."""
    fail = tmp_path / "fail"
    failing = {"operation": "pwritev", "part": broken, "fail_file": str(fail)}
    with Runner(tmp_path, [("db", f"file:{tmp_path}/db.raw", 8 * MIB)], failing=failing) as runner:
        client = NbdClient(runner.socket, "db")
        client.write(0, b"a" * 4096)
        client.flush()
        client.write(4096, b"b" * 4096)
        fail.touch()
        for i in range(20):
            client.write(8192 + 4096 * i, os.urandom(4096))
            client.flush()
        assert runner.figures()["state"] == "tracking"
        fail.unlink()
        runner.wait_for("healed", lambda f: f["state"] == "protected")
        client.write(0, b"c" * 4096)
        client.flush()
        client.socket.close()
        runner.kill()
        runner.start()
        runner.wait_for("healed", lambda f: f["state"] == "protected")
    assert bytes(Journal(runner.journal, {0: 8 * MIB}).images[0]) == (tmp_path / "db.raw").read_bytes()


def test_a_disk_without_space(tmp_path: Path) -> None:
    """Promise 10, with a real ENOSPC under the journal: the map and the note need none."""
    with small_disk(tmp_path / "small", 24 * MIB) as disk:
        volumes = [("db", f"file:{tmp_path}/db.raw", SIZE)]
        with Runner(disk, volumes, segment_bytes=4 * MIB, max_bytes=512 * MIB) as runner:
            consumer = Consumer(runner)
            assert qemu_io(runner, *[f"write -P {i} {i}M 1M" for i in range(1, 40)], "flush").returncode == 0
            assert runner.figures()["state"] == "tracking"
            assert qemu_io(runner, "write -P 99 0 1M", "flush", "read -P 99 0 1M").returncode == 0
            consumer.makes_room()
            assert qemu_io(runner, "write -P 98 50M 1M", "flush").returncode == 0
        consumer.take()
        assert bytes(consumer.image) == (tmp_path / "db.raw").read_bytes()


def test_a_primary_that_refuses_meanwhile(tmp_path: Path) -> None:
    """Promise 2: the client hears it, and what is there in the end is what the journal gets."""
    with small_disk(tmp_path / "small", 20 * MIB) as disk:
        volumes = [("db", f"file:{disk}/db.raw", SIZE)]
        with Runner(tmp_path, volumes, segment_bytes=4 * MIB, max_bytes=16 * MIB) as runner:
            consumer = Consumer(runner)
            assert qemu_io(runner, *[f"write -P {i} {i}M 1M" for i in range(16)]).returncode == 0
            assert runner.figures()["state"] == "tracking"
            assert "No space left" in qemu_io(runner, "write -P 7 15M 8M").stdout
            consumer.makes_room()
        consumer.take()
        assert bytes(consumer.image) == (disk / "db.raw").read_bytes()


REFUSING: dict[str, Callable[[Path], Runner]] = {
    "a mirror sink": lambda folder: Runner(
        folder, [("db", "none", SIZE)], segment_bytes=4 * MIB, max_bytes=16 * MIB
    ),
    "a replicated group": lambda folder: small_journal(folder),
}


@pytest.mark.parametrize("what", REFUSING)
def test_who_cannot_do_without_is_refused(tmp_path: Path, what: str) -> None:
    """Promises 3 and 8: where nothing could be read again, or a flush means more than the primary."""
    runner = REFUSING[what](tmp_path)
    if "replicated" in what:
        runner.config["groups"][0]["replicated"] = {"timeout_ns": 10**9, "local_after_timeout": True}
    with runner:
        done = qemu_io(runner, *[f"write -P {i} {i}M 1M" for i in range(1, 30)])
        assert "No space left" in done.stdout


def test_a_rollback_is_never_half_journaled(tmp_path: Path) -> None:
    """Promise 7: its copying is refused instead, and it is run again later."""
    with small_journal(tmp_path) as runner:
        runner.command("lock", volumes=["db"], secret="s", disconnect=True)
        with NbdClient(runner.socket, "db!s") as client, pytest.raises(OSError) as failed:
            for offset in range(0, SIZE, MIB):
                client.write(offset, b"x" * MIB)
        assert failed.value.errno == errno.ENOSPC and runner.figures()["reason"]["code"] == "journal_full"
        assert (tmp_path / "db.raw").read_bytes().count(b"x" * MIB) < 16
        runner.command("unlock", volumes=["db"], secret="s")


def test_a_damaged_note_is_said(tmp_path: Path) -> None:
    runner = small_journal(tmp_path).start()
    runner.kill()
    (tmp_path / STATE / "tracking").write_bytes(os.urandom(NOTE_BYTES))
    with pytest.raises(StorageError) as failed:
        runner.start()
    assert failed.value.code == "corrupt" and "resync" in failed.value.hint
