"""Point expressions: the grammar as a table, every meaning and every refusal (promise 8), zones, printed times."""

from __future__ import annotations

import contextlib
from datetime import UTC, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdp.errors import NotFoundError, PointSyntaxError, RefusedError, UsageError
from cdp.recovery import grammar, times
from cdp.recovery.points import parse, resolve
from tests.recovery.plain_timeline import Gap, PlainTimeline

S = times.SECOND_NS
BERLIN = ZoneInfo("Europe/Berlin")


def at(text: str) -> int:
    return times.read_in(times.parse_iso(text), UTC).times_ns[0]


NOON = at("2026-11-22T12:00:00Z")
# Ten records, one a second, from noon; seqs 101 to 110; now is half a second after the newest.
TEN = [NOON + i * S for i in range(10)]
NOW = TEN[-1] + S // 2


def seq_of(text: str, zone=UTC, volume=1, now=NOW, **named) -> int:
    named.setdefault("first", 101)
    timeline = PlainTimeline(named.pop("times_ns", TEN), **named)
    resolved = resolve(text, timeline, volume, now, zone)
    assert resolved.time_ns == timeline.time_of(resolved.seq)
    return resolved.seq


def refusal(text: str, **named) -> RefusedError:
    with pytest.raises(RefusedError) as refused:
        seq_of(text, **named)
    return refused.value


def near(error: RefusedError) -> tuple[int | None, int | None]:
    return tuple(None if side is None else side["seq"] for side in (error.before, error.after))


# --- the grammar


@pytest.mark.parametrize(
    "text, place, barrier",
    [
        ("now", grammar.Now(), False),
        ("-90s", grammar.Ago(90 * S), False),
        ("-10m", grammar.Ago(600 * S), False),
        ("-2h", grammar.Ago(7200 * S), False),
        ("-3d", grammar.Ago(3 * 86400 * S), False),
        ("seq:123456", grammar.Seq(123456), False),
        ("before-upgrade", grammar.Bookmark("before-upgrade"), False),
        ("rollback-12", grammar.Bookmark("rollback-12"), False),
        ("sequel", grammar.Bookmark("sequel"), False),
        ("Now", grammar.Bookmark("Now"), False),
        ("_" * 64, grammar.Bookmark("_" * 64), False),
        ("barrier:now", grammar.Now(), True),
        ("barrier:-10m", grammar.Ago(600 * S), True),
        ("barrier:seq:7", grammar.Seq(7), True),
        ("barrier:mark", grammar.Bookmark("mark"), True),
    ],
)
def test_grammar(text, place, barrier):
    assert parse(text) == grammar.Expression(text, place, barrier)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "now ", " now", "seq", "barrier", "barrier:", "barrier:barrier:now", "seq:", "seq:-1", "seq:1.5",
        "seq:18446744073709551616", "-10", "-10x", "10m", "-1.5h", "-m", "--10m", "#12", "1", "9lives", "a b",
        "a@b", "ü", "_" * 65, "x" * 5000, "-\u0661m", "seq:\u0661",
        "2026-13-01", "2026-02-30", "2026-11-22T24:00:00Z", "2026-11-22T10:61", "2026-11-22T10:00:60",
        "2026-11-22T10:00:00.1234567890Z", "2026-11-22T10:00:00.Z", "2026-11-22T10", "2026-11-22T10:00:00+25:00",
        "2026-11-22T10:00:00 UTC", "2026-11-22Z", "1968-12-31", "2262-01-01", "9999-01-01", "0000-01-01", "now\n",
    ],
)  # fmt: skip
def test_malformed_points_say_what_would_be_right(text):
    with pytest.raises(PointSyntaxError) as refused:
        parse(text)
    assert refused.value.exit_code == 2
    assert refused.value.message and (refused.value.hint or "years" in refused.value.message)


@given(st.text(max_size=30))
def test_garbage_is_a_point_or_its_one_error(text):
    with contextlib.suppress(PointSyntaxError):
        parse(text)


