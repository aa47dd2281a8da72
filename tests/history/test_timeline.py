"""What points are resolved against, from batches to answers; the same after a restart, a rebuild and a cut."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdp.history.timeline import Gap, Point
from cdp.history.timeline_rows import MAX_EXPIRED
from cdp.journal import batch as journal
from tests.history.support import BLOCK, SECOND_NS, START_NS, Group, Piece, bookmark, resize, write

DATA = b"x" * BLOCK


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Group]:
    made = Group(tmp_path, 32, segment_bytes=1 << 16)
    yield made
    made.close()


def gap(volume: int, from_seq: int, opened: bool, text: str = "") -> Piece:
    about = json.dumps({"code": "resync", "text": text}).encode()
    return (journal.GAP, journal.OPEN if opened else 0, volume, from_seq, 0, about)


def rollback_begin(target: int) -> Piece:
    about = {"volumes": [0, 1], "target_seq": target, "target_time_ns": 0, "bookmark": "x"}
    return (journal.ROLLBACK_BEGIN, 0, 0, 0, 0, json.dumps(about).encode())


def rollback_end(begin: int) -> Piece:
    return (journal.ROLLBACK_END, 0, 0, 0, 0, json.dumps({"begin": begin, "volumes": [0, 1]}).encode())


def reopened(group: Group, how: str) -> None:
    newest = group.history.applied_seq
    group.history.close()
    if how == "rebuilt":
        shutil.rmtree(group.folder / "history" / "index")
    group.history = group.open()
    group.history.cut(newest)


HEARTBEAT: Piece = (journal.HEARTBEAT, 0, journal.NO_VOLUME, 0, 0, b"")
BARRIER: Piece = (journal.BARRIER, 0, 0, 0, 0, b"")


def test_empty(group: Group) -> None:
    timeline = group.history.timeline
    assert timeline.oldest() is None
    assert timeline.newest() is None
    assert timeline.seq_at(START_NS) is None
    assert timeline.bookmarks() == [] == timeline.gaps(None) == timeline.barriers(None, 5)
    assert timeline.barrier_before(10, None) is None


def test_every_record_has_a_time_of_its_own(group: Group) -> None:
    for count in (1, 5, 2, 40, 1):
        group.bundle([write(i % 30, DATA) for i in range(count)], [HEARTBEAT])
    timeline = group.history.timeline
    newest = timeline.newest()
    assert newest == Point(54, timeline.time_of(54))
    times = [timeline.time_of(seq) for seq in range(1, 55)]
    assert times == sorted(set(times))
    for seq, time_ns in enumerate(times, 1):
        assert timeline.seq_at(time_ns) == seq
        assert timeline.seq_at(time_ns - 1) == (seq - 1 or None)
    assert timeline.seq_at(times[-1] + 10**15) == 54
    assert timeline.oldest() == Point(1, times[0])


def test_nothing_beyond_what_is_applied(group: Group) -> None:
    group.bundle([write(0, DATA)], [bookmark("early")])
    batch = group.stream.batch([bookmark("late"), BARRIER])
    pending = group.history.append([batch], group.plan(batch), False)
    group.history.sync(pending)
    group.history.publish(pending)
    timeline = group.history.timeline
    assert timeline.newest() == Point(2, timeline.time_of(2))
    assert timeline.bookmark("late") is None and [name for name, _ in timeline.bookmarks()] == ["early"]
    assert timeline.barriers(0, 9) == []
    assert timeline.seq_at(10**19 - 1) == 2
    group.apply([batch])
    assert timeline.bookmark("late") == Point(3, timeline.time_of(3))


@pytest.mark.parametrize("how", ["as it is", "reopened", "rebuilt"])
def test_all_kinds(group: Group, how: str) -> None:
    group.bundle([resize(10 << 20, "db"), resize(20 << 20, "log", 1)], [bookmark("one"), write(0, DATA)])  # 1-4
    group.bundle([BARRIER, write(1, DATA, flags=journal.FUA), (journal.BARRIER, 0, 1, 0, 0, b"")])  # 5-7
    group.bundle([write(0, DATA, flags=journal.CONTINUED), write(1, DATA, flags=journal.CONTINUED), write(2, DATA)])
    group.bundle([gap(1, 0, True, "hello")], [HEARTBEAT], [gap(1, 11, False)])  # 11-13
    group.bundle([gap(0, 12, False, "late")], [rollback_begin(3)], [HEARTBEAT], [rollback_end(15)])  # 14-17
    group.bundle([resize(5 << 20, "db"), gap(0, 0, True)])  # 18-19
    if how != "as it is":
        reopened(group, how)
    timeline = group.history.timeline
    assert timeline.volumes() == {"db": 0, "log": 1}
    assert [timeline.size_at(0, seq) for seq in (0, 1, 17, 18)] == [None, 10 << 20, 10 << 20, 5 << 20]
    assert [name for name, _ in timeline.bookmarks()] == ["one", "rollback-15"]
    assert [p.seq for p in timeline.barriers(0, 9)] == [6, 5]
    assert [p.seq for p in timeline.barriers(None, 2)] == [7, 6]
    assert timeline.barrier_before(6, 1) is None
    assert timeline.barrier_before(19, 1) == Point(7, timeline.time_of(7))
    assert [timeline.whole_request(seq) for seq in (7, 8, 9, 10, 11)] == [7, 7, 7, 10, 11]
    assert timeline.gaps(1) == [
        Gap(1, 11, 13, "resync", "hello"),
        Gap(1, 16, 17, "rollback", "a rollback to seq 3 was being copied; x is the state before it"),
    ]  # fmt: skip
    assert [(g.from_seq, g.to_seq) for g in timeline.gaps(0)] == [(12, 14), (16, 17), (19, None)]
    assert [(r.begin, r.end, r.target_seq) for r in timeline.rollbacks()] == [(15, 17, 3)]


@pytest.mark.parametrize("how", ["as it is", "reopened", "rebuilt"])
def test_a_split_request_in_several_batches(group: Group, how: str) -> None:
    """Promise 6: no point inside of it, while its end is not there either."""
    timeline = group.history.timeline

    def check(newest: int, requests: list[int]) -> None:
        nonlocal timeline
        if how != "as it is":
            reopened(group, how)
            timeline = group.history.timeline
        assert timeline.newest() == Point(newest, timeline.time_of(newest))
        assert [timeline.whole_request(seq) for seq in range(2, 2 + len(requests))] == requests

    more = journal.CONTINUED
    group.bundle([resize(10 << 20, "db"), bookmark("one")])  # 1-2
    group.bundle([write(0, DATA, flags=more)], [write(1, DATA, flags=more)])  # 3-4
    check(2, [2, 2, 2])
    group.bundle([write(2, DATA, flags=more)])  # 5
    check(2, [2, 2, 2, 2])
    group.bundle([write(3, DATA), write(9, DATA)], [write(4, DATA, flags=more)])  # 6-8
    check(7, [2, 2, 2, 2, 6, 7, 7])
    group.bundle([resize(11 << 20, "db")], [write(5, DATA, flags=more)], [write(6, DATA)])  # 9-11: it died behind 8
    check(11, [2, 2, 2, 2, 6, 7, 7, 9, 9, 11])


def test_a_cut_inside_a_split_request(group: Group) -> None:
    """Promise 6: what comes then instead of its end ends it."""
    more = journal.CONTINUED
    group.bundle([resize(1 << 20, "db"), write(0, DATA)])
    group.bundle([write(0, DATA, flags=more)])
    group.bundle([write(1, DATA, flags=more)], [write(2, DATA)])
    group.history.close()
    group.history = group.open()
    group.put_back(3)
    group.history.applied_seq = 3
    timeline = group.history.timeline
    assert timeline.newest() == Point(2, timeline.time_of(2))
    group.bundle([resize(2 << 20, "db")])
    assert timeline.newest() == Point(4, timeline.time_of(4)) and timeline.whole_request(3) == 2


def test_cut_opens_again_what_ended_later(group: Group) -> None:
    group.bundle([resize(1 << 20, "db"), gap(0, 0, True)], [rollback_begin(1)])
    group.bundle([gap(0, 2, False)], [rollback_end(3)], [bookmark("late"), resize(2 << 20, "db"), BARRIER])
    assert [(g.from_seq, g.to_seq) for g in group.history.timeline.gaps(0)] == [(2, 4), (4, 5)]
    group.history.close()
    group.history = group.open()
    group.put_back(3)
    timeline = group.history.timeline
    assert [(g.from_seq, g.to_seq) for g in timeline.gaps(0)] == [(2, None), (4, None)]
    assert timeline.bookmark("late") is None and not timeline.was_bookmark("late")
    assert timeline.size_at(0, 99) == 1 << 20
    assert timeline.barriers(0, 9) == []
    group.bundle([gap(0, 2, False)], [rollback_end(3)])
    assert [(g.from_seq, g.to_seq) for g in timeline.gaps(0)] == [(2, 4), (4, 5)]


@pytest.mark.parametrize("how", ["open", "rebuilt"])
def test_a_volume_that_held_data_has_no_point_before_all_of_it_is_known(group: Group, how: str) -> None:
    """Promise 8: the record that declares it stands in front of its gap, and nobody has said what it held there."""
    opens: Piece = (journal.GAP, journal.OPEN, 0, 0, 0, json.dumps({"code": "initial_sync"}).encode())
    group.bundle([resize(1 << 20, "db"), opens], [write(0, DATA)])
    group.bundle([opens])  # a collector that was killed begins anew
    group.bundle([gap(0, 2, False)], [gap(0, 0, True)])
    reopened(group, how)
    assert [(g.from_seq, g.to_seq) for g in group.history.timeline.gaps(0)] == [(1, 5), (6, None)]


def test_clock_steps(group: Group) -> None:
    hour = 3600 * SECOND_NS
    for behind in (0, 5, hour, hour + 7, hour, 0, 0):
        batch = group.stream.batch([HEARTBEAT], behind_ns=behind)
        pending = group.history.append([batch], [], False)
        group.history.sync(pending)
        group.history.publish(pending)
        group.apply([batch])
    timeline = group.history.timeline
    assert timeline.clock_steps() == [(timeline.time_of(3), hour), (timeline.time_of(6), 0)]


def test_retention_drops_what_is_behind(group: Group) -> None:
    group.bundle([resize(1 << 20, "db"), bookmark("first"), BARRIER])
    for i in range(30):
        group.bundle([write(i, i.to_bytes(4, "big") * 1024), BARRIER, bookmark(f"b{i}"), resize((2 + i) << 20, "db")])
        for block in range(16):
            group.bundle([write(block, bytes([i, block]) * 2048)])
    assert group.history.retain(None, 1, [], 0).dropped
    timeline, oldest = group.history.timeline, group.history.oldest_seq
    assert timeline.oldest() == Point(oldest, timeline.time_of(oldest)) and timeline.time_of(oldest) > START_NS
    assert timeline.seq_at(timeline.time_of(oldest) - 1) is None
    assert timeline.bookmark("first") is None and timeline.was_bookmark("first")
    assert not timeline.was_bookmark("never")
    assert all(point.seq >= oldest for _, point in timeline.bookmarks())
    assert all(point.seq >= oldest for point in timeline.barriers(None, 100))
    assert timeline.size_at(0, oldest) is not None
    assert MAX_EXPIRED == 10_000


def test_incarnations_and_chain_survive(group: Group) -> None:
    group.bundle([write(0, DATA)])
    group.stream.identity = group.stream.identity._replace(epoch=2, incarnation=b"2" * 16)
    group.bundle([write(0, DATA)], [HEARTBEAT])
    expected = [(1, bytes([1]) * 16), (2, b"2" * 16)]
    assert group.history.incarnations == expected
    reopened(group, "rebuilt")
    assert group.history.incarnations == expected
    assert (group.history.last_crc, group.history.group_id) == (group.stream.crc, b"g" * 16)
