"""The model against real processes: `restart` is kill -9 of the child that does the work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.model.machine import Machine
from tests.model.rig import ProcessRig, Rig

EXAMPLES = 400 if os.environ.get("CDP_PROFILE") == "soak" else 8
STEPS = 30


class ProcessMachine(Machine):
    @staticmethod
    def make_rig(folder: Path, volumes: dict[str, int], **options: str) -> Rig:
        return ProcessRig(folder, volumes, **options)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_point_equals_the_model_through_kills() -> None:
    """Promises 1, 4, 5, 6 and 7 at once. No shrinking: a process example takes seconds, and says its seed."""
    run_state_machine_as_test(
        ProcessMachine,
        settings=settings(
            max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck), print_blob=True,
        ),
    )  # fmt: skip
