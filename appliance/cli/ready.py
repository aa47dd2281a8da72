"""`cdp ready`: whether a process serves, for the health checks of containers."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from appliance import ready as probe
from appliance.cli.context import Options, leave


class Role(StrEnum):
    """Who can be asked."""

    collector = "collector"
    relay = "relay"
    replayer = "replayer"


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Example: cdp --config /etc/cdp/cdp.toml ready collector")(ready)


def ready(role: Annotated[Role, typer.Argument(help="The process.")]) -> None:
    """Ask a process whether it serves. Exit code 0: yes, 1: not yet, 5: it cannot be reached."""
    leave(probe.run(Options.explicit, role.value))
