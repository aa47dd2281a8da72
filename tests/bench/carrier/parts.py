"""The parts of the Kafka carrier's benchmark, over one broker that is there for all of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from cdp.journal.kafka.cluster import Cluster
from tests.bench.carrier import collector, latency, outage, relay, replay, tools
from tests.bench.report import Figure
from tests.kafka.broker import Broker

# What each of them asks is in the docstring of its module.
PARTS = ("kafka-relay", "kafka-replay", "kafka-latency", "kafka-outage", "kafka-collector")
ALL = "kafka"


def expanded(parts: Sequence[str]) -> list[str]:
    """`kafka` stands for all of them."""
    return [each for part in parts for each in (PARTS if part == ALL else (part,))]


def measure(parts: Sequence[str], folder: Path, rounds: int, seconds: int) -> list[Figure]:
    """Those of PARTS that are among `parts`, one after another: about 12 minutes with 3 rounds of 6 s."""
    wanted = [part for part in PARTS if part in parts]
    if not wanted:
        return []
    figures = list[Figure]()
    with tools.running(folder / "broker") as broker:
        for part in wanted:
            figures += _part(part, folder, broker, rounds, seconds)
    return figures


def _part(part: str, folder: Path, broker: Broker, rounds: int, seconds: int) -> list[Figure]:
    """One of them, in a folder of its own that is gone afterwards."""
    place = folder / part
    place.mkdir()
    try:
        match part:
            case "kafka-relay":
                return _with_topic(relay.measure, place, broker, rounds, seconds)
            case "kafka-replay":
                return _with_topic(replay.measure, place, broker, rounds, seconds)
            case "kafka-latency":
                return latency.measure(place, broker, rounds, seconds)
            case "kafka-outage":
                return outage.measure(place, broker, rounds, seconds)
            case _:
                return collector.measure(place, broker, rounds, seconds)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _with_topic(
    measure: Callable[[Path, Cluster, int, int], list[Figure]], place: Path, broker: Broker, rounds: int, seconds: int
) -> list[Figure]:
    cluster = tools.cluster_at(broker)
    try:
        return measure(place, cluster, rounds, seconds)
    finally:
        tools.delete(cluster)
