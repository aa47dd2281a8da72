"""A primary on a file system that is too small: refused writes reach client, primary, replica and points alike."""

from __future__ import annotations

import contextlib
import errno
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.book import difference
from tests.support.disk import small_disk
from tests.support.nbd import NbdClient, NbdRefused
from tests.support.running import Appliance, running

VOLUME = "db"
SIZE = 16 << 20
DISK_BYTES = 4 << 20  # a quarter of the volume, so that writes are soon refused
WRITES = 120
LENGTH_MAX = 200_000


@pytest.fixture
def full_disk() -> Iterator[Path]:
    """In a folder whose path is short enough for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="cdp-full-"))
    try:
        with small_disk(folder / "disk", DISK_BYTES) as disk:
            yield disk
    finally:
        shutil.rmtree(folder)


def write_until_full(client: NbdClient) -> tuple[list[bytes], int]:
    """Random writes; the content after each as the primary itself reads it, and how many were refused."""
    rng, refused = random.Random(5), 0
    states = [bytes(SIZE)]
    for _ in range(WRITES):
        offset = rng.randrange(SIZE - LENGTH_MAX)
        data = rng.randbytes(rng.randrange(1, LENGTH_MAX))
        try:
            client.write(offset, data)
            now = data
        except OSError as e:
            assert e.errno == errno.ENOSPC
            refused += 1
            now = client.read(offset, len(data))  # whatever was done of it
        states.append(states[-1][:offset] + now + states[-1][offset + len(data) :])
    return states, refused


def read_point(appliance: Appliance, seq: int) -> bytes | None:
    with contextlib.suppress(NbdRefused), NbdClient(appliance.socket("replayer"), f"{VOLUME}@seq:{seq}") as client:
        return client.read_all()
    return None


def test_refused_writes_are_told_and_agreed_on(full_disk: Path) -> None:
    """Promise 2: ENOSPC to the client; primary, replica and every offered point agree on what is there."""
    with running(full_disk.parent, {VOLUME: SIZE}, disk=full_disk) as appliance:
        appliance.wait_protected()
        first = appliance.bookmark("first")
        with NbdClient(appliance.socket("collector"), VOLUME) as client:
            states, refused = write_until_full(client)
            assert 0 < refused < WRITES
            assert client.read_all() == states[-1]
        appliance.wait_protected()  # the gap of what was refused has ended
        last = appliance.bookmark("last")
        assert appliance.json("verify", VOLUME, expect=(0, 1))["equal"] is True
        found = read_point(appliance, last)
        assert found is not None
        same = found == states[-1]
        assert same, difference(f"{VOLUME}@last", found, states[-1])
        check_points(appliance, first, last, states, refused)


def check_points(appliance: Appliance, first: int, last: int, states: list[bytes], refused: int) -> None:
    """Every seq between is refused, or a state of the primary, in the primary's order."""
    at, withheld = 0, 0
    for seq in range(first, last + 1):
        found = read_point(appliance, seq)
        if found is None:
            withheld += 1
            continue
        at = next((i for i in range(at, len(states)) if states[i] == found), -1)
        assert at >= 0, f"{VOLUME}@seq:{seq} is no state that the primary had"
    assert withheld >= refused, "the record of a refused write is offered as a point"
