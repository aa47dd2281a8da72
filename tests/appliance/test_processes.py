"""The processes: start, `ready`, kills at every level, clean stops, what happens when they cannot start."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.nbd import NbdClient
from tests.support.running import CDP, Appliance, Service, wait_for

SIZE = 4 << 20


@pytest.fixture
def appliance(tmp_path: Path) -> Iterator[Appliance]:
    made = Appliance(tmp_path / "x", {"db": SIZE})
    made.write_config()
    try:
        yield made
    finally:
        made.end()


def running_in(folder: Path) -> list[int]:
    """Pids of processes that name this folder in their command line or hold a file in it open."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_text()
            held = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if int(pid) != os.getpid() and (str(folder) in command or any(h.startswith(str(folder)) for h in held)):
            found.append(int(pid))
    return found


def write(appliance: Appliance, offset: int, data: bytes) -> None:
    with NbdClient(appliance.socket("collector"), "db") as client:
        client.write(offset, data)
        client.flush()


def test_up_says_where_it_listens_and_stops_without_orphans(appliance: Appliance) -> None:
    appliance.start("up")
    service = appliance.services["up"]
    assert service.lines[-1] == "ready" and service.lines.count("ready") == 1
    for side in ("collector", "replayer"):
        assert any(line.startswith(f"{side}: ") and str(appliance.socket(side)) in line for line in service.lines)
    assert service.stop() == 0
    assert running_in(appliance.folder) == []
    assert appliance.run("status").returncode == 5


@pytest.mark.slow
def test_ctrl_c_stops_cleanly_too(appliance: Appliance) -> None:
    appliance.start("up")
    process = appliance.services["up"].process
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert running_in(appliance.folder) == []


def test_each_side_alone(appliance: Appliance) -> None:
    """A process that cannot be reached has null figures, and nothing is healthy then."""
    appliance.start("collector")
    assert appliance.services["collector"].lines[-1] == "ready"
    write(appliance, 0, b"x" * 4096)
    status = appliance.json("status", expect=(1,))
    group = status["groups"][0]
    assert status["healthy"] is False and status["processes"]["replayer"] is None
    assert group["replay"]["applied_seq"] is None and group["journal"]["last_seq"] > 0
    assert appliance.run("points", "db").returncode == 5
    appliance.start("replayer")
    appliance.wait_protected()
    assert appliance.services.pop("collector").stop() == 0
    status = appliance.json("status", expect=(1,))
    assert status["groups"][0]["journal"]["last_seq"] is None
    assert status["groups"][0]["replay"]["applied_seq"] > 0
    assert appliance.run("bookmark", "shop", "x").returncode == 5
    assert appliance.services.pop("replayer").stop() == 0


@pytest.mark.parametrize("side", [pytest.param("collector", marks=pytest.mark.slow), "replayer"])
def test_a_killed_child_comes_back_and_nothing_is_lost(appliance: Appliance, side: str) -> None:
    appliance.start("up")
    write(appliance, 0, b"before" * 100)
    appliance.kill_child(side)
    wait_for(lambda: appliance.look().get("healthy"), "healthy again")
    write(appliance, 4096, b"after" * 100)
    assert appliance.json("verify", "db")["equal"] is True
    with NbdClient(appliance.socket("replayer"), "db") as client:
        assert client.read(0, 6) == b"before" and client.read(4096, 5) == b"after"
    appliance.stop()


@pytest.mark.slow
def test_a_killed_parent_takes_its_child_along_and_up_brings_both_back(appliance: Appliance) -> None:
    appliance.start("up")
    child = appliance.child("collector")
    parent = int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(parent, signal.SIGKILL)
    wait_for(lambda: not Path(f"/proc/{child}").exists(), "the child ended with its parent", 5)
    wait_for(lambda: appliance.look().get("healthy"), "both are back")
    assert appliance.child("collector") != child
    appliance.stop()


def test_a_killed_up_leaves_no_orphan_and_the_next_start_recovers(appliance: Appliance) -> None:
    appliance.start("up")
    write(appliance, 0, b"kept" * 1024)
    appliance.services.pop("up").kill()
    wait_for(lambda: not running_in(appliance.folder), "everything ended with it", 5)
    appliance.start("up")
    appliance.wait_protected()
    with NbdClient(appliance.socket("collector"), "db") as client:
        assert client.read(0, 4) == b"kept"
    appliance.stop()


