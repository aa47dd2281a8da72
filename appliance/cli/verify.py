"""`cdp verify`: in-band proof that primary and replica are equal, now."""

from __future__ import annotations

from typing import Annotated

import typer

from appliance.cli.bookmark import WAIT_SECONDS, wait_applied
from appliance.cli.context import Json, client, emit, leave, named, out, size_text
from cdp.errors import UsageError

# The whole primary is read between writes: a TiB at disk speed is most of an hour.
READ_SECONDS = 3600.0
NOT_EQUAL = 1


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Example: cdp verify db")(verify)


def verify(
    name: Annotated[str, typer.Argument(metavar="VOLUME", help="The volume (or a group: all its volumes).")],
    as_json: Json = False,
) -> None:
    """Prove that primary and replica are equal: digests in the journal, compared where the replica meets them."""
    group, only = named(name)
    volumes = [only] if only else group.volumes
    if as_json and len(volumes) > 1:
        hint = f"Write: cdp verify {volumes[0].name} --json"
        raise UsageError("With --json, one volume is verified at a time.", hint)
    equal = True
    for volume in volumes:
        taken = client().collector("verify", READ_SECONDS, volume=volume.name)
        wait_applied(group.name, taken["last_seq"], WAIT_SECONDS)
        asked = {"volume": volume.name, "first_seq": taken["first_seq"], "last_seq": taken["last_seq"]}
        mismatches = client().command("replayer", "verify_result", asked)["mismatches"]
        equal = equal and not mismatches
        if as_json:
            listed = [{"offset": offset, "length": length} for offset, length in mismatches]
            emit({"volume": volume.name, "seq": taken["last_seq"], "equal": not listed, "mismatches": listed})
        elif mismatches:
            places = ", ".join(f"{offset}+{length}" for offset, length in mismatches[:20])
            out.print(f"[bold red]{volume.name}: not equal[/] at {places}. Heal it with `cdp resync {volume.name}`.")
        else:
            size = size_text(taken["bytes"])
            out.print(f"{volume.name}: primary and replica are equal at seq {taken['last_seq']} ({size} compared).")
    if not equal:
        leave(NOT_EQUAL)
