"""kill -9 rounds under a writer that knows what it was promised."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.book import difference
from tests.support.nbd import NbdClient, NbdRefused
from tests.support.running import Appliance, wait_for
from tests.support.stamps import StampWriter

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SIZE = 16 << 20
VOLUME = "db"
ROUNDS = 200 if os.environ.get("CDP_PROFILE") == "soak" else 6


@pytest.fixture
def appliance() -> Iterator[Appliance]:
    folder = Path(tempfile.mkdtemp(prefix="cdp-kills-"))
    appliance = Appliance(folder, {VOLUME: SIZE})
    try:
        appliance.write_config()
        yield appliance
    finally:
        appliance.end()
        shutil.rmtree(folder, ignore_errors=True)


def connect(appliance: Appliance) -> NbdClient:
    """A connection to the volume, as soon as the collector is there again."""

    def connected() -> NbdClient | None:
        with contextlib.suppress(OSError, NbdRefused):
            return NbdClient(appliance.socket("collector"), VOLUME)
        return None

    client = wait_for(connected, "the collector takes clients")
    assert isinstance(client, NbdClient)
    return client


def content(appliance: Appliance) -> bytes:
    with connect(appliance) as client:
        return client.read_all()


def write_for(appliance: Appliance, writer: StampWriter, requests: int) -> None:
    """Starts the writer and returns after so many more requests, while it goes on."""
    goal = writer.requests + requests
    writer.start(connect(appliance))
    wait_for(lambda: writer.requests >= goal or writer.error, f"{requests} requests")
    assert writer.error is None, writer.error


def settle(appliance: Appliance, writer: StampWriter, images: dict[str, bytes]) -> None:
    """Quiet: nothing promised is missing; a bookmark with its image; primary and replica equal."""
    now = content(appliance)
    writer.check(now)
    name = f"round-{len(images)}"
    appliance.bookmark(name)
    images[name] = now
    assert appliance.json("verify", VOLUME, expect=(0, 1))["equal"] is True


def check_images(appliance: Appliance, images: dict[str, bytes]) -> None:
    for name, expected in images.items():
        with NbdClient(appliance.socket("replayer"), f"{VOLUME}@{name}") as client:
            found = client.read_all()
        same = found == expected  # apart: pytest must not try to explain megabytes
        assert same, difference(f"{VOLUME}@{name}", found, expected)


def test_children_killed_under_load(appliance: Appliance) -> None:
    """Promises 2, 4 and 5: a supervised child that is killed loses nothing, and no point changes."""
    appliance.start()
    appliance.wait_protected()
    writer, images, rng = StampWriter(SIZE, 1), dict[str, bytes](), random.Random(11)
    for number in range(ROUNDS):
        write_for(appliance, writer, rng.randrange(500, 4000))
        side = ("collector", "replayer")[number % 2]
        appliance.kill_child(side)
        if side == "replayer":
            assert writer.error is None, "the replayer's death must not touch production (promise 10)"
        writer.stop()
        settle(appliance, writer, images)
        check_images(appliance, images)
    appliance.stop()


def test_whole_services_killed_under_load(appliance: Appliance) -> None:
    """Parents killed: their children end with them, a new start takes over, nothing is lost."""
    writer, images, rng = StampWriter(SIZE, 2), dict[str, bytes](), random.Random(12)
    appliance.start("collector", "replayer")
    appliance.wait_protected()
    for number in range(ROUNDS):
        write_for(appliance, writer, rng.randrange(500, 4000))
        for side in (("collector",), ("replayer",), ("collector", "replayer"))[number % 3]:
            appliance.services[side].kill()
            appliance.start(side)
        writer.stop()
        appliance.wait_protected()
        settle(appliance, writer, images)
    check_images(appliance, images)
    appliance.stop()


def test_replayer_killed_while_it_is_behind(appliance: Appliance) -> None:
    """Promise 5: killed again and again in the middle of applying; then equal, and every point true."""
    appliance.start()
    appliance.wait_protected()
    writer, images, rng = StampWriter(SIZE, 3), dict[str, bytes](), random.Random(13)
    settle(appliance, writer, images)
    pause = threading.Event()
    for _ in range(ROUNDS):
        write_for(appliance, writer, 3000)
        for _ in range(2):
            pause.wait(rng.random() / 2)
            appliance.kill_child("replayer")
        writer.stop()
        settle(appliance, writer, images)
    check_images(appliance, images)
    appliance.stop()
