"""`cdp export`: a past point as a file."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from appliance import paths
from appliance.cli.context import Json, client, config, emit, err, out, point, size_text, volume_at, when, zone
from appliance.settings import reach


class Format(StrEnum):
    """What the file is."""

    raw = "raw"
    qcow2 = "qcow2"


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Examples: cdp export db@-1h out.raw    cdp export db@before-upgrade out.qcow2")(export)


def export(
    what: Annotated[str, typer.Argument(metavar="VOLUME@POINT", help="The volume and the point.")],
    output: Annotated[str, typer.Argument(help="A new file: .raw or .img (sparse), or .qcow2.")],
    form: Annotated[Format | None, typer.Option("--format", help="Instead of what the file's name says.")] = None,
    as_json: Json = False,
) -> None:
    """Write a volume, as it was at a point, to a new file. The file appears when it is whole."""
    _, volume, expression = volume_at(what)
    from cdp.recovery import export as exports

    chosen = form.value if form else exports.form_of(output)
    found = client().replayer("resolve", name=volume.name, expression=expression, zone=zone())
    address = reach(config()).nbd(paths.REPLAYER)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=err, disable=as_json or not err.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=volume.size)
        size = exports.export(
            address, f"{volume.name}@seq:{found['seq']}", output,
            lambda done, total: bar.update(task, completed=done, total=total), chosen,
        )  # fmt: skip
    if as_json:
        emit({"volume": volume.name, "point": point(found), "file": output, "format": chosen, "bytes": size})
    else:
        out.print(f"{output}: {volume.name} at seq {found['seq']}, {when(found['time_ns'])}.")
        out.print(f"{size_text(size)}, {chosen}.")
