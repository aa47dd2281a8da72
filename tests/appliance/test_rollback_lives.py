"""The processes of rollback jobs: whatever ends one, the parent notices and goes on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from appliance import rollbacks
from appliance.rollbacks import RollbackJobs
from appliance.supervisor import Supervisor
from cdp.config import load
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
