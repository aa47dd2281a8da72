"""Commands and connections that come faster than they are dealt with: bounded, and no harm to production."""

from __future__ import annotations

from pathlib import Path

from cdp import storage
from cdp.journal import batch
from tests.collector.helpers import MIB, Journal, Runner, fio, qemu_io


def test_a_flood_of_resyncs_is_one_pass_more(tmp_path: Path) -> None:
    """Promise 9: however often it is asked for, at most one pass of a volume waits behind the one that runs."""
    path = tmp_path / "db.raw"
    path.write_bytes(b"x" * 8 * MIB)
    with Runner(tmp_path, [("db", f"file:{path}", 8 * MIB)]) as runner:
        for _ in range(20):
            runner.command("resync", volume="db")
        assert qemu_io(runner, "write -P 1 1M 64k", "flush").returncode == 0
        runner.wait_for("resynced", lambda f: f["state"] == "protected")
    journal = Journal(runner.journal, {0: 8 * MIB})
    assert bytes(journal.images[0]) == path.read_bytes()
    assert sum(r.length for r in journal.of(batch.SYNC)) <= 4 * 8 * MIB
    assert [to for _, to in journal.gaps()].count(None) == 0


def test_a_full_journal_does_not_flap(tmp_path: Path) -> None:
    """Promise 10: a group whose journal is full is tracking until there is room for what production writes, not only
    for a heartbeat at the end of the last segment."""
    volumes = [("db", f"file:{tmp_path}/db.raw", 64 * MIB)]
    with Runner(tmp_path, volumes, segment_bytes=MIB, max_bytes=4 * MIB) as runner:
        fill = [f"write -P {i} {i}M 100k" for i in range(20)]
        end = storage.monotonic_ns() + 5_000_000_000
        was_tracking, went_on = False, 0
        while storage.monotonic_ns() < end:
            tracking = runner.figures()["state"] == "tracking"
            went_on += was_tracking and not tracking
            was_tracking = tracking
            assert qemu_io(runner, *fill).returncode == 0
            storage.wait_readable([], 0.05)
        assert was_tracking and went_on <= 2  # spares that were being made when it was full
        runner.command("consumer_remove", group="shop", name="replayer")
        runner.wait_for("space", lambda f: f["state"] == "protected")
        assert qemu_io(runner, "write -P 9 40M 1M", "flush").returncode == 0


def test_failed_sync_of_the_journal_under_load(tmp_path: Path) -> None:
    """Promise 3: many clients write while a sync of the journal fails; none of them sees an error."""
    fail = tmp_path / "fail"
    slow = {"suffix": "/segment-00000000000000000001", "seconds": 0.02, "fail_file": str(fail)}
    with Runner(tmp_path, [("db", f"file:{tmp_path}/db.raw", 8 * MIB)], slow_sync=slow) as runner:
        fail.touch()
        done = fio(runner, "--rw=randwrite", "--bs=4k", "--iodepth=32", "--size=8m", "--io_size=16m", "--norandommap")
        assert done["error"] == 0
        assert runner.figures()["state"] == "protected"
    assert bytes(Journal(runner.journal, {0: 8 * MIB}).images[0]) == (tmp_path / "db.raw").read_bytes()
