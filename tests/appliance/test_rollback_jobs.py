"""Rollbacks as jobs of the replayer's parent: interrupted, gone on with, undone, abandoned without the replayer."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.nbd import NbdClient
from tests.support.running import CDP, Appliance, wait_for

SIZE = 192 << 20
CHUNK = 4 << 20
pytestmark = pytest.mark.slow


@pytest.fixture
def appliance(tmp_path: Path) -> Iterator[Appliance]:
    """A whole volume written after a bookmark, so that a rollback takes a moment."""
    made = Appliance(tmp_path / "x", {"db": SIZE}, segment_size="16MiB")
    try:
        made.start("collector", "replayer")
        made.bookmark("empty")
        with NbdClient(made.socket("collector"), "db") as client:
            for offset in range(0, SIZE, CHUNK):
                client.write(offset, (offset // CHUNK + 1).to_bytes(1, "big") * CHUNK)
            client.flush()
        made.wait_protected()
        yield made
    finally:
        made.end()


def is_full(appliance: Appliance) -> bool:
    with NbdClient(appliance.socket("collector"), "db") as client:
        return all(
            client.read(at, CHUNK) == (at // CHUNK + 1).to_bytes(1, "big") * CHUNK for at in range(0, SIZE, CHUNK)
        )


def is_empty(appliance: Appliance) -> bool:
    with NbdClient(appliance.socket("collector"), "db") as client:
        return all(not any(client.read(at, CHUNK)) for at in range(0, SIZE, CHUNK))


def interrupted(appliance: Appliance) -> subprocess.Popen[str]:
    """`cdp rollback` whose replayer was stopped while it copied; the command still waits."""
    command = subprocess.Popen(
        [CDP, "--config", str(appliance.config), "rollback", "db", "--to", "empty", "--yes", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    file = appliance.folder / "state" / "replayer" / "rollbacks" / "1.json"
    wait_for(lambda: file.exists() and json.loads(file.read_text())["step"] == "copy", "the copy began")
    appliance.services.pop("replayer").stop()
    assert json.loads(file.read_text())["step"] == "copy"
    return command


def test_it_goes_on_by_itself_and_the_command_sees_its_end(appliance: Appliance) -> None:
    command = interrupted(appliance)
    assert appliance.look()["groups"][0]["state"] == "rolling_back"
    appliance.start("replayer")
    answer = json.loads(command.communicate(timeout=100)[0])
    assert command.returncode == 0 and answer["end"] is not None
    assert is_empty(appliance)
    appliance.cli("rollback", "db", "--to", answer["bookmark"], "--yes")
    assert is_full(appliance)


def test_abandoned_without_the_replayer(appliance: Appliance) -> None:
    command = interrupted(appliance)
    assert appliance.run("rollback", "db", "--undo").returncode == 5
    answer = appliance.json("rollback", "db", "--abandon")
    assert answer["direction"] == "abandon" and answer["end"] is not None
    with NbdClient(appliance.socket("collector"), "db") as client:
        client.write(0, b"in service again")
    appliance.start("replayer")
    command.communicate(timeout=100)
    appliance.cli("rollback", "db", "--to", answer["bookmark"], "--yes")
    assert is_full(appliance)


def test_undone(appliance: Appliance) -> None:
    command = interrupted(appliance)
    appliance.start("replayer")
    done = appliance.run("rollback", "db", "--undo")
    command.communicate(timeout=100)
    if done.returncode == 0:
        assert is_full(appliance)
    else:  # it had come to its end before it could be undone
        assert done.returncode in (3, 4) and is_empty(appliance)
