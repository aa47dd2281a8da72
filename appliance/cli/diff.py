"""`cdp diff`: which bytes differ between two points of a volume."""

from __future__ import annotations

from typing import Annotated

import typer

from appliance.cli.context import Json, client, emit, out, point, size_text, table, volume_at, when, zone
from cdp.errors import UsageError

# A difference over millions of writes is some seconds of work.
DIFF_SECONDS = 600.0
SHOWN_EXTENTS = 40


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Example: cdp diff db@before-upgrade db@now")(diff)


def diff(
    first: Annotated[str, typer.Argument(metavar="VOLUME@POINT", help="From this point …")],
    second: Annotated[str, typer.Argument(metavar="VOLUME@POINT", help="… to this one.")],
    as_json: Json = False,
) -> None:
    """Show the extents that changed between two points, rewritten ones too. Exit code 0 in either case."""
    _, volume, start = volume_at(first)
    _, other, end = volume_at(second)
    if volume.name != other.name:
        raise UsageError(f"{volume.name} and {other.name} are two volumes.", "Compare two points of one volume.")
    arguments = {"volume": volume.name, "from": start, "to": end, "zone": zone()}
    found = client().command("replayer", "diff", arguments, DIFF_SECONDS)
    extents = [{"offset": offset, "length": length} for offset, length in found["extents"]]
    answer = {"from": point(found["from"]), "to": point(found["to"]), "extents": extents, "bytes": found["bytes"]}
    if as_json:
        emit(answer)
        return
    shown = table("", "offset", "length")
    for extent in extents[:SHOWN_EXTENTS]:
        shown.add_row(str(extent["offset"]), str(extent["length"]))
    if extents:
        out.print(shown)
    for side, what in (("from", first), ("to", second)):
        out.print(f"{side:4}  {what} = seq {found[side]['seq']}, {when(found[side]['time_ns'])}")
    hidden = len(extents) - SHOWN_EXTENTS
    more = f" ({hidden} extents not shown; --json has all)" if hidden > 0 else ""
    out.print(f"{size_text(found['bytes'])} in {len(extents)} extents changed{more}.")
