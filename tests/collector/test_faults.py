"""Refused writes, kills, failing syncs, a full journal: what follows is what the promises say."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdp.errors import RefusedError
from cdp.journal import batch
from cdp.nbd.client import Client
from tests.collector.helpers import MIB, Journal, Runner, fio, qemu_io, refusal
from tests.support.disk import small_disk


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "small", 8 * MIB) as folder:
        yield folder


def test_refused_writes_are_read_back_and_withheld(tmp_path: Path, full_disk: Path) -> None:
    """Promise 2: the client gets ENOSPC; journal and primary agree; no point in between is offered."""
    path = full_disk / "db.raw"
    with Runner(tmp_path, [("db", f"file:{path}", 16 * MIB)], max_bytes=512 * MIB) as runner:
        assert qemu_io(runner, "write -P 1 0 7M").returncode == 0
        done = qemu_io(runner, "write -P 2 6M 3M")  # a short write, then no space
        assert "No space left" in done.stdout + done.stderr
        assert "No space left" in qemu_io(runner, "write -P 3 12M 64k").stdout
        assert qemu_io(runner, "write -P 4 1M 64k", "discard 0 1M", "write -P 5 12M 64k", "flush").returncode == 0
        assert runner.figures()["state"] == "protected"
    journal = Journal(runner.journal, {0: 16 * MIB})
    assert bytes(journal.images[0]) == path.read_bytes()
    gaps = journal.gaps()
    refused = [r for r in journal.of(batch.WRITE) if r.length == 64 << 10 and bytes(r.data[:1]) == b"\3"]
    assert len(gaps) == 2 and gaps[1][0] == refused[0].seq
    assert all(to is not None and any(r.kind == batch.SYNC for r in journal.records[a - 1 : to]) for a, to in gaps)
    runner.start()
    runner.kill()


def test_refused_writes_fill_neither_log_nor_timeline(
    tmp_path: Path, full_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Promise 9: the first is said at once, the others are counted; they share a gap, which ends when they do."""
    with Runner(tmp_path, [("db", f"file:{full_disk}/db.raw", 16 * MIB)], max_bytes=512 * MIB) as runner:
        assert "No space left" in qemu_io(runner, "write 0 16M").stdout
        with Client.connect(runner.uri()) as client:
            for block in range(500):
                with pytest.raises(OSError):
                    client.write(12 * MIB + block * 4096, b"x" * 4096)
        assert refusal(lambda: runner.command("bookmark", group="shop", name="within")).code == "in_gap"
        end = time.monotonic() + 20
        while True:  # until it has been quiet for a while
            try:
                seq = runner.command("bookmark", group="shop", name="behind")["seq"]
                break
            except RefusedError:
                assert time.monotonic() < end
    gaps = Journal(runner.journal, {0: 16 * MIB}).gaps()
    assert len(gaps) < 20 and all(to is not None and to <= seq for _, to in gaps)
    lines = [line for line in capfd.readouterr().err.splitlines() if "refused seq" in line]
    assert 1 <= len(lines) < 10


def test_killed_among_refused_writes_the_volume_is_compared(tmp_path: Path, full_disk: Path) -> None:
    """Promises 2 and 8: the gap that is left open is ended by a pass, whatever checkpoint was taken in it."""
    with Runner(tmp_path, [("db", f"file:{full_disk}/db.raw", 16 * MIB)], max_bytes=512 * MIB) as runner:
        assert "No space left" in qemu_io(runner, "write 0 16M").stdout
        with Client.connect(runner.uri()) as client:
            for block in range(5):
                with pytest.raises(OSError):
                    client.write(12 * MIB + block * 4096, b"x" * 4096)
        runner.kill()
        runner.start()
        runner.wait_for("compared", lambda f: f["state"] == "protected")
        assert runner.command("bookmark", group="shop", name="behind")["withheld"] == []
    journal = Journal(runner.journal, {0: 16 * MIB})
    assert bytes(journal.images[0]) == (full_disk / "db.raw").read_bytes()
    assert all(to is not None for _, to in journal.gaps())


