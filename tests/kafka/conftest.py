"""One real broker for all tests of the Kafka carrier of a session; those that break it start their own."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdp.journal.kafka.cluster import Cluster
from tests.kafka.broker import Broker, missing
from tests.kafka.secured import Secured

_numbers = itertools.count(1)
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All on one worker: it has the one broker."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("kafka"))


@pytest.fixture(scope="session")
def kafka_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Skips on a machine without Java or Maven, with the reason; with CI=true that is a failure."""
    if why := missing():
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI=true, and {why}")
        pytest.skip(why)
    return tmp_path_factory.mktemp("kafka")


def started(folder: Path) -> Iterator[Broker]:
    made = Broker(folder)
    try:
        made.start()
        yield made
    finally:
        made.kill()


@pytest.fixture(scope="session")
def broker(kafka_folder: Path) -> Iterator[Broker]:
    yield from started(kafka_folder / "shared")


@pytest.fixture
def own_broker(kafka_folder: Path) -> Iterator[Broker]:
    """To be killed and frozen."""
    yield from started(kafka_folder / f"own-{next(_numbers)}")


@pytest.fixture(scope="session")
def secured(kafka_folder: Path) -> Iterator[Secured]:
    made = Secured(kafka_folder / "secured")
    try:
        made.broker.start()
        yield made
    finally:
        made.broker.kill()


def cluster_at(found: Broker) -> Cluster:
    """A topic of its own that nobody has used."""
    return Cluster((found.address,), f"cdp.test.{os.getpid()}.{next(_numbers)}", 1, 1, 7 * 86400 * 1000)


@pytest.fixture
def cluster(broker: Broker) -> Cluster:
    return cluster_at(broker)


def expire_all_but_the_last(cluster: Cluster) -> None:
    """What retention leaves behind, at once: only the newest message stays."""
    consumer = cluster.consumer()
    end = consumer.end_offsets([cluster.partition])[cluster.partition]
    consumer.close()
    admin = cluster.admin()
    admin.delete_records({cluster.partition: end - 1})
    admin.close()
