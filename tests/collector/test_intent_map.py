"""The write-intent map by itself: its file in every torn state, and which bits are set and cleared when."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cdp import storage
from cdp.collector.intent import AHEAD_REGIONS, IDLE_TURNS, IntentMap
from cdp.collector.intent_file import MAX_REGIONS, SLOT_BYTES, IntentFile, regions_of, shift_of

MIB, TIB = 1 << 20, 1 << 40
SIZE = 300 * MIB + 512
Make = Callable[..., IntentMap]


@pytest.fixture
def worker() -> Iterator[storage.Worker]:
    made = storage.Worker(1, "test")
    yield made
    made.close()


@pytest.fixture
def make(tmp_path: Path, worker: storage.Worker) -> Make:
    def made(size: int = SIZE, is_new: bool = False) -> IntentMap:
        return IntentMap(str(tmp_path / "map"), size, worker, is_new)

    return made


def finish(worker: storage.Worker, until: Callable[[], object]) -> None:
    while not until():
        assert storage.wait_readable([worker.fileno()], 10)
        worker.drain()


def set_now(found: IntentMap, worker: storage.Worker, *ranges: tuple[int, int]) -> None:
    done: list[BaseException | None] = []
    found.want(found.missing(ranges), done.append)
    finish(worker, lambda: done)
    assert done == [None] and not found.missing(ranges)


@pytest.mark.parametrize("size", [4096, MIB, SIZE, 16 << 30, TIB, 1 << 52])
def test_regions_cover_the_volume(size: int) -> None:
    """Promise 9: at most 16 Ki regions, whatever the size."""
    shift = shift_of(size)
    assert shift >= 20 and regions_of(size, shift) <= MAX_REGIONS
    assert regions_of(size, shift) << shift >= size > (regions_of(size, shift) - 1) << shift


def test_what_was_set_is_found_again(make: Make, worker: storage.Worker) -> None:
    found = make(is_new=True)
    assert found.known and found.touched() == []
    set_now(found, worker, (5 * MIB + 3, 10), (7 * MIB - 1, 2), (300 * MIB, 512))
    found.close()
    again = make()
    assert again.known
    assert again.touched() == [(5 * MIB, 3 * MIB), (300 * MIB, 512)]
    again.close()


def test_a_map_that_is_missing_or_of_another_size_says_nothing(make: Make, tmp_path: Path) -> None:
    """Promise 2: all of it may have been written."""
    found = make()
    assert not found.known and found.touched() == [(0, SIZE)]
    found.close()
    again = make()  # also when the process that made it ended at once
    assert again.known and again.touched() == [(0, SIZE)]
    again.close()
    grown = make(2 * SIZE)
    assert not grown.known and grown.touched() == [(0, 2 * SIZE)]
    grown.close()


def test_a_power_cut_at_any_byte_of_a_slot_loses_no_bit_in_use(tmp_path: Path) -> None:
    """Promise 2: a torn slot costs only bits whose writes had not begun."""
    rng, path = random.Random(7), tmp_path / "map"
    file = IntentFile(str(path), SIZE, True)
    marks = bytearray(file.bits)
    for _ in range(40):
        before = path.read_bytes()
        used = bytes(marks)
        marks[rng.randrange(len(marks))] = 1
        slot, at = file.encode(marks)
        cut = rng.randrange(SLOT_BYTES)
        torn = bytearray(before)
        torn[at : at + cut] = slot[:cut]
        path.write_bytes(torn)
        after = IntentFile(str(path), SIZE, False)
        assert after.known and all(after.bits[i] for i, mark in enumerate(used) if mark)
        after.close()
        path.write_bytes(before)
        file.put((slot, at))
    file.close()


def test_a_damaged_map_is_no_map(make: Make, tmp_path: Path) -> None:
    make(is_new=True).close()
    path = tmp_path / "map"
    raw = bytearray(path.read_bytes())
    for at in (40, SLOT_BYTES + 40):
        raw[at] ^= 1
    path.write_bytes(raw)
    found = make()
    assert not found.known and found.touched() == [(0, SIZE)]
    found.close()


def test_one_sync_serves_all_who_wait(make: Make, worker: storage.Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs = []
    real = storage.fdatasync
    monkeypatch.setattr(storage, "fdatasync", lambda fd: (syncs.append(fd), real(fd)))
    found, done = make(is_new=True), []
    for region in range(0, 200, 2):
        found.want(found.missing([(region * MIB, 1)]), done.append)
    assert not done
    finish(worker, lambda: len(done) == 100)
    assert len(syncs) == 2  # the first, and one for all that came meanwhile
    found.close()


def test_a_stream_pays_for_many_regions_at_once(make: Make, worker: storage.Worker) -> None:
    found = make(is_new=True)
    set_now(found, worker, (0, MIB))
    set_now(found, worker, (MIB, MIB))
    assert not found.missing([(MIB, AHEAD_REGIONS * MIB)])
    assert found.missing([((1 + AHEAD_REGIONS) * MIB, 1)])
    found.close()


def test_a_bit_is_cleared_only_behind_a_checkpoint_and_after_a_while(make: Make, worker: storage.Worker) -> None:
    """Promise 2: never one whose last write the checkpoint does not cover."""
    found = make(is_new=True)
    set_now(found, worker, (0, MIB), (100 * MIB, MIB))
    for turn in range(3 * IDLE_TURNS):
        assert not found.missing([(100 * MIB, 1)])  # written in each turn
        found.end_turn(10 * turn)
        found.checkpointed(10 * turn - 10 if turn < 2 * IDLE_TURNS else 0)
        finish(worker, lambda: not found._syncing)
    assert found.touched() == [(100 * MIB, MIB)]
    for turn in range(2 * IDLE_TURNS):  # checkpoints that are not durable clear nothing
        found.end_turn(10_000 + turn)
        found.checkpointed(9_999)
        finish(worker, lambda: not found._syncing)
    assert found.touched() == [(100 * MIB, MIB)]
    found.checkpointed(20_000)
    finish(worker, lambda: not found._syncing)
    assert found.touched() == []
    found.close()
    assert make().touched() == []


def test_turns_go_on_for_ever(make: Make, worker: storage.Worker) -> None:
    """Marks are bytes: an old one stays old, a new one new, when the count of turns is moved back."""
    found = make(is_new=True)
    set_now(found, worker, (0, MIB), (50 * MIB, MIB))
    for turn in range(1000):
        found.end_turn(turn)
        assert not found.missing([(50 * MIB, 1)])
    assert 0 < found.marks[0] < found.turn == found.marks[50]
    found.close()


def test_a_map_that_cannot_be_written_says_so(
    make: Make, worker: storage.Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, done = make(is_new=True), []

    def fails(fd: int) -> None:
        raise OSError(5, "the disk failed")

    with monkeypatch.context() as broken:
        broken.setattr(storage, "fdatasync", fails)
        found.want(found.missing([(0, 1)]), done.append)
        finish(worker, lambda: done)
        assert isinstance(done[0], OSError) and found.missing([(0, 1)])
        with pytest.raises(OSError):
            found.want_now(found.missing([(0, 1)]))
    found.want_now(found.missing([(0, 1)]))
    assert not found.missing([(0, 1)])
    found.close()
