"""The processes of rollback jobs: whatever ends one, the parent notices and goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest

from appliance import rollbacks
from appliance.rollbacks import RollbackJobs
from appliance.supervisor import Supervisor
from cdp.config import load
from cdp.errors import UnreachableError
from cdp.recovery import job as job_file
from cdp.recovery.job import Job
from tests.support.running import Appliance


def test_one_that_dies_before_it_reads_its_settings_is_only_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 7: what was unread makes the parent's end of the channel fail, and the job must go on all the same."""
    made = Appliance(tmp_path / "x", {"db": 1 << 20})
    made.write_config()
    monkeypatch.setattr(rollbacks, "MODULE", "this")  # ends at once, without a look at its channel

    async def live() -> int:
        jobs = RollbackJobs(load(str(made.config)), Supervisor("replayer", "this", {}))
        return await jobs._live("1", rollbacks._Run(), None)

    assert asyncio.run(live()) == 0


def with_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, test: Callable[[RollbackJobs, Supervisor], Awaitable[None]]
) -> Path:
    """Runs `test` over one unfinished job, whose processes only note their direction; the file that says them."""
    made = Appliance(tmp_path / "x", {"db": 1 << 20})
    made.write_config()
    monkeypatch.setattr(rollbacks, "MODULE", "tests.appliance.noting_child")
    folder = made.folder / "state" / "replayer" / "rollbacks"

    async def live() -> None:
        supervisor = Supervisor("replayer", "this", {})
        jobs = RollbackJobs(load(str(made.config)), supervisor)
        job_file.save(str(folder / "1.json"), Job("db", ["db"], 1, 1, "seq:1", "secret", False, 1))
        try:
            await test(jobs, supervisor)
        finally:
            await jobs.stop()

    asyncio.run(live())
    return folder / "1.json.directions"


def test_an_undo_that_was_asked_for_before_the_replayer_was_ready_stays_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 7: what goes on by itself at a start must not take the place of what a person said meanwhile."""

    async def test(jobs: RollbackJobs, supervisor: Supervisor) -> None:
        jobs.act("1", "undo")
        await jobs.watch("1", 30.0)
        supervisor.ready.set()
        await jobs.resume_when_ready()
        await jobs.watch("1", 30.0)

    assert with_jobs(tmp_path, monkeypatch, test).read_text().split() == ["undo"]


def test_no_rollback_begins_while_the_parent_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are answered to the end: what one begins then nobody would stop, and nobody would be told of."""

    async def test(jobs: RollbackJobs, supervisor: Supervisor) -> None:
        jobs.act("1", "resume")
        stopping = asyncio.create_task(jobs.stop())
        await asyncio.sleep(0)  # it is at its first process now
        request = {
            "group": "db", "volumes": ["db"], "target_seq": 1, "target_time_ns": 1, "expression": "seq:1",
            "disconnect": False,
        }  # fmt: skip
        for call in (partial(jobs.begin, request), partial(jobs.act, "1", "undo")):
            with pytest.raises(UnreachableError, match="stopping"):
                call()
        await stopping

    with_jobs(tmp_path, monkeypatch, test)


def test_of_a_rollback_that_is_forgotten_no_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollbacks, "MAX_KEPT", 1)

    async def test(jobs: RollbackJobs, supervisor: Supervisor) -> None:
        for number in ("1", "2", "3"):
            job = Job("db", ["db"], 1, 1, "seq:1", "secret", False, 1, step=job_file.DONE)
            job_file.save(jobs._path(number), job)
            Path(jobs._path(number) + ".lock").touch()
        jobs._forget_old()
        assert not list(Path(jobs._folder).iterdir())

    with_jobs(tmp_path, monkeypatch, test)
