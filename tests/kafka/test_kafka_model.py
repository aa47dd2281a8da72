"""The model with a real Kafka between real processes: whoever is killed, every point equals the model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test

from tests.kafka.broker import Broker
from tests.kafka.conftest import cluster_at
from tests.model.machine import Machine
from tests.model.rig import ProcessRig, Rig

# An example takes some 20 s; the bound of the whole is a minute and a half.
EXAMPLES = 100 if os.environ.get("CDP_PROFILE") == "soak" else 3
STEPS = 25
SETTLE_SECONDS = 90.0


class KafkaRig(ProcessRig):
    """`cdp up` with a relay. `restart` is kill -9, of the broker too."""

    def __init__(self, broker: Broker, folder: Path, volumes: dict[str, int], **options: str) -> None:
        self._broker = broker
        journal = "\n".join((
            'kind = "kafka"', f'bootstrap_servers = ["{broker.address}"]',
            f'topic_prefix = "{cluster_at(broker).topic}."', "replication_factor = 1", "min_insync_replicas = 1",
        ))  # fmt: skip
        super().__init__(folder, volumes, journal=journal, **options)

    def restart(self, side: str) -> None:
        if side == "broker":
            self._broker.kill()
            self._broker.start()
        else:
            self.appliance.kill_child(side)
        self.appliance.wait_protected(SETTLE_SECONDS)


class KafkaMachine(Machine):
    """Four of the steps' kinds are kills here; production goes on while the broker is away in `outage`."""

    broker: Broker

    @classmethod
    def make_rig(cls, folder: Path, volumes: dict[str, int], **options: str) -> Rig:
        return KafkaRig(cls.broker, folder, volumes, **options)

    @rule(side=st.sampled_from(["relay", "broker"]))
    def restart_carrier(self, side: str) -> None:
        assert self.rig is not None
        self.rig.restart(side)

    @rule(seed=st.integers(0, 2**32))
    def outage(self, seed: int) -> None:
        """Requests that no broker sees before they are answered."""
        self.broker.kill()
        try:
            for volume in ("small", "odd", "large"):
                self.write(volume, (seed % 97 / 97, seed % 4096, 1 + seed % 60_000), seed, False)
                self.flush(volume)
            self.write_split(seed, seed % (1 << 20))
        finally:
            self.broker.start()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_point_equals_the_model_with_kafka_between(own_broker: Broker) -> None:
    """Promises 1, 4, 5, 6, 7 and 10 at once. No shrinking: an example takes many seconds, and says its seed."""
    KafkaMachine.broker = own_broker
    run_state_machine_as_test(
        KafkaMachine,
        settings=settings(
            max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck), print_blob=True,
        ),
    )  # fmt: skip
