"""`cdp demo`: the tour, on real data, in a temporary folder."""

from __future__ import annotations

from typing import Annotated

import typer


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Example: cdp demo")(demo)


def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave the temporary folder in place.")] = False,
) -> None:
    """Protect a volume with a file system, break it, look into the past, roll back and forward. Under a minute."""
    from appliance.demo import Demo

    raise typer.Exit(Demo(keep).run())
