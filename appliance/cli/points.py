"""`cdp points`: what one can go back to."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Group as Lines

from appliance import health
from appliance.cli.context import Json, client, emit, named, out, point, table
from cdp.recovery.times import duration

# Barriers are many: every flush of the guest is one.
DEFAULT_BARRIERS = 100
MAX_BARRIERS = 100_000


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
    shown = table("", "what", "seq", "time (UTC)")
    shown.add_row("oldest", str(oldest["seq"]), oldest["time"])
    for mark in answer["bookmarks"]:
        shown.add_row(f"[bold]{mark['name']}[/]", str(mark["seq"]), mark["time"])
    for barrier in reversed(answer["barriers"][:10]):
        shown.add_row("[dim]barrier[/]", str(barrier["seq"]), barrier["time"])
    shown.add_row("newest", str(newest["seq"]), newest["time"])
    gaps = [
        f"gap: seq {g['from']['seq']} to {g['to']['seq'] if g['to'] else 'open'}: {g['reason']['text']}"
        for g in answer["gaps"]
    ]
    hidden = len(answer["barriers"]) - 10
    more = [f"({hidden} more barriers with --json)"] if hidden > 0 else []
    return Lines(shown, "", f"The window is {age} long.", *more, *gaps)