@pytest.mark.parametrize("name", ["", "now", "seq", "barrier", "rollback-1", "1a", "a:b", "a@b", "a" * 65, "a/b"])
def test_names_that_a_bookmark_cannot_have(name):
    with pytest.raises(PointSyntaxError):
        grammar.check_name(name)


def test_names_of_volumes_may_begin_with_rollback():
    grammar.check_name("rollback-test", "volume")
    grammar.check_name("before-upgrade")


# --- what they mean


@pytest.mark.parametrize(
    "text, seq",
    [
        ("now", 110), ("-1s", 109), ("-9s", 101), ("seq:101", 101), ("seq:110", 110), ("seq:0000105", 105),
        ("2026-11-22T12:00:03Z", 104), ("2026-11-22T12:00:03.999999999Z", 104), ("2026-11-22T12:00:04", 105),
        ("2026-11-22 12:00:04", 105), ("2026-11-22T13:00:04+01:00", 105), ("2026-11-22T13:00:04+01", 105),
        ("2026-11-22T07:00:04-0500", 105), ("2026-11-22T12:00", 101), ("mark", 103),
        ("barrier:now", 106), ("barrier:-4s", 106), ("barrier:-5s", 102), ("barrier:mark", 102),
        ("barrier:seq:106", 106), ("barrier:seq:105", 102),
    ],
)  # fmt: skip
def test_meanings(text, seq):
    assert seq_of(text, bookmarks={"mark": 103}, barriers=[(1, 102), (1, 106), (2, 109)]) == seq


def test_a_barrier_of_a_group_is_any_volumes():
    assert seq_of("barrier:now", volume=None, barriers=[(1, 102), (2, 109)]) == 109


def test_a_time_without_a_zone_is_read_in_the_given_one():
    assert seq_of("2026-11-22T13:00:04", zone=BERLIN) == 105
    with pytest.raises(PointSyntaxError, match="time zone"):
        seq_of("2026-11-22T13:00:04", zone=None)
    assert seq_of("2026-11-22T13:00:04+01:00", zone=None) == 105


def test_a_split_request_has_no_point_inside():
    """Promise 8."""
    inside = {105, 106}  # 104 is whole, 105 and 106 are continued by 107
    assert seq_of("2026-11-22T12:00:05Z", continued=inside) == 104
    assert near(refusal("seq:105", continued=inside)) == (104, 107)
    assert refusal("seq:106", continued=inside).code == "inside_request"
    assert seq_of("seq:107", continued=inside) == 107


# --- refusals (promise 8)


@pytest.mark.parametrize(
    "text, code, neighbours",
    [
        ("seq:100", "outside_window", (None, 101)), ("seq:0", "outside_window", (None, 101)),
        ("2026-11-22T11:59:59.999999999Z", "outside_window", (None, 101)), ("-10s", "outside_window", (None, 101)),
        ("-999999999999d", "outside_window", (None, 101)), ("seq:111", "beyond_newest", (110, None)),
        ("2026-11-22T12:00:09.000000001Z", "beyond_newest", (110, None)), ("-0s", "beyond_newest", (110, None)),
        ("2026-11-22T12:00:10Z", "future", (110, None)), ("2261-01-01", "future", (110, None)),
        ("gone", "expired", (None, 101)), ("forgotten", "expired", (None, 101)),
        ("ahead", "beyond_newest", (110, None)),
        ("barrier:seq:101", "outside_window", (None, 101)), ("barrier:2030-01-01", "future", (110, None)),
    ],
)  # fmt: skip
def test_outside_of_the_window(text, code, neighbours):
    """Promise 8."""
    error = refusal(text, bookmarks={"gone": 77, "ahead": 120}, expired={"forgotten"}, barriers=[(1, 50)])
    assert (error.code, error.exit_code, near(error)) == (code, 4, neighbours)
    assert "UTC" in error.message


def test_an_unknown_bookmark_never_existed():
    with pytest.raises(NotFoundError):
        seq_of("nobody")


