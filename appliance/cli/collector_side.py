"""`cdp resync`, `cdp trust`, `cdp consumer`: what is asked of the collector."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from appliance import paths
from appliance.cli.context import Json, client, emit, named, named_volume, out, table
from cdp.errors import UnreachableError

# The collector answers when it has read and journaled what it must; the copy itself goes on behind.
ANSWER_SECONDS = 60.0
# Reasons of a replayer's group that only a new history helps.
STUCK = ("hole", "place_expired", "topic_replaced", "forked", "fenced", "corrupt")
consumer = typer.Typer(no_args_is_help=True, help="Who still needs the journal.")


class Side(StrEnum):
    """Which one is right when primary and journal differ."""

    primary = "primary"
    journal = "journal"


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Example: cdp resync db")(resync)
    app.command(epilog="Example: cdp trust db primary")(trust)
    app.add_typer(consumer, name="consumer")
    consumer.command("list", epilog="Example: cdp consumer list shop")(list_)
    consumer.command("remove", epilog="Example: cdp consumer remove shop old-replayer")(remove)


def resync(
    volume: Annotated[str, typer.Argument(help="The volume.")], as_json: Json = False
) -> None:
    """Journal the whole primary again and heal what differs, while clients are served.

    It is the way out of `forked`, of a hole and of damage too: then history begins anew, with all volumes of the group.
    """
    group, chosen = named_volume(volume)
    stuck = _is_stuck(group.name)
    volumes = [v.name for v in group.volumes] if stuck else [chosen.name]
    answers = [client().collector("resync", ANSWER_SECONDS, volume=name) for name in volumes]
    if stuck:
        client().replayer("reset", ANSWER_SECONDS, group=group.name, after_seq=answers[0]["after_seq"])
    if as_json:
        emit(answers[volumes.index(chosen.name)])
    else:
        out.print(f"The resync of {volume} runs; `cdp status` shows its progress. Points are offered from its end.")


def _is_stuck(group: str) -> bool:
    """Whether the replayer cannot go on with the history it has. An absent one is not: it catches up by itself."""
    try:
        figures = client().status(paths.REPLAYER)["figures"]
    except UnreachableError:
        return False
    found = (figures or {"groups": {}})["groups"].get(group) or {}
    return found.get("state") == "forked" or (found.get("reason") or {}).get("code") in STUCK


def trust(
    volume: Annotated[str, typer.Argument(help="A volume that is stopped in doubt.")],
    side: Annotated[Side, typer.Argument(help="primary: what is on it now is right; journal: write its tail again.")],
    as_json: Json = False,
) -> None:
    """Say which side is right after a primary was changed, or may have been, while the collector was away."""
    _, chosen = named_volume(volume)
    answer = client().collector("trust", ANSWER_SECONDS, volume=chosen.name, side=side.value)
    if as_json:
        emit({"volume": chosen.name, "side": side.value, **answer})
    else:
        out.print(f"{volume}: the {side.value} is trusted; `cdp status` shows how it goes on.")


def list_(
    group: Annotated[str, typer.Argument(help="The group.")], as_json: Json = False
) -> None:
    """List who the journal is kept for, and up to where each needs nothing more."""
    owner, _ = named(group)
    found = client().collector("consumers", group=owner.name)["consumers"]
    if as_json:
        emit({"group": owner.name, "consumers": found})
        return
    shown = table("", "consumer", "done with seq")
    for name, seq in sorted(found.items()):
        shown.add_row(name, str(seq))
    out.print(shown)


def remove(
    group: Annotated[str, typer.Argument(help="The group.")],
    name: Annotated[str, typer.Argument(help="The consumer; it needs a resync if it comes back.")],
    as_json: Json = False,
) -> None:
    """Keep the journal for this consumer no longer."""
    owner, _ = named(group)
    answer = client().collector("consumer_remove", group=owner.name, name=name)
    if as_json:
        emit({"group": owner.name, "name": name, **answer})
    else:
        out.print(f"The journal of {owner.name} is not kept for {name} any more.")
