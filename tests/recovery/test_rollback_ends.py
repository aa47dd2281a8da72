"""Rollbacks near their end, and those that cannot get there."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest

from cdp.errors import RefusedError, UnreachableError
from cdp.journal.reader import EmbeddedReader
from cdp.recovery import job as jobs
from cdp.recovery.copying import Copier
from cdp.recovery.job import COPY, DONE, END, PROVE, UNDO, UNLOCK
from cdp.recovery.rollback import Progress, Rollback
from tests.model.in_process import InProcessRig
from tests.recovery.test_rollback import SIZE, Killed, Scene
from tests.support.running import wait_for


@pytest.fixture
def scene(tmp_path):
    made = Scene(tmp_path)
    yield made
    made.rig.close()


@pytest.mark.parametrize("act", [Rollback.undo, Rollback.abandon])
@pytest.mark.parametrize("step", [END, UNLOCK])
def test_one_that_is_proven_is_ended_by_whoever_comes_too_late_to_undo_it(scene, step, act):
    """Promise 7: the run that would have ended it was stopped for the undo, so nobody else is left to unlock."""

    def die(progress: Progress) -> None:
        if progress.step == step:
            raise Killed

    with pytest.raises(Killed):
        scene.run(progress=die)
    assert jobs.load(scene.job_file).step == step
    with pytest.raises(RefusedError, match="over") as refused:
        scene.run(jobs.load(scene.job_file), act=act)
    assert "rollback-" in refused.value.hint
    assert jobs.load(scene.job_file).step == DONE
    assert scene.now("db") == scene.good["db"]


def test_copying_the_same_again_and_again_is_no_progress(scene, monkeypatch):
    """Promise 9: each attempt takes journal and history; one that never gets further must end."""
    attempts = []

    def copy(
        self: Copier, start: int, checkpoint_bytes: int, on_bytes: Callable[[int], None], on_written: object
    ) -> Iterator[int]:
        attempts.append(start)
        for done in range(0, 1 << 20, 1 << 16):
            on_bytes(done)
        raise OSError(errno.ENOSPC, "the primary is full")
        yield

    with monkeypatch.context() as patched:
        patched.setattr(Copier, "copy", copy)
        with pytest.raises(UnreachableError, match="is full"):
            scene.run(patience_seconds=1.5)
    assert 2 <= len(attempts) <= 5
    scene.run(jobs.load(scene.job_file))
    assert scene.now("db") == scene.good["db"]


def test_what_was_proven_while_it_was_copied_is_proven_again_after_an_error(scene, monkeypatch):
    """Whoever was away may have lost what was written: only an undisturbed run need not compare twice."""
    stops: list[int | None] = []
    compare = Copier.compare

    def spy(self: Copier, on_bytes: Callable[[int], None], stop: int | None = None) -> list[tuple[int, int]]:
        stops.append(stop)
        return compare(self, on_bytes, stop)

    def command(role: str, name: str, arguments: dict[str, Any], timeout_seconds: float = 30.0, /) -> Any:
        if name == "verify_result" and len(stops) == 1:
            raise UnreachableError("the replayer is away for a moment")
        return scene.rig.command(role, name, arguments, timeout_seconds)

    monkeypatch.setattr(Copier, "compare", spy)
    scene.run(control=SimpleNamespace(command=command))
    assert stops == [0, SIZE]
    assert scene.now("db") == scene.good["db"]


def test_a_job_is_as_the_process_before_left_it(scene):
    """Who waits for the file must not go on from where the job was when it began to wait."""
    first = scene.rollback()
    waited: list[Rollback] = []
    addresses = scene.address("collector"), scene.address("replayer")
    opening = Thread(
        target=lambda: waited.append(Rollback(scene.job_file, None, scene.rig, *addresses, lock_seconds=30.0))
    )
    opening.start()
    first.run()
    first.close()
    opening.join()
    with scene.client("db") as client:
        client.write(0, b"production goes on")
    assert waited[0].run().step == DONE
    waited[0].close()
    assert scene.now("db")[:18] == b"production goes on"


class DiesAfter:
    """Carries commands until one of that name was carried."""

    def __init__(self, scene: Scene, name: str) -> None:
        self._scene, self._name = scene, name

    def command(self, role: str, name: str, arguments: dict[str, Any], timeout_seconds: float = 30.0, /) -> Any:
        answer = self._scene.rig.command(role, name, arguments, timeout_seconds)
        if name == self._name:
            raise Killed
        return answer


def test_one_that_is_refused_after_a_kill_leaves_no_volume_locked(scene):
    """The lock was taken, the file does not say so yet, and the point left the window before the next run."""
    with pytest.raises(Killed):
        scene.run(control=DiesAfter(scene, "lock"))
    job = jobs.load(scene.job_file)
    assert job.step == jobs.LOCK
    with pytest.raises(RefusedError, match="locked|rolled back"):
        scene.client("db")
    job.target_seq = 0
    with pytest.raises(RefusedError, match="window"):
        scene.run(job)
    assert jobs.load(scene.job_file).step == DONE
    assert scene.now("db") == scene.bad["db"]


def test_an_undo_that_goes_on_waits_for_all_that_was_written(scene, monkeypatch):
    """After a power cut the replayer is back at BEGIN: what it has not replayed again is not in its difference yet."""
    follows, read = Event(), EmbeddedReader.read
    follows.set()
    monkeypatch.setattr(EmbeddedReader, "read", lambda self, size: read(self, size) if follows.is_set() else [])

    def lag(progress: Progress) -> None:
        if progress.step == COPY:
            follows.clear()
        elif progress.step == PROVE:
            raise Killed

    with pytest.raises(Killed):
        scene.run(progress=lag)
    job = jobs.load(scene.job_file)
    job.direction, job.step, job.copied_to = UNDO, COPY, {}  # as an undo that was killed leaves it

    def command(role: str, name: str, arguments: dict[str, Any], timeout_seconds: float = 30.0, /) -> Any:
        if name == "wait" and arguments["seq"] > job.begin["seq"]:
            follows.set()
        return scene.rig.command(role, name, arguments, timeout_seconds)

    try:
        scene.run(job, control=SimpleNamespace(command=command))
    finally:
        follows.set()
    assert scene.now("db") == scene.bad["db"]


@pytest.mark.parametrize("last", ["pin", "rollback_begin"])
def test_one_that_died_at_its_begin_is_abandoned_without_the_replayer(scene, last):
    """Whether BEGIN is in the journal already or not, nobody but the collector is needed."""
    with pytest.raises(Killed):
        scene.run(control=DiesAfter(scene, last))
    job = jobs.load(scene.job_file)
    assert job.step == jobs.BEGIN and job.begin is None

    def command(role: str, name: str, arguments: dict[str, Any], timeout_seconds: float = 30.0, /) -> Any:
        if role == "replayer":
            raise UnreachableError("The replayer cannot be reached.")
        return scene.rig.command(role, name, arguments, timeout_seconds)

    job = scene.run(job, Rollback.abandon, control=SimpleNamespace(command=command))
    assert job.step == DONE and job.begin is not None and job.end is not None
    assert scene.now("db") == scene.bad["db"]
    scene.rig.bookmark("after")
    scene.check_past(job)


def test_what_a_killed_run_had_pinned_is_let_go_at_the_end(scene):
    """Promise 9: the replayer's process lives on, and a pin that nobody knows of would hold its history for ever."""

    def die(progress: Progress) -> None:
        if progress.step == COPY and progress.volume:
            raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            scene.run(jobs.load(scene.job_file) if os.path.exists(scene.job_file) else None, progress=die)
    scene.run(jobs.load(scene.job_file))
    pins = scene.rig.services["replayer"].service._groups[scene.rig.GROUP].pins
    wait_for(lambda: not pins.seqs(), "nothing is pinned")  # the connections' own go when the server notices


