"""Who may open a primary, what a primary can do, and what it must be to be served again."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from cdp import storage
from cdp.collector.locks import lock_primary
from cdp.collector.primary import FilePrimary
from cdp.errors import ConfigError, RefusedError
from tests.collector.helpers import MIB, Journal, Runner, qemu_io, refusal


def test_missing_file_is_made_sparse_at_its_size(tmp_path: Path) -> None:
    primary = FilePrimary(str(tmp_path / "db.raw"), 8 * MIB)
    assert primary.created and primary.can_zero
    assert os.stat(primary.path).st_size == 8 * MIB
    assert primary.extents(0, 8 * MIB) == [(8 * MIB, False)]
    primary.close()


def test_another_size_is_refused_unless_the_volume_grew(tmp_path: Path) -> None:
    path = str(tmp_path / "db.raw")
    FilePrimary(path, 4 * MIB).close()
    with pytest.raises(ConfigError):
        FilePrimary(path, 8 * MIB)
    FilePrimary(path, 8 * MIB, known_bytes=4 * MIB).close()
    assert os.stat(path).st_size == 8 * MIB


def test_punch_makes_holes_and_no_hole_keeps_the_space(tmp_path: Path) -> None:
    primary = FilePrimary(str(tmp_path / "db.raw"), 8 * MIB)
    primary.write(0, b"x" * (2 * MIB))
    primary.zero(4096, MIB, punch=True)
    assert primary.extents(0, 8 * MIB) == [(4096, True), (MIB, False), (MIB - 4096, True), (6 * MIB, False)]
    used = os.stat(primary.path).st_blocks
    primary.zero(4096, MIB, punch=False)
    assert os.stat(primary.path).st_blocks > used
    assert primary.read(0, 8192) == b"x" * 4096 + bytes(4096)
    primary.zero(3, 7, punch=True)
    assert primary.read(0, 12) == b"xxx" + bytes(7) + b"xx"
    primary.close()


def test_asking_what_zeroing_costs_leaves_the_mtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting again: the mtime says who wrote last, also on another user's file, whose mtime cannot be put back."""
    path = tmp_path / "db.raw"
    path.write_bytes(bytes(MIB))
    os.utime(path, ns=(10**18, 10**18))

    def not_ours(fd: int, ns: tuple[int, int]) -> None:
        raise PermissionError

    def punched(fd: int, offset: int, length: int) -> None:
        os.truncate(fd, MIB)  # as file systems that stamp the file for it do

    for utime in (os.utime, not_ours):
        with monkeypatch.context() as patch:
            patch.setattr(os, "utime", utime)
            patch.setattr(storage, "punch_hole", punched)
            primary = FilePrimary(str(path), MIB)
            assert primary.can_zero and primary.identity()["mtime_ns"] == 10**18
            primary.close()


def test_a_file_is_opened_once(tmp_path: Path) -> None:
    path = str(tmp_path / "db.raw")
    first = FilePrimary(path, MIB)
    fd = os.open(path, os.O_RDWR)
    with pytest.raises(RefusedError, match="open in another process"):
        lock_primary(fd, path, wait_seconds=0)
    os.close(fd)
    first.close()


