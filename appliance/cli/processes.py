"""`cdp up`, `cdp collector`, `cdp replayer`: the processes, in the foreground."""

from __future__ import annotations

import typer

from appliance import paths
from appliance.cli.context import Options, config, config_path


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Example: cdp --config /etc/cdp/cdp.toml up")(up)
    app.command(epilog="Example: cdp --config /etc/cdp/cdp.toml collector")(collector)
    app.command(epilog="Example: cdp --config /etc/cdp/cdp.toml replayer")(replayer)


def up() -> None:
    """Run collector and replayer, supervised, until Ctrl-C; prints where they listen, then `ready`."""
    from appliance import up as runner

    config()  # a mistake in it is said once, before anything is started
    raise typer.Exit(runner.run(config_path(), Options.debug))


def collector() -> None:
    """Run the collector: serves the volumes to production and journals their writes."""
    _serve(paths.COLLECTOR)


def replayer() -> None:
    """Run the replayer: keeps replica and history, serves the past."""
    _serve(paths.REPLAYER)


def _serve(role: str) -> None:
    from appliance import parent  # FastAPI and uvicorn take a third of a second; the other commands need neither

    raise typer.Exit(parent.run(role, config()))
