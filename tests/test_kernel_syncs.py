"""Syncs by the kernel's own threads: each ends once, with its own result, and never instead of a stand-in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdp import aio, storage

WAIT_SECONDS = 10


@pytest.fixture
def worker() -> Iterator[storage.Worker]:
    made = storage.Worker(2, "test")
    yield made
    made.close()


def ended(worker: storage.Worker, fds: list[int]) -> dict[int, BaseException | None]:
    """Syncs all of them; the error of each by its place in the list."""
    found: dict[int, BaseException | None] = {}

    def sync(place: int, fd: int) -> None:
        def done(_: object, error: BaseException | None) -> None:
            assert place not in found
            found[place] = error

        worker.sync(done, fd)

    for place, fd in enumerate(fds):
        sync(place, fd)
    while len(found) < len(fds):
        assert storage.wait_readable([worker.fileno()], WAIT_SECONDS)
        worker.drain()
    return found


def test_more_syncs_than_the_queue_holds_all_end(tmp_path: Path, worker: storage.Worker) -> None:
    with open(tmp_path / "file", "wb", buffering=0) as file:
        file.write(bytes(1 << 20))
        found = ended(worker, [file.fileno()] * (3 * aio.MAX_UNDER_WAY))
    assert set(found.values()) == {None}


def test_what_cannot_be_synced_is_an_error_of_that_sync_alone(tmp_path: Path, worker: storage.Worker) -> None:
    reading, writing = os.pipe()
    try:
        with open(tmp_path / "file", "wb", buffering=0) as file:
            file.write(b"x")
            found = ended(worker, [file.fileno(), reading, file.fileno()])
    finally:
        os.close(reading)
        os.close(writing)
    assert found[0] is None and found[2] is None
    assert isinstance(found[1], OSError)


def test_a_stand_in_is_what_is_called(tmp_path: Path, worker: storage.Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: int) -> None:
        raise OSError(5, "the disk failed")

    with open(tmp_path / "file", "wb", buffering=0) as file:
        assert ended(worker, [file.fileno()]) == {0: None}
        monkeypatch.setattr(storage, "fdatasync", broken)
        error = ended(worker, [file.fileno()])[0]
        assert isinstance(error, OSError) and error.errno == 5


def test_close_runs_what_was_under_way(tmp_path: Path) -> None:
    worker, results = storage.Worker(1, "test"), []
    with open(tmp_path / "file", "wb", buffering=0) as file:
        file.write(bytes(8 << 20))
        for _ in range(5):
            worker.sync(lambda _, error: results.append(error), file.fileno())
    worker.close()  # the file is closed already: the kernel holds it until its syncs have ended
    assert results == [None] * 5


def test_without_the_kernels_threads_its_own_do_it(
    tmp_path: Path, worker: storage.Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aio, "open_queue", lambda event: None)
    with open(tmp_path / "file", "wb", buffering=0) as file:
        assert ended(worker, [file.fileno()] * 3) == {0: None, 1: None, 2: None}
