"""The model against both services in this process: many short lives."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.model.in_process import InProcessRig
from tests.model.machine import Machine
from tests.model.rig import Rig

EXAMPLES = 3000 if os.environ.get("CDP_PROFILE") == "soak" else 10
STEPS = 40


class InProcessMachine(Machine):
    @staticmethod
    def make_rig(folder: Path, volumes: dict[str, int], **options: str) -> Rig:
        return InProcessRig(folder, volumes, **options)


@pytest.mark.timeout(0 if os.environ.get("CDP_PROFILE") == "soak" else 120)
def test_every_point_equals_the_model() -> None:
    """Promises 1, 4, 6 and 7: requests of odd sizes, restarts and rollbacks; every point equals the model's."""
    run_state_machine_as_test(
        InProcessMachine,
        settings=settings(
            max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None, phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck), print_blob=True,
        ),
    )  # fmt: skip
