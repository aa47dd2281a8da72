"""`cdp bookmark`: a name for this very moment."""

from __future__ import annotations

from typing import Annotated

import typer

from appliance.cli.context import Json, client, emit, named, out, point, when
from cdp.errors import UnreachableError
from cdp.recovery.grammar import check_name

# Replay is seconds behind, or it is broken and `cdp status` says why.
WAIT_SECONDS = 600.0


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Example: cdp bookmark shop before-upgrade --wait")(bookmark)


def bookmark(
    group: Annotated[str, typer.Argument(help="A group (or one of its volumes).")],
    name: Annotated[str, typer.Argument(help="The bookmark: letters, digits, '.', '_', '-'; unique in its group.")],
    wait: Annotated[bool, typer.Option("--wait", help="Return when the bookmark can be opened.")] = False,
    as_json: Json = False,
) -> None:
    """Name this moment. Returns when the bookmark is durable in the journal."""
    check_name(name)
    owner, _ = named(group)
    found = client().collector("bookmark", group=owner.name, name=name)
    if wait:
        wait_applied(owner.name, found["seq"])
    answer = {"group": owner.name, "name": name, **(point(found) or {}), "withheld": found["withheld"]}
    if as_json:
        emit(answer)
    else:
        out.print(f"Bookmark [bold]{name}[/] of group {owner.name}: seq {answer['seq']} at {when(found['time_ns'])}.")
        for one in found["withheld"]:
            out.print(f"[yellow]Warning:[/] {one['volume']} cannot be opened at it: {one['reason']['text']}")


def wait_applied(group: str, seq: int, timeout_seconds: float = WAIT_SECONDS) -> None:
    """Until the replayer has applied `seq`. Raises UnreachableError after the time limit."""
    arguments = {"group": group, "seq": seq, "timeout_seconds": timeout_seconds}
    answer = client().command("replayer", "wait", arguments, timeout_seconds + 5)
    if not answer["applied"]:
        raise UnreachableError(
            f"The replayer has not applied seq {seq} of {group} within {timeout_seconds:g} s.", "See `cdp status`."
        )
