"""`cdp up`, `cdp collector`, `cdp replayer`, `cdp relay`: the processes, in the foreground."""

from __future__ import annotations

import typer

from appliance import paths
from appliance.cli.context import Options, config, config_path
from cdp.errors import UsageError


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Example: cdp --config /etc/cdp/cdp.toml up")(up)
    app.command(epilog="Example: cdp --config /etc/cdp/cdp.toml collector")(collector)
    app.command(epilog="Example: cdp --config /etc/cdp/cdp.toml replayer")(replayer)
    app.command(epilog="Example: cdp --config /etc/cdp/cdp.toml relay")(relay)


def up() -> None:
    """Run collector and replayer (and the relay), supervised, until Ctrl-C; prints where they listen, then `ready`."""
    from appliance import up as runner

    relayed = config().journal.kind == "kafka"  # a mistake in it is said once, before anything is started
    raise typer.Exit(runner.run(config_path(), Options.debug, relayed))


def collector() -> None:
    """Run the collector: serves the volumes to production and journals their writes."""
    _serve(paths.COLLECTOR)


def replayer() -> None:
    """Run the replayer: keeps replica and history, serves the past."""
    _serve(paths.REPLAYER)


def relay() -> None:
    """Run the relay: carries the journal from the collector's machine into Kafka (`kind = "kafka"`)."""
    if config().journal.kind != "kafka":
        raise UsageError("There is nothing to relay: the journal is embedded.", 'Set kind = "kafka" in [journal].')
    _serve(paths.RELAY)


def _serve(role: str) -> None:
    from appliance import parent  # FastAPI and uvicorn take a third of a second; the other commands need neither

    raise typer.Exit(parent.run(role, config()))