def test_what_keeps_it_from_starting_is_one_sentence(appliance: Appliance) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        text = appliance.config.read_text().replace('collector.sock"]', f'collector.sock", "tcp:127.0.0.1:{port}"]')
        appliance.config.write_text(text)
        for command in ("collector", "up"):
            done = appliance.run(command, timeout=40)
            assert done.returncode == 4 and str(port) in done.stderr and "Traceback" not in done.stderr
    assert running_in(appliance.folder) == []


@pytest.mark.slow
def test_a_second_one_waits_for_the_lock_and_is_refused(appliance: Appliance) -> None:
    appliance.start("up")
    done = appliance.run("collector", timeout=40)
    assert done.returncode == 4 and "in use" in done.stderr
    appliance.stop()


@pytest.mark.slow
def test_a_start_waits_for_one_that_is_stopping(appliance: Appliance) -> None:
    appliance.start("collector")
    first = appliance.services["collector"]
    second = Service(appliance.config, "collector", appliance.folder / "second.log")
    assert first.stop() == 0
    appliance.services["collector"] = second
    second.wait_ready()
    appliance.stop()


@pytest.mark.slow
def test_check_leaves_a_replica_that_stands_alone(appliance: Appliance) -> None:
    appliance.start("up")
    write(appliance, 8192, b"replicated" * 400)
    seq = appliance.bookmark("last")
    wait_for(lambda: appliance.look()["groups"][0]["consumers"]["replayer"] >= seq, "it is committed")
    appliance.services.pop("up").kill()
    wait_for(lambda: not running_in(appliance.folder), "everything ended", 5)
    (group,) = json.loads(appliance.cli("check", "--json"))["groups"].values()
    assert group["seq"] >= seq and Path(group["replicas"]["db"]).stat().st_size == SIZE
    assert "db" in appliance.cli("check")


def test_a_state_folder_that_cannot_be_made(tmp_path: Path) -> None:
    blocked = Appliance(tmp_path / "x", {"db": SIZE})
    blocked.write_config()
    (blocked.folder / "state").write_text("a file")
    done = blocked.run("collector")
    assert done.returncode == 6 and "state_dir" in done.stderr


@pytest.mark.slow
def test_memory_of_the_idle_processes(appliance: Appliance) -> None:
    """Promise 9, its idle part: each child with its parent, in PSS."""
    appliance.start("up")
    appliance.wait_protected()
    for side, limit_mib in (("collector", 120), ("replayer", 400)):
        child = appliance.child(side)
        parent = int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[1])
        total = 0
        for pid in (child, parent):
            line = next(x for x in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() if x.startswith("Pss:"))
            total += int(line.split()[1]) >> 10
        assert total < limit_mib
    appliance.stop()


@pytest.mark.slow
def test_resync_is_the_way_out_of_a_hole(appliance: Appliance) -> None:
    """The replayer was forgotten while it was away: it stops with a reason, and begins anew where it is told."""
    text = appliance.config.read_text().replace('segment_size = "4MiB"', 'segment_size = "1MiB"')
    appliance.config.write_text(text)
    appliance.start("collector", "replayer")
    write(appliance, 0, b"x" * 4096)
    appliance.bookmark("lost")
    appliance.services.pop("replayer").stop()
    appliance.cli("consumer", "remove", "shop", "replayer")

    def journal_moved_on() -> bool:
        write(appliance, 0, os.urandom(2 << 20))
        return appliance.look()["groups"][0]["journal"]["first_seq"] > 20

    wait_for(journal_moved_on, "what the replayer needs is gone")
    appliance.start("replayer")
    found = wait_for(lambda: appliance.look()["groups"][0].get("reason"), "a reason")
    assert found["code"] == "hole"
    appliance.cli("resync", "db")
    appliance.wait_protected()
    assert appliance.json("verify", "db")["equal"] is True
    assert appliance.run("diff", "db@lost", "db@now").returncode in (3, 4)
    appliance.stop()


def test_init_and_up_for_anyone(tmp_path: Path) -> None:
    folder = tmp_path / "lab"
    folder.mkdir()
    made = subprocess.run([CDP, "init"], cwd=folder, capture_output=True, text=True, check=True)
    assert "cdp.toml" in made.stdout
    again = subprocess.run([CDP, "init"], cwd=folder, capture_output=True, text=True, check=False)
    assert again.returncode == 4 and again.stderr.startswith("cdp: ")
    shown = subprocess.run([CDP, "config"], cwd=folder, capture_output=True, text=True, check=True).stdout
    assert f'state_dir = "{folder}/cdp-state"' in shown and "10809" in shown
