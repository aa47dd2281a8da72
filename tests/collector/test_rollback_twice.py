"""The four commands of a rollback, said twice: who was killed between an answer and its note asks again."""

from __future__ import annotations

from pathlib import Path

import pytest

from cdp.journal import batch
from cdp.nbd.client import Client
from tests.collector.helpers import MIB, Journal, Runner, qemu_io, refusal


def test_each_command_said_twice_is_done_once(tmp_path: Path) -> None:
    """Promise 7: one BEGIN, one END, also with a kill in between; the second answer is the first one."""
    volumes = [("db", f"file:{tmp_path}/db.raw", 4 * MIB), ("log", f"file:{tmp_path}/log.raw", 4 * MIB)]
    who = {"volumes": ["db", "log"], "secret": "s3"}
    rollback = {"group": "shop", **who}
    with Runner(tmp_path, volumes) as runner:
        runner.command("lock", **who)
        older = Client.connect(runner.uri("db!s3"))
        runner.command("lock", **who)
        with pytest.raises(OSError):
            older.read(0, 1)
        older.close()
        begin = runner.command("rollback_begin", **rollback, target_seq=1, target_time_ns=7)
        assert runner.command("rollback_begin", **rollback, target_seq=1, target_time_ns=7) == begin
        runner.kill()
        runner.start()
        runner.command("lock", **who)
        assert runner.command("rollback_begin", **rollback, target_seq=1, target_time_ns=7) == begin
        end = runner.command("rollback_end", **rollback, begin=begin["seq"], abandoned=False)
        runner.kill()
        runner.start()
        assert runner.command("rollback_end", **rollback, begin=begin["seq"], abandoned=False) == end
        for _ in range(2):
            runner.command("unlock", **who)
        assert runner.figures()["state"] == "protected"
        runner.command("lock", volumes=["db"], secret="other")
        assert refusal(lambda: runner.command("unlock", **who)).code == "locked"
        second = runner.command(
            "rollback_begin", group="shop", volumes=["db"], secret="other", target_seq=1, target_time_ns=7
        )
        assert second["seq"] > end["seq"]
        runner.command("rollback_end", group="shop", volumes=["db"], secret="other", begin=second["seq"])
        runner.command("unlock", volumes=["db"], secret="other")
    journal = Journal(runner.journal, {0: 4 * MIB, 1: 4 * MIB})
    assert [r.seq for r in journal.of(batch.ROLLBACK_BEGIN)] == [begin["seq"], second["seq"]]
    assert len(journal.of(batch.ROLLBACK_END)) == 2


def test_a_begin_whose_answer_was_never_given_is_found_in_the_journal(tmp_path: Path) -> None:
    """A kill between BEGIN's record and the note of it: the next life answers with that BEGIN; an older rollback's
    records in the same tail are not mistaken for it."""
    who = {"volumes": ["db"], "secret": "s3"}
    rollback = {"group": "shop", **who}
    runner = Runner(tmp_path, [("db", f"file:{tmp_path}/db.raw", 4 * MIB)])
    state = tmp_path / "collector/groups/shop/group.json"
    with runner:
        runner.command("lock", volumes=["db"], secret="old")
        old = {"group": "shop", "volumes": ["db"], "secret": "old"}
        first = runner.command("rollback_begin", **old, target_seq=1, target_time_ns=7)
        runner.command("rollback_end", **old, begin=first["seq"])
        runner.command("unlock", volumes=["db"], secret="old")
        runner.command("lock", **who)
        noted = state.read_bytes()
        checkpoint = (tmp_path / "collector/groups/shop/checkpoint").read_bytes()
        begin = runner.command("rollback_begin", **rollback, target_seq=1, target_time_ns=7)
        runner.kill()
        state.write_bytes(noted)
        assert (tmp_path / "collector/groups/shop/checkpoint").read_bytes() == checkpoint
        runner.start()
        assert runner.command("rollback_begin", **rollback, target_seq=1, target_time_ns=7) == begin != first


def test_the_secret_is_in_no_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A secret in an export's name opens a locked volume: it is neither logged nor told."""
    with Runner(tmp_path, [("db", f"file:{tmp_path}/db.raw", 4 * MIB)], log_level="INFO") as runner:
        runner.command("lock", volumes=["db"], secret="7fa3c0ffee")
        assert qemu_io(runner, "write 0 4k", volume="db!7fa3c0ffee").returncode == 0
        with pytest.raises(Exception, match="not locked") as refused:
            Client.connect(runner.uri("db!7fa3c0ffee1"))
        with pytest.raises(Exception, match="no volume") as unknown:
            Client.connect(runner.uri("bd!7fa3c0ffee1"))
    logged = capfd.readouterr().err
    assert "opened 'db'" in logged or "opened" in logged
    for text in (logged, str(refused.value), str(unknown.value)):
        assert "7fa3c0ffee" not in text
