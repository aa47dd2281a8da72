"""`cdp points`: what one can go back to."""

from __future__ import annotations

from datetime import UTC
from typing import Annotated, Any

import typer
from rich.console import Group as Lines

from appliance import health
from appliance.cli.context import Json, client, emit, named, out, point, table, zone
from cdp.recovery.times import duration, iso_local, zone_named

# Barriers are many: every flush of the guest is one.
DEFAULT_BARRIERS = 100
MAX_BARRIERS = 100_000
# Of them in the table, which people read from its end.
SHOWN_BARRIERS = 10


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Example: cdp points db --limit 10")(points)


def points(
    name: Annotated[str, typer.Argument(help="A volume or a group.")],
    limit: Annotated[
        int, typer.Option(help="At most so many barriers, the newest.", min=0, max=MAX_BARRIERS)
    ] = DEFAULT_BARRIERS,
    as_json: Json = False,
) -> None:
    """Show the window, the bookmarks, the newest barriers and the gaps."""
    group, volume = named(name)
    found = client().replayer("points", name=name, limit=limit)
    answer = {
        "volume": volume.name if volume else None,
        "group": group.name,
        "oldest": point(found["oldest"]) or {"seq": None, "time": None},
        "newest": point(found["newest"]) or {"seq": None, "time": None},
        "bookmarks": [{"name": b["name"], **(point(b) or {})} for b in found["bookmarks"]],
        "barriers": [point(b) for b in found["barriers"]],
        "gaps": [health.gap(g) for g in found["gaps"]],
    }
    emit(answer) if as_json else out.print(_page(answer, found))


def _page(answer: dict[str, Any], found: dict[str, Any]) -> Lines:
    oldest, newest = answer["oldest"], answer["newest"]
    if newest["seq"] is None:
        return Lines("Nothing has been replayed yet: there is no point.")
    age = duration(found["newest"]["time_ns"] - found["oldest"]["time_ns"])
    here = zone_named(zone()) or UTC
    shown = table("", "what", "seq", f"time ({zone()})", "time (UTC)")
    listed = [("oldest", found["oldest"], oldest)]
    marks = zip(found["bookmarks"], answer["bookmarks"], strict=True)
    listed += [(f"[bold]{b['name']}[/]", b, printed) for b, printed in marks]
    barriers = list(zip(found["barriers"], answer["barriers"], strict=True))[:SHOWN_BARRIERS]
    listed += [("[dim]barrier[/]", b, printed) for b, printed in reversed(barriers)]
    for what, at, printed in (*listed, ("newest", found["newest"], newest)):
        local = iso_local(at["time_ns"], here)
        shown.add_row(what, str(at["seq"]), local[:19] + local[29:], printed["time"])  # the exact one is that in UTC
    gaps = [_gap_line(g, answer["group"]) for g in answer["gaps"]]
    hidden = len(answer["barriers"]) - SHOWN_BARRIERS
    more = [f"({hidden} more barriers with --json)"] if hidden > 0 else []
    return Lines(shown, "", f"The window is {age} long.", *more, *gaps)


def _gap_line(gap: dict[str, Any], group: str) -> str:
    end = gap["to"]["seq"] if gap["to"] else "open"
    return f"gap of {gap['volume'] or group}: seq {gap['from']['seq']} to {end}: {gap['reason']['text']}"
