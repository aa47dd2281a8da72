"""The grammar of point expressions: text in, a small tree out, no timeline and no clock involved.

::

    expression = [ "barrier:" ] place
    place      = "now" | "-" N ("s" | "m" | "h" | "d") | "seq:" N | ISO 8601 time | bookmark
    bookmark   = [A-Za-z_][A-Za-z0-9._-]{0,63}, none of `now`, `seq`, `barrier`
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cdp.errors import PointSyntaxError
from cdp.recovery.times import SECOND_NS, WrittenTime, parse_iso

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9._-]{0,63}", re.ASCII)
_AGO = re.compile(r"-(\d{1,12})([smhd])", re.ASCII)
_SEQ = re.compile(r"seq:(\d{1,20})", re.ASCII)
_UNIT_NS = {"s": SECOND_NS, "m": 60 * SECOND_NS, "h": 3600 * SECOND_NS, "d": 86400 * SECOND_NS}
KEYWORDS = frozenset(("now", "seq", "barrier"))
# The automatic bookmark of a rollback; refused to users.
ROLLBACK_PREFIX = "rollback-"
MAX_SEQ = (1 << 64) - 1
# The longest expression is a bookmark behind `barrier:`; anything longer is not worth being looked at.
MAX_EXPRESSION = 128
EXAMPLES = "now, -10m, 2026-11-22T14:05:00+01:00, before-upgrade, seq:123456 or barrier:-10m"


@dataclass(frozen=True)
class Now:
    """The newest point."""


@dataclass(frozen=True)
class Ago:
    """So many ns before now."""

    ns: int


@dataclass(frozen=True)
class Written:
    """A time, perhaps without a zone."""

    time: WrittenTime


@dataclass(frozen=True)
class Seq:
    """Exactly after this record."""

    seq: int


@dataclass(frozen=True)
class Bookmark:
    """Where that bookmark stands."""

    name: str


Place = Now | Ago | Written | Seq | Bookmark


@dataclass(frozen=True)
class Expression:
    """A parsed point expression; `barrier`: the last barrier at or before the place."""

    text: str
    place: Place
    barrier: bool = False


def parse(text: str) -> Expression:
    """Reads an expression; PointSyntaxError with an example for everything that is none."""
    if not text:
        raise PointSyntaxError("The point is empty.", f"Write one of {EXAMPLES}.")
    if len(text) > MAX_EXPRESSION:
        raise PointSyntaxError(f"A point of {len(text)} characters is too long.", f"Write one of {EXAMPLES}.")
    inner = text.removeprefix("barrier:")
    return Expression(text, _place(inner, text), barrier=inner != text)


def _place(inner: str, text: str) -> Place:
    if inner == "now":
        return Now()
    if match := _AGO.fullmatch(inner):
        return Ago(int(match[1]) * _UNIT_NS[match[2]])
    if match := _SEQ.fullmatch(inner):
        seq = int(match[1])
        if seq > MAX_SEQ:
            raise PointSyntaxError(f"{text!r}: no sequence is that large.", "For example: seq:123456.")
        return Seq(seq)
    if (written := parse_iso(inner)) is not None:
        return Written(written)
    if _NAME.fullmatch(inner) and inner not in KEYWORDS:
        return Bookmark(inner)
    raise PointSyntaxError(f"{text!r} is no point.", f"Write one of {EXAMPLES}.")


def check_name(name: str, what: str = "bookmark") -> None:
    """Refuses what cannot be a name that a user gives to a bookmark, volume or group. Raises PointSyntaxError."""
    if not _NAME.fullmatch(name):
        raise PointSyntaxError(
            f"{name!r} cannot be the name of a {what}.",
            "It is 1 to 64 letters, digits, '.', '_' and '-', and begins with a letter or '_'.",
        )
    if name in KEYWORDS:
        raise PointSyntaxError(f"{name!r} has a meaning of its own in points.", "Choose another name.")
    if what == "bookmark" and name.startswith(ROLLBACK_PREFIX):
        raise PointSyntaxError(
            f"Bookmarks that begin with {ROLLBACK_PREFIX!r} are made by rollbacks.", "Choose another name."
        )