def test_what_is_not_replayed_yet_proves_nothing(scene):
    """Promise 8: a replayer that was killed after it was waited for has forgotten what it had found."""
    taken = scene.rig.command("collector", "verify", {"volume": "db"})
    asked = {"volume": "db", "first_seq": taken["first_seq"], "last_seq": taken["last_seq"] + 1000}
    with pytest.raises(UnreachableError, match="not applied"):
        scene.rig.command("replayer", "verify_result", asked)
    assert scene.rig.equal("db")


def test_the_flushes_of_a_copy_hide_no_barrier_of_a_guest(scene):
    """A list of a few barriers after a rollback that flushed more often than that."""
    job = scene.run()
    listed = scene.rig.command("replayer", "points", {"name": "db", "limit": 1})
    assert [point["seq"] < job.begin["seq"] for point in listed["barriers"]] == [True]


def test_a_disk_that_is_full_at_its_start_is_waited_for(scene, monkeypatch):
    """As at any later step: what may pass ends nobody's rollback."""
    save, failures = jobs.save, [True, True]

    def soon(path: str, job: jobs.Job) -> None:
        if failures:
            failures.pop()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(path, job)

    monkeypatch.setattr(jobs, "save", soon)
    scene.run()
    assert not failures and scene.now("db") == scene.good["db"]


def test_a_disk_with_data_has_no_point_from_before_it_was_protected(tmp_path):
    """Promise 8: at the record that names it the replica is empty, which the disk never was."""
    content = os.urandom(SIZE)
    (tmp_path / "db.raw").write_bytes(content)
    rig = InProcessRig(tmp_path, {"db": SIZE})
    try:
        end = rig.bookmark("whole")
        points = [rig.read("db", seq) for seq in range(1, end + 1)]
        assert points[-1] == content and set(points) == {content, None}
    finally:
        rig.close()