def test_qemu_is_kept_out(tmp_path: Path) -> None:
    primary = FilePrimary(str(tmp_path / "db.raw"), MIB)
    command = ["qemu-io", "-f", "raw", "-c", "write 0 4k", primary.path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "lock" in done.stderr
    primary.close()
    assert subprocess.run(command, capture_output=True, text=True).returncode == 0


@pytest.mark.parametrize("arguments", [["-f", "raw"], ["-f", "raw", "-r"]])
def test_a_running_qemu_is_respected(tmp_path: Path, arguments: list[str]) -> None:
    path = tmp_path / "db.raw"
    path.write_bytes(bytes(MIB))
    sock = tmp_path / "q.sock"
    qemu = subprocess.Popen(["qemu-nbd", *arguments, "-k", str(sock), "--persistent", str(path)])
    try:
        # Its socket is there before its locks are: it holds them once it answers.
        while subprocess.run(["nbdinfo", "--size", f"nbd+unix:///?socket={sock}"], capture_output=True).returncode:
            assert qemu.poll() is None
        fd = os.open(path, os.O_RDWR)
        with pytest.raises(RefusedError):
            lock_primary(fd, str(path), wait_seconds=0)
        os.close(fd)
    finally:
        qemu.terminate()
        qemu.wait()


def test_second_collector_is_refused_for_a_state_folder_and_for_a_primary(tmp_path: Path) -> None:
    volumes = [("db", f"file:{tmp_path}/db.raw", MIB)]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with Runner(tmp_path / "a", volumes):
        first = Runner(tmp_path / "a", volumes, lock_wait_seconds=0.2)
        second = Runner(tmp_path / "b", volumes, lock_wait_seconds=0.2)
        assert [refusal(first.start).code, refusal(second.start).code] == ["locked", "locked"]


def test_changed_while_stopped_cleanly_is_refused_until_trusted(tmp_path: Path) -> None:
    """Starting again: after a clean stop the mtime must be the recorded one."""
    path = tmp_path / "db.raw"
    runner = Runner(tmp_path, [("db", f"file:{path}", 4 * MIB)])
    with runner:
        qemu_io(runner, "write -P 1 0 1M", "flush")
    with runner:
        assert runner.figures()["volumes"]["db"]["state"] == "protected"
    with path.open("r+b") as f:
        f.write(b"somebody else")
    with runner:
        volume = runner.figures()["volumes"]["db"]
        assert (volume["state"], volume["reason"]["code"]) == ("stopped", "primary_changed")
        assert qemu_io(runner, "read -P 1 4k 4k").returncode == 0
        assert qemu_io(runner, "write -P 2 0 4k").returncode != 0
    with runner:  # the doubt outlives a restart
        assert runner.figures()["volumes"]["db"]["state"] == "stopped"
        runner.command("trust", volume="db", side="primary")
        runner.wait_for("compared", lambda f: f["volumes"]["db"]["state"] == "protected")
        assert qemu_io(runner, "write -P 2 8k 4k", "flush").returncode == 0
    journal = Journal(runner.journal, {0: 4 * MIB})
    assert bytes(journal.images[0]) == path.read_bytes()
    assert [to for _, to in journal.gaps()].count(None) == 0 and journal.gaps()


def test_a_decision_that_cannot_be_journaled_leaves_the_doubt(tmp_path: Path) -> None:
    """Promise 8: else the volume would serve, `protected`, with a gap that nothing ends."""
    path, fail = tmp_path / "db.raw", tmp_path / "fail"
    failing = {"operation": "pwritev", "part": "/journal/", "fail_file": str(fail)}
    runner = Runner(tmp_path, [("db", f"file:{path}", 4 * MIB)], failing=failing)
    with runner:
        qemu_io(runner, "write -P 1 0 1M", "flush")
    with path.open("r+b") as f:
        f.write(b"somebody else")
    with runner:
        fail.touch()
        assert refusal(lambda: runner.command("trust", volume="db", side="primary")).code in ("storage", "stopped")
        fail.unlink()
        goes_on = runner.wait_for("appends", lambda f: (f["reason"] or {}).get("code") != "journal_failed")
        assert goes_on["volumes"]["db"]["reason"]["code"] == "primary_changed"
        runner.command("trust", volume="db", side="primary")
        runner.wait_for("compared", lambda f: f["state"] == "protected")
    assert bytes(Journal(runner.journal, {0: 4 * MIB}).images[0]) == path.read_bytes()


def test_changed_after_a_kill_is_refused_and_the_journal_can_be_trusted(tmp_path: Path) -> None:
    """Starting again: after a kill the mtime is at most 2 s past the last batch's."""
    path = tmp_path / "db.raw"
    runner = Runner(tmp_path, [("db", f"file:{path}", 4 * MIB)]).start()
    qemu_io(runner, "write -P 1 0 1M", "flush")
    runner.kill()
    with path.open("r+b") as f:
        f.write(b"y" * 4096)
    later = os.stat(path).st_mtime_ns + 10**10
    os.utime(path, ns=(later, later))
    with runner:
        assert runner.figures()["volumes"]["db"]["reason"]["code"] == "primary_changed"
        runner.command("trust", volume="db", side="journal")
        runner.wait_for("compared", lambda f: f["volumes"]["db"]["state"] == "protected")
        assert qemu_io(runner, "read -P 1 0 1M").returncode == 0


def test_another_file_can_only_be_trusted_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "db.raw"
    runner = Runner(tmp_path, [("db", f"file:{path}", MIB)])
    with runner:
        qemu_io(runner, "write -P 1 0 4k")
    os.rename(path, tmp_path / "old")
    path.write_bytes(b"z" * MIB)
    with runner:
        assert runner.figures()["volumes"]["db"]["reason"]["code"] == "other_primary"
        assert refusal(lambda: runner.command("trust", volume="db", side="journal")).code == "unsupported"
        runner.command("trust", volume="db", side="primary")
        runner.wait_for("compared", lambda f: f["volumes"]["db"]["state"] == "protected")