def test_refused_in_the_middle_of_a_batch(tmp_path: Path, full_disk: Path) -> None:
    """Promise 2, under load: fio runs into the full disk with 32 writes in flight."""
    path = full_disk / "db.raw"
    with Runner(tmp_path, [("db", f"file:{path}", 16 * MIB)], max_bytes=512 * MIB) as runner:
        fio(runner, "--rw=randwrite", "--bs=12k", "--iodepth=32", "--size=16m", "--continue_on_error=write")
        assert runner.figures()["state"] == "protected"
    journal = Journal(runner.journal, {0: 16 * MIB})
    assert journal.gaps()
    assert bytes(journal.images[0]) == path.read_bytes()


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_kill_under_load_leaves_primary_as_the_journal_says(tmp_path: Path, seed: int) -> None:
    """Promises 1 and 2: after kill -9 and a restart the primary is the journal, replayed."""
    volumes = [("db", f"file:{tmp_path}/db.raw", 32 * MIB), ("log", f"file:{tmp_path}/log.raw", 8 * MIB)]
    runner = Runner(tmp_path, volumes, segment_bytes=4 * MIB, max_bytes=512 * MIB).start()
    load = subprocess.Popen(
        ["fio", "--name=x", "--ioengine=nbd", f"--uri={runner.uri()}", "--rw=randwrite", "--bsrange=512-20k",
         "--bs_unaligned", "--iodepth=16", "--size=32m", "--time_based", "--runtime=20", f"--randseed={seed}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    before = runner.figures()["journal"]["last_seq"]
    runner.wait_for("load", lambda f: f["journal"]["last_seq"] > before + 500)
    runner.kill()
    load.wait(20)
    with runner:
        assert runner.figures()["state"] == "protected"
    images = Journal(runner.journal, {0: 32 * MIB, 1: 8 * MIB}).images
    assert bytes(images[0]) == (tmp_path / "db.raw").read_bytes()
    assert bytes(images[1]) == (tmp_path / "log.raw").read_bytes()


@pytest.mark.parametrize("suffix", ["db.raw", "/segment-"])
def test_flush_waits_for_both_and_stalls_nobody(tmp_path: Path, suffix: str) -> None:
    """Promise 3: a FLUSH is answered after the slower of the two syncs; other clients write on meanwhile."""
    slow = {"suffix": suffix, "seconds": 0.5}
    with Runner(tmp_path, [("db", f"file:{tmp_path}/db.raw", 8 * MIB)], slow_sync=slow) as runner:
        begin = time.monotonic()
        flush = subprocess.Popen(
            ["qemu-io", "-f", "raw", "-c", "write 0 4k", "-c", "flush", runner.uri()], stdout=subprocess.DEVNULL
        )
        done = fio(runner, "--rw=randwrite", "--bs=4k", "--iodepth=4", "--size=8m", "--io_size=400k")
        assert done["write"]["clat_ns"]["max"] < 300e6
        assert flush.poll() is None
        assert flush.wait(10) == 0
        assert time.monotonic() - begin >= 0.5


def test_failed_sync_of_a_primary_is_healed_from_the_journal(tmp_path: Path) -> None:
    """Promise 3: flushes fail until what the primary took since the checkpoint is written again and synced."""
    fail = tmp_path / "fail"
    slow = {"suffix": "db.raw", "seconds": 0, "fail_file": str(fail)}
    with Runner(tmp_path, [("db", f"file:{tmp_path}/db.raw", 8 * MIB)], slow_sync=slow) as runner:
        assert qemu_io(runner, "write -P 1 0 1M", "flush").returncode == 0
        fail.touch()
        done = qemu_io(runner, "write -P 2 0 64k", "flush")
        assert done.returncode != 0
        assert qemu_io(runner, "read -P 2 0 64k").returncode == 0
        assert runner.figures()["volumes"]["db"]["reason"]["code"] == "sync_failed"
        fail.unlink()
        runner.wait_for("healed", lambda f: f["volumes"]["db"]["reason"] is None)
        assert qemu_io(runner, "write -P 3 0 4k", "flush").returncode == 0
    assert bytes(Journal(runner.journal, {0: 8 * MIB}).images[0]) == (tmp_path / "db.raw").read_bytes()


def test_failed_sync_of_the_journal_goes_on_in_a_new_segment(tmp_path: Path) -> None:
    """Promise 3: the file is never trusted again, what it had is written again, the flush is then true."""
    fail = tmp_path / "fail"
    slow = {"suffix": "/segment-00000000000000000001", "seconds": 0, "fail_file": str(fail)}
    with Runner(tmp_path, [("db", f"file:{tmp_path}/db.raw", 8 * MIB)], slow_sync=slow) as runner:
        fail.touch()
        assert qemu_io(runner, "write -P 2 0 64k", "flush", "write -P 3 64k 4k", "flush").returncode == 0
        assert runner.figures()["state"] == "protected"
        runner.kill()
        runner.start()
        assert qemu_io(runner, "read -P 2 0 64k", "read -P 3 64k 4k").returncode == 0
    assert bytes(Journal(runner.journal, {0: 8 * MIB}).images[0]) == (tmp_path / "db.raw").read_bytes()


def test_failed_append_goes_on_in_a_new_segment_by_itself(tmp_path: Path) -> None:
    """Promises 3 and 10: what was acknowledged before is in the new segment, what came meanwhile is compared."""
    fail = tmp_path / "fail"
    failing = {"operation": "pwritev", "part": "/segment-00000000000000000001", "fail_file": str(fail)}
    with Runner(tmp_path, [("db", f"file:{tmp_path}/db.raw", 8 * MIB)], failing=failing) as runner:
        assert qemu_io(runner, "write -P 2 0 64k", "flush", "write -P 3 64k 4k").returncode == 0
        fail.touch()  # that file stays bad
        assert qemu_io(runner, "write -P 4 0 64k").returncode == 0
        runner.wait_for("a new segment", lambda f: f["state"] == "protected")
        assert qemu_io(runner, "write -P 5 128k 4k", "flush", "read -P 4 0 64k", "read -P 3 64k 4k").returncode == 0
        runner.kill()
        runner.start()
        runner.wait_for("compared", lambda f: f["state"] == "protected")
        assert qemu_io(runner, "read -P 4 0 64k", "read -P 5 128k 4k").returncode == 0
    assert bytes(Journal(runner.journal, {0: 8 * MIB}).images[0]) == (tmp_path / "db.raw").read_bytes()


def test_journal_disk_that_fails_is_done_without_for_as_long(tmp_path: Path) -> None:
    """Promises 3 and 10: `tracking` with its reason; writes and flushes go on, until appends work again."""
    fail = tmp_path / "fail"
    failing = {"operation": "pwritev", "part": "/journal/", "fail_file": str(fail)}
    with Runner(tmp_path, [("db", f"file:{tmp_path}/db.raw", 8 * MIB)], failing=failing) as runner:
        assert qemu_io(runner, "write -P 2 0 64k").returncode == 0
        fail.touch()
        for _ in range(2):
            assert qemu_io(runner, "write -P 4 0 64k", "flush").returncode == 0
        figures = runner.figures()
        assert (figures["state"], figures["reason"]["code"]) == ("tracking", "journal_failed")
        assert qemu_io(runner, "read -P 4 0 64k").returncode == 0
        assert refusal(lambda: runner.command("bookmark", group="shop", name="a")).code == "stopped"
        fail.unlink()
        runner.wait_for("appends", lambda f: f["state"] == "protected" and f["reason"] is None)
        assert qemu_io(runner, "write -P 6 1M 64k", "flush", "read -P 4 0 64k").returncode == 0
        runner.command("bookmark", group="shop", name="a")
    assert bytes(Journal(runner.journal, {0: 8 * MIB}).images[0]) == (tmp_path / "db.raw").read_bytes()


def test_start_on_a_failing_journal_disk_waits_for_it(tmp_path: Path) -> None:
    """What every life begins with is journaled once the disk takes it."""
    fail = tmp_path / "fail"
    failing = {"operation": "pwritev", "part": "/segment-", "fail_file": str(fail)}
    runner = Runner(tmp_path, [("db", f"file:{tmp_path}/db.raw", 8 * MIB)], failing=failing)
    fail.touch()
    with runner:
        assert runner.figures()["reason"]["code"] == "journal_failed"
        fail.unlink()
        runner.wait_for("appends", lambda f: f["state"] == "protected")
        assert qemu_io(runner, "write -P 6 1M 64k", "flush").returncode == 0
    journal = Journal(runner.journal, {0: 8 * MIB})
    assert journal.records[0].kind == batch.RESIZE
    assert bytes(journal.images[0]) == (tmp_path / "db.raw").read_bytes()


@pytest.mark.slow  # a checkpoint is due every 10 s
def test_a_gap_whose_reason_was_not_saved_is_closed_after_a_kill(tmp_path: Path) -> None:
    """Promise 8: no checkpoint passes the gap's record before it is kept that a comparison is due."""
    fail = tmp_path / "fail"
    failing = {"operation": "write_file", "part": "/group.json", "fail_file": str(fail)}
    volumes = [("db", f"file:{tmp_path}/db.raw", 64 * MIB)]
    with Runner(tmp_path, volumes, segment_bytes=4 * MIB, max_bytes=64 * MIB, failing=failing) as runner:
        assert qemu_io(runner, *[f"write -P {i} {i}M 1M" for i in range(1, 48)]).returncode == 0
        fail.touch()
        gap_seq = runner.command("resync", volume="db")["after_seq"] + 2  # and waits: the journal is filling
        assert refusal(lambda: runner.command("unlock", volumes=["db"], secret="s")).code == "storage"  # not saved
        fail.unlink()
        assert qemu_io(runner, "write -P 1 0 4k").returncode == 0
        runner.wait_for("a checkpoint", lambda f: f["consumers"]["primary"] > gap_seq)
        assert runner.figures()["state"] == "resyncing"
        runner.kill()
        runner.start()
        assert runner.figures()["state"] == "resyncing"
