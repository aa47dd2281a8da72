"""`cdp init`: a first configuration that anyone can run."""

from __future__ import annotations

import os

import typer

from appliance.cli.context import out
from cdp.errors import RefusedError

TEMPLATE = os.path.join(os.path.dirname(__file__), "cdp.toml")
TARGET = "cdp.toml"


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Example: mkdir lab && cd lab && cdp init && cdp up")(init)


def init() -> None:
    """Write a commented ./cdp.toml with relative paths, for a first try without root."""
    with open(TEMPLATE, encoding="utf-8") as f:
        text = f.read()
    try:
        fd = os.open(TARGET, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        hint = "Edit it, or go to another folder."
        raise RefusedError("There is a ./cdp.toml already.", hint, code="exists") from None
    with open(fd, "w", encoding="utf-8") as f:
        f.write(text)
    out.print(f"Wrote {os.path.abspath(TARGET)}: one group `shop` with one volume `db` of 1 GiB.")
    out.print("Start it with `cdp up`; then connect a client to `db` on the collector.")
