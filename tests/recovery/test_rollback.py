"""Rollback over the real collector and replayer: what it proves, and a kill at every moment of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cdp.errors import RefusedError, UnreachableError
from cdp.nbd.client import Client
from cdp.recovery import job as jobs
from cdp.recovery.job import DONE, Job
from cdp.recovery.plan import Plan, Space, plan
from cdp.recovery.rollback import Progress, Rollback, Stopped
from tests.model.in_process import InProcessRig

MIB = 1 << 20
SIZE = 4 * MIB


class Killed(BaseException):
    """Stands for the end of the process that ran a job."""


class Doomed:
    """Carries commands until it is time to die, before or after one of them was carried."""

    def __init__(self, control: InProcessRig, moments: int) -> None:
        self._control, self._left = control, moments

    def moment(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise Killed

    def command(self, role: str, name: str, arguments: dict[str, Any], timeout_seconds: float = 30.0, /) -> Any:
        self.moment()
        answer = self._control.command(role, name, arguments, timeout_seconds)
        self.moment()
        return answer


class Scene:
    """A volume with a good past and a bad present."""

    def __init__(self, folder: Path, volumes: int = 1) -> None:
        self.names = ["db", "log"][:volumes]
        self.rig = InProcessRig(folder, dict.fromkeys(self.names, SIZE))
        self.job_file = str(folder / "job.json")
        self.good: dict[str, bytes] = {}
        self.bad: dict[str, bytes] = {}
        for name in self.names:
            with self.client(name) as client:
                client.write(MIB // 2 + 100, os.urandom(MIB))
                client.write(3 * MIB, os.urandom(5000))
                client.flush()
                self.good[name] = bytes(client.read(0, SIZE))
        self.good_seq = self.rig.bookmark("good")
        self.spoil()

    def spoil(self) -> None:
        for name in self.names:
            with self.client(name) as client:
                client.write(MIB, os.urandom(300_000))
                client.zero(MIB // 2, 200_000)
                client.write(3 * MIB + 77, b"x" * 40_000)  # some of it over what was never written
                client.flush()
                self.bad[name] = bytes(client.read(0, SIZE))

    def address(self, side: str) -> str:
        return f"unix:{self.rig.appliance.socket(side)}"

    def client(self, name: str) -> Client:
        return Client.connect(self.address("collector"), name)

    def now(self, name: str) -> bytes:
        with self.client(name) as client:
            return bytes(client.read(0, SIZE))

    def at(self, name: str) -> bytes:
        with Client.connect(self.address("replayer"), name) as client:
            return bytes(client.read(0, SIZE))

    def plan(self, expression: str = "good") -> Plan:
        return plan(self.rig, self.rig.GROUP, self.names, expression, None, time.time_ns())

    def rollback(self, job: Job | None = None, control: Any = None, **options: Any) -> Rollback:
        job = job or self.plan().job(disconnect=False)
        addresses = self.address("collector"), self.address("replayer")
        return Rollback(self.job_file, job, control or self.rig, *addresses, **options)

    def run(self, job: Job | None = None, act: Callable[[Rollback], Job] = Rollback.run, **options: Any) -> Job:
        made = self.rollback(job, **options)
        try:
            return act(made)
        finally:
            made.close()

    def killed_after(self, moments: int) -> bool:
        """Runs a new job that dies after so many moments; False if it came to its end before."""
        doomed = Doomed(self.rig, moments)
        try:
            self.run(control=doomed, progress=lambda _: doomed.moment())
        except Killed:
            return True
        return False

    def check_past(self, job: Job) -> None:
        """Promise 7: what was there before BEGIN, the newest state included, can still be opened."""
        assert job.begin is not None
        for name in self.names:
            assert self.at(f"{name}@seq:{job.begin['seq']}") == self.bad[name]
            assert self.at(f"{name}@{job.begin['bookmark']}") == self.bad[name]
            assert self.at(f"{name}@good") == self.good[name]
            assert self.rig.equal(name)


@pytest.fixture
def scene(tmp_path):
    made = Scene(tmp_path)
    yield made
    made.rig.close()


def test_back_and_forward_again(scene):
    """Promise 7: to the good point, every point still there, then to before the rollback: the newest state again."""
    seen: list[Progress] = []
    job = scene.run(progress=seen.append)
    assert scene.now("db") == scene.good["db"]
    scene.check_past(job)
    assert [p.step for p in seen if p.volume is None] == ["begin", "wait", "copy", "prove", "end", "unlock", "done"]
    assert max(p.done_bytes for p in seen) == job.bytes["db"] == seen[-4].total_bytes < SIZE
    answer = job.to_json()
    assert answer["bookmark"] == f"rollback-{job.begin['seq']}" and answer["end"]["seq"] == job.end["seq"]
    assert "secret" not in answer

    forward = scene.run(scene.plan(job.begin["bookmark"]).job(disconnect=False))
    assert scene.now("db") == scene.bad["db"]
    assert forward.step == DONE
    with pytest.raises(RefusedError, match="rollback"):
        scene.at(f"db@seq:{job.begin['seq'] + 1}")  # promise 8: nothing inside the copying is offered


def test_a_group_goes_back_together(tmp_path):
    scene = Scene(tmp_path, volumes=2)
    try:
        job = scene.run()
        for name in scene.names:
            assert scene.now(name) == scene.good[name]
        scene.check_past(job)
    finally:
        scene.rig.close()


def test_the_plan_says_what_will_happen(scene):
    made = scene.plan()
    assert made.target_seq == scene.good_seq
    assert 300_000 < made.total_bytes < MIB and made.total_extents >= 2
    assert made.to_json()["begin"] is None
    assert any("seq" in line for line in made.describe())
    made.check(Space(1 << 30, 1 << 30), disconnect=False)
    for space in (Space(made.total_bytes, None), Space(None, made.total_bytes)):
        with pytest.raises(RefusedError) as refused:
            made.check(space, disconnect=False)
        assert refused.value.code == "no_space"


def test_a_plan_carries_no_list_of_what_differs(scene, monkeypatch):
    """Promise 9: a volume with millions of scattered changes is rolled back too."""
    monkeypatch.setattr("cdp.recovery.diff.MAX_EXTENTS", 0)
    assert scene.plan().total_extents >= 2


def test_clients_are_not_cut_off_unasked(scene):
    with scene.client("db") as client:
        client.read(0, 1)
        busy = scene.plan()
        with pytest.raises(RefusedError) as refused:
            busy.check(Space(None, None), disconnect=False)
        assert refused.value.code == "busy"
        with pytest.raises(RefusedError) as refused:
            scene.run(busy.job(disconnect=False))
        assert refused.value.code == "busy"
        assert client.read(0, 1) == scene.bad["db"][:1]  # nothing happened
        assert not jobs.load(scene.job_file).active
        scene.run(busy.job(disconnect=True))
        with pytest.raises(OSError):
            client.read(0, 1)
    assert scene.now("db") == scene.good["db"]


def test_nobody_else_gets_in_while_it_runs(scene):
    def look(progress: Progress) -> None:
        if progress.step == "copy":
            with pytest.raises(RefusedError, match="rolled back"):
                scene.client("db")
            with pytest.raises(RefusedError, match="in use"):
                scene.rollback(jobs.load(scene.job_file))

    scene.run(progress=look)
    assert scene.now("db") == scene.good["db"]


# Every moment in the slow profile; in the fast one some of each step, the doubtful ones around BEGIN among them.
EVERY = pytest.param(range(1000), marks=pytest.mark.slow, id="every")
SOME = pytest.param([0, 9, *range(17, 23), *range(26, 1000, 4)], id="some")


@pytest.mark.parametrize("moments", [SOME, EVERY])
def test_killed_at_any_moment_it_goes_on(scene, moments):
    """Promise 7: the process dies before and after every command and step; the next one ends the work."""
    deaths = 0
    for moment in moments:
        if not scene.killed_after(moment):
            break
        job = scene.run(jobs.load(scene.job_file))
        assert job.step == DONE
        assert scene.now("db") == scene.good["db"], moment
        scene.check_past(job)
        scene.spoil()
        scene.rig.bookmark(f"spoilt-{moment}")
        deaths += 1
    assert deaths > 8
    assert scene.now("db") == scene.good["db"]


@pytest.mark.parametrize("moments", [SOME, EVERY])
def test_killed_at_any_moment_it_can_be_undone(scene, moments):
    """Promise 7: what was there at BEGIN is back."""
    deaths = 0
    for moment in moments:
        assert scene.killed_after(moment)
        job = jobs.load(scene.job_file)
        try:
            job = scene.run(job, act=Rollback.undo)
        except RefusedError as e:
            assert job.step in ("end", "unlock", "done") and "over" in e.message
            break
        assert scene.now("db") == scene.bad["db"], moment
        if job.begin is not None:
            scene.check_past(job)
        deaths += 1
    assert deaths > 5


def test_an_undo_that_is_killed_goes_on_too(scene):
    assert scene.killed_after(24)
    for moments in range(0, 24, 3):
        doomed = Doomed(scene.rig, moments)
        try:
            job = scene.run(jobs.load(scene.job_file), Rollback.undo, control=doomed)
        except Killed:
            continue
        break
    else:
        job = scene.run(jobs.load(scene.job_file), Rollback.undo)
    assert scene.now("db") == scene.bad["db"]
    scene.check_past(job)


def test_abandoned_without_the_replayer(scene):
    """The replayer cannot be reached: the volumes are unlocked as they are; from END on there are points again."""

    def stop_at_copy(progress: Progress) -> None:
        if progress.step == "copy" and progress.volume:
            raise Killed

    with pytest.raises(Killed):
        scene.run(progress=stop_at_copy)

    class NoReplayer:
        def command(self, role: str, name: str, arguments: dict[str, Any], timeout: float = 30.0, /) -> Any:
            if role == "replayer":
                raise UnreachableError("The replayer cannot be reached.")
            return scene.rig.command(role, name, arguments, timeout)

    with pytest.raises(UnreachableError, match="--abandon"):
        scene.run(jobs.load(scene.job_file), control=NoReplayer(), patience_seconds=0.0)
    job = scene.run(jobs.load(scene.job_file), Rollback.abandon, control=NoReplayer())
    assert job.step == DONE and job.end is not None
    with scene.client("db") as client:
        client.write(0, b"production goes on")
    scene.rig.bookmark("after")
    assert scene.at("db@after") == scene.now("db")
    scene.check_past(job)


def test_a_restart_of_either_process_is_waited_for(scene):
    restarted: list[str] = []

    def restart(progress: Progress) -> None:
        if progress.step in ("copy", "prove") and progress.volume and progress.step not in restarted:
            restarted.append(progress.step)
            scene.rig.restart("collector" if progress.step == "copy" else "replayer")

    job = scene.run(progress=restart)
    assert restarted == ["copy", "prove"]
    assert scene.now("db") == scene.good["db"]
    scene.check_past(job)


def test_a_stop_leaves_the_job_to_the_next_process(scene):
    made = scene.rollback()
    made.stop()
    with pytest.raises(Stopped):
        made.run()
    made.close()
    scene.run(jobs.load(scene.job_file))
    assert scene.now("db") == scene.good["db"]


def test_a_large_sparse_volume_goes_back_by_what_changed(tmp_path):
    """A TiB with three changes of a few KiB: a pass over the volume would not end within the test's time."""
    rig = InProcessRig(tmp_path, {"db": 1 << 40})
    try:
        addresses = [f"unix:{rig.appliance.socket(side)}" for side in ("collector", "replayer")]
        places = [5000, (1 << 39) + 12345, (1 << 40) - 9000]
        with Client.connect(addresses[0], "db") as client:
            for place in places:
                client.write(place, b"good" * 2000)
            rig.bookmark("good")
            for place in places:
                client.write(place, b"evil" * 2000)
            client.write(1 << 38, b"where nothing was")
        made = plan(rig, rig.GROUP, ["db"], "good", None, time.time_ns())
        rollback = Rollback(str(tmp_path / "job.json"), made.job(disconnect=True), rig, *addresses)
        job = rollback.run()
        rollback.close()
        assert job.extents["db"] == 4 and job.bytes["db"] < 64 << 10
        with Client.connect(addresses[0], "db") as client:
            assert all(client.read(place, 8000) == b"good" * 2000 for place in places)
            assert client.read(1 << 38, 4096) == bytes(4096)
    finally:
        rig.close()


def test_a_job_file_of_another_hand_is_refused(tmp_path):
    from cdp.errors import StorageError

    path = tmp_path / "job.json"
    for content in (b"", b"[]", b"{}", b"\xff", b'{"group": 1}'):
        path.write_bytes(content)
        with pytest.raises(StorageError):
            jobs.load(str(path))