def test_nothing_replayed_yet():
    assert refusal("now", times_ns=[]).code == "outside_window"


def test_gaps_are_never_offered():
    """Promise 8: by seq, by time, by bookmark, by barrier; the nearest points lie outside of every gap."""
    gaps = [Gap(1, 104, 107, "resync", "the primary was compared"), Gap(1, 107, 108, "resync", "again")]
    for text in ("seq:104", "seq:107", "-4s", "mark", "barrier:now"):
        error = refusal(text, gaps=gaps, bookmarks={"mark": 106}, barriers=[(1, 105)])
        assert (error.code, near(error)) == ("in_gap", (103, 108))
    assert seq_of("seq:103", gaps=gaps) == 103
    assert seq_of("2026-11-22T12:00:02Z", gaps=gaps) == 103
    assert seq_of("seq:108", gaps=gaps) == 108
    assert seq_of("seq:105", gaps=gaps, volume=2, sizes={2: 1}) == 105
    assert refusal("seq:105", gaps=gaps, volume=None).code == "in_gap"


def test_the_time_before_the_record_that_begins_a_gap_is_unknown():
    """Promise 8: the collector was gone from 12:00:02 on, and its first record afterwards says that it is a gap."""
    error = refusal("2026-11-22T12:00:02.5Z", gaps=[Gap(1, 104, 106, "unclean", "the machine restarted")])
    assert (error.code, near(error)) == ("in_gap", (103, 106))


def test_an_open_gap_has_no_end_yet():
    """Promise 8."""
    gaps = [Gap(1, 105, None, "sync", "the initial sync runs")]
    assert near(refusal("now", gaps=gaps)) == (104, None)
    assert near(refusal("seq:102", gaps=[Gap(1, 101, None, "sync", "")])) == (None, None)


def test_the_inside_of_a_rollback_is_never_offered():
    """Promise 8: BEGIN is 103 and END is 108; both are points, as is every time until the first copied record."""
    gaps = [Gap(1, 104, 108, "rollback", "")]
    error = refusal("seq:106", gaps=gaps)
    assert (error.code, near(error)) == ("in_rollback", (103, 108))
    assert seq_of("2026-11-22T12:00:02.9Z", gaps=gaps) == 103
    assert [seq_of(f"seq:{seq}", gaps=gaps) for seq in (103, 108)] == [103, 108]


def test_a_volume_before_it_existed():
    """Promise 8."""
    assert refusal("seq:105", volume=3).code == "outside_window"


# --- zones


def test_the_neighbours_of_a_point_before_a_volume_existed_can_be_opened():
    """Promise 8."""
    gaps = [Gap(1, 105, 107, "initial_sync", "it held data")]
    for text in ("seq:102", "seq:104", "seq:106", "seq:1", "barrier:seq:103"):
        assert near(refusal(text, born={1: 105}, gaps=gaps)) == (None, 107), text
    assert near(refusal("seq:104", born={1: 999})) == (None, None)


def test_a_time_that_daylight_saving_repeats_is_ambiguous():
    """Promise 8: 2026-10-25 02:30 happens twice in Berlin, at 00:30Z and 01:30Z."""
    start = at("2026-10-25T00:00:00Z")
    hours = [start + i * 600 * S for i in range(20)]
    error = refusal("2026-10-25T02:30:00", zone=BERLIN, times_ns=hours, now=hours[-1])
    assert error.code == "ambiguous" and near(error) == (104, 110)
    assert "2026-10-25T02:30:00.000000000+02:00" in error.hint
    assert "2026-10-25T01:30:00.000000000Z" in error.hint
    assert "Europe/Berlin" in error.message
    assert seq_of("2026-10-25T02:30:00+01:00", zone=BERLIN, times_ns=hours, now=hours[-1]) == 110


