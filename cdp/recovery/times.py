"""Times as people write them, in integers only.

A time is an integer of nanoseconds since 1970 UTC. It is printed as ISO 8601 with nine decimals, so that a printed time
given back is the very same one; no float is ever involved. A zone is a `tzinfo`; None means that there is none to
read a time in that does not carry its own (a name of an export travels between machines).
"""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from typing import NamedTuple
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cdp.errors import PointSyntaxError, UsageError

SECOND_NS = 1_000_000_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SECOND = timedelta(seconds=1)
# What ns in a signed 64-bit integer reach, which journals and indexes keep; west of Greenwich 1970 began in 1969.
FIRST_YEAR, LAST_YEAR = 1969, 2261
EXAMPLE = "2026-11-22T14:05:00.5+01:00"

_ISO = re.compile(
    r"(\d{4})-(\d{2})-(\d{2})"
    r"(?:[T ](\d{2}):(\d{2})(?::(\d{2})(?:[.,](\d{1,9}))?)?"
    r"(Z|z|[+-]\d{2}(?::?\d{2}(?::?\d{2})?)?)?)?",
    re.ASCII,
)


class WrittenTime(NamedTuple):
    """A time as it was written: the wall clock's figures, the ns behind the second, and its offset, if it had one."""

    wall: datetime  # naive, whole seconds
    fraction_ns: int
    offset: timedelta | None


class Reading(NamedTuple):
    """What a written time can mean in a zone: one time; two where a clock was set back; none where it was set forward.

    `around` is then the last and the first second, as times, that the zone's clock did show.
    """

    times_ns: tuple[int, ...]
    around: tuple[int, int] | None = None


def parse_iso(text: str) -> WrittenTime | None:
    """A written time, or None if `text` does not look like one; PointSyntaxError if it does and cannot be."""
    match = _ISO.fullmatch(text)
    if match is None:
        return None
    year, month, day, hour, minute, second, fraction, zone = match.groups()
    try:
        wall = datetime(int(year), int(month), int(day), int(hour or 0), int(minute or 0), int(second or 0))
        offset = None if zone is None else _offset(zone)
    except ValueError as e:
        raise PointSyntaxError(f"{text!r} is no time: {e}.", f"For example: {EXAMPLE}.") from None
    if not FIRST_YEAR <= wall.year <= LAST_YEAR:
        raise PointSyntaxError(f"{text!r} is outside of the years {FIRST_YEAR} to {LAST_YEAR}.")
    return WrittenTime(wall, int((fraction or "0").ljust(9, "0")), offset)


def _offset(text: str) -> timedelta:
    if text in "Zz":
        return timedelta(0)
    digits = text[1:].replace(":", "").ljust(6, "0")
    hours, minutes, seconds = int(digits[:2]), int(digits[2:4]), int(digits[4:])
    if hours > 23 or minutes > 59 or seconds > 59:
        raise ValueError(f"{text} is no offset from UTC")
    size = timedelta(hours=hours, minutes=minutes, seconds=seconds)
    return -size if text[0] == "-" else size


def _seconds(wall: datetime, offset: timedelta) -> int:
    return (wall.replace(tzinfo=UTC) - offset - _EPOCH) // _SECOND


def read_in(written: WrittenTime, zone: tzinfo) -> Reading:
    """Every time that the written one can be; a zone of its own goes before `zone`."""
    wall, fraction_ns, own = written
    if own is not None:
        return Reading((_seconds(wall, own) * SECOND_NS + fraction_ns,))
    # PEP 495: both folds, each kept only if it comes back as the same figures on the clock.
    offsets = [wall.replace(tzinfo=zone, fold=fold).utcoffset() or timedelta(0) for fold in (0, 1)]
    seconds = {_seconds(wall, offset) for offset in offsets}
    shown = sorted(s for s in seconds if _local(s, zone).replace(tzinfo=None) == wall)
    if shown:
        return Reading(tuple(s * SECOND_NS + fraction_ns for s in shown))
    change = _transition(min(seconds), max(seconds), zone)
    return Reading((), ((change - 1) * SECOND_NS, change * SECOND_NS))


def _transition(low: int, high: int, zone: tzinfo) -> int:
    """The first second with the new offset, between two that have different ones."""
    old = _local(low, zone).utcoffset()
    while high - low > 1:
        middle = (low + high) // 2
        if _local(middle, zone).utcoffset() == old:
            low = middle
        else:
            high = middle
    return high


def _local(seconds: int, zone: tzinfo) -> datetime:
    return (_EPOCH + timedelta(seconds=seconds)).astimezone(zone)


def iso_utc(time_ns: int) -> str:
    """`2026-11-22T13:05:00.000000000Z`."""
    seconds, fraction = divmod(time_ns, SECOND_NS)
    return f"{_local(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{fraction:09d}Z"


def iso_local(time_ns: int, zone: tzinfo) -> str:
    """`2026-11-22T14:05:00.000000000+01:00`: with its offset, so it means one time only."""
    seconds, fraction = divmod(time_ns, SECOND_NS)
    wall, offset = _local(seconds, zone).isoformat()[:19], _local(seconds, zone).isoformat()[19:]
    return f"{wall}.{fraction:09d}{offset}"


def both_zones(time_ns: int, zone: tzinfo | None) -> str:
    """Local with offset and UTC, as every answer echoes a time; UTC alone where there is no zone."""
    if zone is None or zone is UTC:
        return iso_utc(time_ns)
    return f"{iso_local(time_ns, zone)} ({iso_utc(time_ns)})"


def duration(ns: int) -> str:
    """An age for people: `3 d 4 h`, `12 min 5 s`, `0.250 s`."""
    seconds, fraction = divmod(abs(ns), SECOND_NS)
    if seconds < 60:
        return f"{seconds}.{fraction // 1_000_000:03d} s"
    parts = []
    for name, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, seconds = divmod(seconds, size)
        if count:
            parts.append(f"{count} {name}")
    return " ".join(parts[:2])


def zone_named(name: str | None) -> tzinfo | None:
    """The zone of an IANA name (`Europe/Berlin`), `UTC` or a fixed offset (`+01:00`). Raises UsageError."""
    if name is None:
        return None
    if name in ("UTC", "Z", ""):
        return UTC
    if name[0] in "+-":
        try:
            return timezone(_offset(name))
        except ValueError as e:
            raise UsageError(f"Unknown time zone {name!r}: {e}.") from None
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise UsageError(
            f"Unknown time zone {name!r}.", "Use an IANA name such as Europe/Berlin, or set TZ=UTC."
        ) from None


def zone_name(zone: tzinfo | None) -> str:
    """How messages call a zone; `zone_named` reads it back."""
    if zone is None or zone is UTC:
        return "UTC"
    key = getattr(zone, "key", None)
    return str(key) if key else _EPOCH.astimezone(zone).isoformat()[19:]


def local_zone_name() -> str:
    """This process's zone, for `zone_named`: `$TZ`, else where /etc/localtime points, else today's offset."""
    for candidate in (os.environ.get("TZ", "").removeprefix(":"), _localtime_link()):
        if candidate and "/" not in candidate[:1]:
            try:
                zone_named(candidate)
                return candidate
            except UsageError:
                continue  # a POSIX rule in TZ or a zone that this machine has no data for
    return datetime.now().astimezone().replace(microsecond=0).isoformat()[19:]


def _localtime_link() -> str:
    try:
        return os.path.realpath("/etc/localtime").split("/zoneinfo/", 1)[1]
    except IndexError:
        return ""
