"""What every command needs: the configuration, the client, what a name on the command line means, and output."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from appliance.client import Client
from appliance.settings import reach
from cdp import config as configuration
from cdp import config_file
from cdp.config import Config, Group, Volume
from cdp.errors import CdpError, NotFoundError, UsageError
from cdp.recovery.times import both_zones, iso_utc, local_zone_name, zone_named

Json = Annotated[bool, typer.Option("--json", help="Answer in JSON, for scripts.")]

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class Options:
    """The global options of this run; the configuration is read when it is first needed."""

    explicit: str | None = None
    debug = False
    _config: Config | None = None

    @classmethod
    def reset(cls, explicit: str | None, debug: bool) -> None:
        cls.explicit, cls.debug, cls._config = explicit, debug, None


def config_path() -> str:
    """The absolute path of the configuration in force. Raises ConfigError."""
    return config_file.find(Options.explicit)


def config() -> Config:
    """The configuration in force, read once. Raises ConfigError."""
    if Options._config is None:
        Options._config = configuration.load(config_path())
    return Options._config


def client() -> Client:
    """The client of the configured appliance."""
    return Client(reach(config()))


def named(name: str) -> tuple[Group, Volume | None]:
    """The group of that name, or the volume with its group. Raises NotFoundError."""
    for group in config().groups:
        if group.name == name:
            return group, None
        for volume in group.volumes:
            if volume.name == name:
                return group, volume
    known = ", ".join(v.name for _, v in config().volumes())
    raise NotFoundError(f"There is no volume or group {name!r}.", f"The volumes are: {known}.")


def named_volume(name: str) -> tuple[Group, Volume]:
    """A volume and its group. Raises NotFoundError; UsageError for a group."""
    group, volume = named(name)
    if volume is None:
        names = ", ".join(v.name for v in group.volumes)
        raise UsageError(f"{name!r} is a group; this takes one volume.", f"Its volumes are: {names}.")
    return group, volume


def volume_at(text: str) -> tuple[Group, Volume, str]:
    """`db@POINT` taken apart. Raises UsageError or NotFoundError."""
    name, at, expression = text.partition("@")
    if not at or not expression:
        raise UsageError(f"{text!r} names no point.", f"Write a volume and a point, like {name or 'db'}@-10m.")
    group, volume = named_volume(name)
    return group, volume, expression


def zone() -> str:
    """The time zone that points without one are read in: this terminal's."""
    return local_zone_name()


def emit(answer: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(answer, indent=2 if sys.stdout.isatty() else None) + "\n")
    sys.stdout.flush()


def point(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """`{"seq", "time"}` of what a process answered (`time_ns`, or `time` already printed)."""
    if not found:
        return None
    return {"seq": found["seq"], "time": iso_utc(found["time_ns"]) if "time_ns" in found else found.get("time")}


def when(time_ns: int) -> str:
    """A time for people: local with its offset, and UTC."""
    return both_zones(time_ns, zone_named(zone()))


def size_text(number: int | None) -> str:
    """Bytes for people, one decimal; `?` where unknown."""
    if number is None:
        return "?"
    value, unit = float(number), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value == int(value) else f"{value:.1f} {unit}"


def table(title: str, *columns: str) -> Table:
    """An empty table in the style of all."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False)
    for column in columns:
        made.add_column(column, overflow="fold")  # a path that is cut off helps nobody
    return made


def show_error(error: CdpError, as_json: bool) -> None:
    """The sentence and the hint on stderr; the same in JSON on stdout where that was asked for."""
    if as_json:
        body = error.to_dict()
        emit({"error": body | {"before": point(body["before"]), "after": point(body["after"])}})
    err.print(f"[bold red]cdp:[/] {_plain(error.message)}")
    if error.hint:
        err.print(f"     {_plain(error.hint)}")


def _plain(text: str) -> str:
    """Text that came from elsewhere is no markup."""
    return text.replace("[", "\\[")


def leave(code: int) -> NoReturn:
    """Ends the command with an exit code that is no failure of its own (`status`, `verify`)."""
    raise typer.Exit(code)
