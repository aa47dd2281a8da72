"""Where messages are limited: no batch is larger, requests stay whole, and what ends in the middle is on both sides."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdp.journal import batch
from cdp.journal.batch import Batch
from cdp.journal.reader import EmbeddedReader
from tests.collector.helpers import MIB, Journal, Runner, qemu_io
from tests.collector.test_upstream import QemuNbd, upstream
from tests.support.nbd import FLUSH, NbdClient

__all__ = ["upstream"]
SIZE = 64 * MIB


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Runner]:
    made = Runner(tmp_path, [("db", f"file:{tmp_path / 'db.raw'}", SIZE)], small_batches=True).start()
    made.wait_for("initial sync", lambda f: f["state"] == "protected")
    yield made
    made.__exit__()


def batches(runner: Runner) -> list[Batch]:
    reader = EmbeddedReader(runner.journal, "replayer", 0)
    found: list[Batch] = []
    try:
        while more := reader.read(8 * MIB):
            found += more
    finally:
        reader.close()
    return found


def equal(runner: Runner) -> bool:
    """The journal says what the primary holds."""
    return bytes(Journal(runner.journal, {0: SIZE}).images[0]) == (runner.folder / "db.raw").read_bytes()


def test_every_batch_fits(runner: Runner) -> None:
    done = qemu_io(
        runner, "write -P 1 0 32M", "write -P 2 100 2560k", "write -f -P 3 8M 4M", "write 3M 1M", "write -P 4 20M 4k",
        "discard 0 1M", "flush", "read -P 3 8M 4M", "read -P 2 1M 1M",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert runner.stop() == 0
    found = batches(runner)
    assert all(b.data_bytes <= batch.MESSAGE_DATA_BYTES and b.record_count <= batch.MESSAGE_RECORDS for b in found)
    writes = [r for b in found for r in b.records() if r.kind == batch.WRITE]
    ends = [r for r in writes if not r.flags & batch.CONTINUED]
    assert [r.offset + r.length for r in ends[:4]] == [32 * MIB, 100 + 2560 * 1024, 12 * MIB, 4 * MIB]
    assert [r.flags for r in ends[:4]] == [0, 0, batch.FUA, 0]
    assert all(after.seq == r.seq + 1 for r, after in zip(writes, writes[1:], strict=False) if r.flags)
    assert equal(runner)


def test_many_small_requests_at_once_fit(runner: Runner) -> None:
    """28 bytes each, some thousands in one receive."""
    with NbdClient(runner.socket, "db") as client:
        count = 20_000
        answers = threading.Thread(target=lambda: [client.receive() for _ in range(count)])
        answers.start()
        for _ in range(count):
            client.send(FLUSH, 0, 0)
        answers.join()
    assert runner.stop() == 0
    found = batches(runner)
    assert sum(r.kind == batch.BARRIER for b in found for r in b.records()) == count
    assert max(b.record_count for b in found) <= batch.MESSAGE_RECORDS


@pytest.mark.parametrize("tracking", [False, True])
def test_a_journal_that_is_full_in_the_middle(tmp_path: Path, tracking: bool) -> None:
    """Promises 2 and 10: the request goes to the primary alone; or, where flushes are replicated, it fails, and what
    the journal has of it is on the primary; then nothing more is taken."""
    runner = Runner(
        tmp_path, [("db", f"file:{tmp_path / 'db.raw'}", SIZE)], small_batches=True, segment_bytes=MIB,
        max_bytes=16 * MIB,
    )  # fmt: skip
    if not tracking:
        runner.config["groups"][0]["replicated"] = {"timeout_ns": 10**9, "local_after_timeout": False}
    with runner:
        runner.wait_for("initial sync", lambda f: f["state"] == "protected")
        done = qemu_io(runner, "write -P 7 0 32M")
        assert ("No space left" in done.stdout + done.stderr) is not tracking
        figures = runner.figures()
        assert (figures["state"], figures["reason"]["code"]) == ("tracking" if tracking else "stopped", "journal_full")
    assert equal(runner) is not tracking
    if tracking:
        assert (tmp_path / "db.raw").read_bytes()[: 32 * MIB] == b"\7" * (32 * MIB)
    writes = Journal(runner.journal, {0: SIZE}).of(batch.WRITE)
    assert 1 < len(writes) < 32 and all(r.flags == batch.CONTINUED for r in writes)


def test_killed_in_the_middle_of_requests(tmp_path: Path) -> None:
    """Promise 2: whatever piece was the last, journal and primary agree after the next start."""
    rng = random.Random(3)
    runner = Runner(
        tmp_path, [("db", f"file:{tmp_path / 'db.raw'}", SIZE)], small_batches=True, max_bytes=2048 * MIB
    )  # fmt: skip
    pause = threading.Event()
    for _ in range(5):
        runner.start()
        runner.wait_for("in sync", lambda f: f["state"] == "protected")

        def write() -> None:
            try:
                with NbdClient(runner.socket, "db") as client:
                    while True:
                        client.write(rng.randrange(SIZE - 24 * MIB), os.urandom(rng.randrange(2 * MIB, 24 * MIB)))
            except OSError:
                pass  # killed

        thread = threading.Thread(target=write)
        thread.start()
        pause.wait(0.2 + rng.random() / 2)
        runner.kill()
        thread.join()
    with runner:
        runner.wait_for("in sync", lambda f: f["state"] == "protected")
    assert equal(runner)


def test_onto_an_upstream(tmp_path: Path, upstream: QemuNbd) -> None:
    """Promise 1: a primary that answers later gets a request whole, after its pieces are in the journal."""
    with Runner(tmp_path, [("db", upstream.uri, 16 * MIB)], small_batches=True) as runner:
        runner.wait_for("initial sync", lambda f: f["state"] == "protected")
        done = qemu_io(runner, "write -P 1 0 8M", "write -f -P 2 4M 5M", "write -P 3 9 2M", "flush", "read -P 2 5M 4M")
        assert done.returncode == 0, done.stdout
        runner.command("verify", volume="db")
    journal = Journal(runner.journal, {0: 16 * MIB})
    assert bytes(journal.images[0]) == upstream.path.read_bytes()
    assert sum(1 for r in journal.of(batch.WRITE) if not r.flags & batch.CONTINUED) == 3
