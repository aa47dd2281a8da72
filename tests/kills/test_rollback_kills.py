"""A rollback that is killed at any moment goes on by itself, and what it replaced stays reachable."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.book import difference
from tests.support.nbd import NbdClient
from tests.support.running import CDP, Appliance, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SIZE = 64 << 20
VOLUME = "db"
PIECE = 1 << 20


@pytest.fixture
def appliance() -> Iterator[Appliance]:
    folder = Path(tempfile.mkdtemp(prefix="cdp-rbkill-"))
    appliance = Appliance(folder, {VOLUME: SIZE})
    try:
        appliance.start()
        appliance.wait_protected()
        yield appliance
    finally:
        appliance.end()
        shutil.rmtree(folder, ignore_errors=True)


def overwrite(appliance: Appliance, seed: int) -> bytes:
    """The whole volume anew; its content."""
    rng = random.Random(seed)
    pieces = [rng.randbytes(PIECE) for _ in range(SIZE // PIECE)]
    with NbdClient(appliance.socket("collector"), VOLUME) as client:
        for number, piece in enumerate(pieces):
            client.write(number * PIECE, piece)
        client.flush()
    return b"".join(pieces)


def read(appliance: Appliance, side: str, export: str) -> bytes:
    with NbdClient(appliance.socket(side), export) as client:
        return client.read_all()


def group_state(appliance: Appliance) -> str | None:
    state = appliance.look()["groups"][0]["state"]
    return None if state is None else str(state)


@pytest.mark.parametrize("victim", ["cli", "collector", "replayer", "rollback"])
@pytest.mark.parametrize("moment_ms", [0, 300])
def test_killed_rollback_ends_well(appliance: Appliance, victim: str, moment_ms: int) -> None:
    """Promise 7: interrupted it resumes; the target is there, and so is the state that it replaced."""
    target = overwrite(appliance, 1)
    appliance.bookmark("target")
    newest = overwrite(appliance, 2)
    appliance.bookmark("newest")
    command = subprocess.Popen(
        [CDP, "--config", str(appliance.config), "rollback", VOLUME, "--to", "target", "--yes"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    wait_for(lambda: group_state(appliance) == "rolling_back" or command.poll() is not None, "rolling back")
    threading.Event().wait(moment_ms / 1000)
    kill(appliance, victim, command)
    output, _ = command.communicate(timeout=120)
    wait_for(lambda: group_state(appliance) == "protected", f"protected again; {output!r}", 120)
    found = read(appliance, "collector", VOLUME)
    # Two steps: pytest must not try to explain megabytes.
    same = found == target
    assert same, difference("the volume after the rollback", found, target)
    for name, expected in (("target", target), ("newest", newest)):
        found = read(appliance, "replayer", f"{VOLUME}@{name}")
        same = found == expected
        assert same, difference(f"{VOLUME}@{name}", found, expected)
    assert appliance.json("verify", VOLUME, expect=(0, 1))["equal"] is True


def kill(appliance: Appliance, victim: str, command: subprocess.Popen[bytes]) -> None:
    if victim == "cli":
        command.kill()
    elif victim == "rollback":
        for pid in rollback_pids(appliance):
            os.kill(pid, signal.SIGKILL)
    else:
        appliance.kill_child(victim)


def rollback_pids(appliance: Appliance) -> list[int]:
    """The processes that carry out rollbacks below the appliance that this test started; none if they are done."""
    mine, found = {service.process.pid for service in appliance.services.values()}, []
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                parents[int(entry.name)] = int(fields[1])
                if b"rollback_child" in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue

    def below(pid: int) -> bool:
        while pid and pid not in mine:
            pid = parents.get(pid, 0)
        return bool(pid)

    return [pid for pid in found if below(pid)]