def test_a_time_that_daylight_saving_skips_is_ambiguous():
    """Promise 8: 2026-03-29 02:30 never happens in Berlin; the clocks go from 01:59:59 to 03:00:00 at 01:00Z."""
    start = at("2026-03-29T00:00:00Z")
    hours = [start + i * 600 * S for i in range(20)]
    error = refusal("2026-03-29T02:30:00", zone=BERLIN, times_ns=hours, now=hours[-1])
    assert error.code == "ambiguous"
    assert "2026-03-29T01:59:59.000000000+01:00" in error.hint
    assert "2026-03-29T03:00:00.000000000+02:00" in error.hint


@pytest.mark.parametrize("name", ["Europe/Berlin", "UTC", "+05:30", "-03:00", "Australia/Lord_Howe"])
def test_zones_by_name(name):
    zone = times.zone_named(name)
    assert times.zone_name(zone) == name


@pytest.mark.parametrize("name", ["Mars/Olympus", "../../etc/passwd", "+99:00", "CET-1CEST,M3.5.0", "Europe"])
def test_unknown_zones(name):
    with pytest.raises(UsageError):
        times.zone_named(name)


@pytest.mark.parametrize("tz", ["Europe/Berlin", ":America/New_York", "CET-1CEST", "", "UTC"])
def test_the_local_zone_can_be_read_back(tz, monkeypatch):
    monkeypatch.setenv("TZ", tz)
    times.zone_named(times.local_zone_name())


ZONES = st.sampled_from(
    [UTC, BERLIN, ZoneInfo("Australia/Lord_Howe"), ZoneInfo("America/St_Johns"), timezone(timedelta(hours=5.5))]
)


@given(st.integers(0, at("2261-12-30T00:00:00Z")), ZONES)
def test_a_printed_time_is_the_same_time(time_ns, zone):
    for printed in (times.iso_utc(time_ns), times.iso_local(time_ns, zone)):
        assert times.read_in(times.parse_iso(printed), BERLIN).times_ns == (time_ns,)


@given(st.lists(st.integers(0, 1 << 62), min_size=1, max_size=20, unique=True), ZONES, st.data())
def test_a_printed_time_given_back_is_the_same_point(moments, zone, data):
    moments.sort()
    seq = data.draw(st.integers(1, len(moments)))
    steps = data.draw(st.sampled_from([[], [(moments[0] + 1, 3600 * S)], [(moments[0] + 1, 5 * S), (moments[-1], 0)]]))
    timeline = PlainTimeline(moments, steps=steps)
    for printed in (times.iso_utc(moments[seq - 1]), times.iso_local(moments[seq - 1], zone)):
        assert resolve(printed, timeline, 1, moments[-1], zone).seq == seq


# --- a wall clock that was set back: order time went on


# From noon + 5 s on, the wall clock was 4 s behind order time; from noon + 8 s on, right again.
STEP = [(TEN[5], 4 * S), (TEN[8], 0)]


def test_a_time_that_the_wall_clock_showed_twice_is_ambiguous():
    """Promise 8: at order time 12:00:05.5 the wall clock showed 12:00:01.5 for the second time."""
    error = refusal("2026-11-22T12:00:01.5Z", steps=STEP)
    assert error.code == "ambiguous" and near(error) == (102, 106)
    assert "12:00:05.5" in error.hint and "12:00:01.5" in error.hint


def test_times_before_and_after_a_clock_step_are_not():
    assert seq_of("2026-11-22T12:00:00.5Z", steps=STEP) == 101
    assert seq_of("2026-11-22T12:00:08.5Z", steps=STEP) == 109
    assert seq_of("2026-11-22T12:00:01Z", steps=STEP) == 102  # an exact order time


def test_a_clock_that_stays_behind_makes_later_times_ambiguous_unless_nobody_could_see_it():
    assert refusal("2026-11-22T12:00:05.5Z", steps=[(TEN[5], 3 * S)]).code == "ambiguous"
    assert seq_of("2026-11-22T12:00:06.9Z", steps=[(TEN[5], S // 5)]) == 107


def test_relative_times_count_in_order_time():
    assert seq_of("-2s", steps=[(TEN[5], 3 * S)], now=NOW - 3 * S) == 108
