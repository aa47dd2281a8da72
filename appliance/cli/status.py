"""`cdp status`: how every group and volume is doing; the exit code says healthy or not."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import typer
from rich.console import Group as Lines

from appliance import health, paths
from appliance.cli.context import Json, client, config, emit, leave, out, table
from cdp.config import format_size
from cdp.errors import CdpError, UnreachableError
from cdp.recovery.times import duration

NOT_HEALTHY = 1
_STYLES = {"protected": "green", "syncing": "yellow", "resyncing": "yellow", "rolling_back": "yellow"}


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Example: cdp status --json | jq .healthy")(status)


def status(as_json: Json = False) -> None:
    """Show groups and volumes: state, lag, window, sizes. Exit code 0: healthy, 1: not, 5: nothing is running."""
    answer = gather()
    emit(answer) if as_json else out.print(_page(answer))
    if not answer["healthy"]:
        leave(NOT_HEALTHY)


def gather() -> dict[str, Any]:
    """What `--json` prints. Raises UnreachableError when no process answers."""
    answers: dict[str, dict[str, Any] | None] = {}
    errors: list[CdpError] = []
    for role in (paths.REPLAYER, paths.COLLECTOR):  # in this order: what is applied was in the journal before
        try:
            answers[role] = client().status(role)
        except UnreachableError as e:
            answers[role] = None
            errors.append(e)
    if len(errors) == len(answers):
        raise UnreachableError("Neither collector nor replayer can be reached.", "Start them with `cdp up`.")
    groups = [
        {
            "name": g.name, "window_ns": g.window_ns, "max_lag_ns": g.max_lag,
            "volumes": [{"name": v.name, "size": v.size, "primary": v.primary} for v in g.volumes],
        }
        for g in config().groups
    ]  # fmt: skip
    return health.status(groups, answers[paths.COLLECTOR], answers[paths.REPLAYER])


def _page(answer: dict[str, Any]) -> Lines:
    shown = table("", "name", "state", "lag", "window", "journal", "history")
    reasons = []
    for group in answer["groups"]:
        window, replay = group["window"], group["replay"]
        shown.add_row(
            f"[bold]{group['name']}[/]", _state(group), _lag(replay),
            _window(window),
            _size(group["journal"]["bytes"]), _size(group["history"]["bytes"]),
        )  # fmt: skip
        for volume in group["volumes"]:
            progress = volume.get("progress")
            done = f" {100 * progress['done_bytes'] // max(1, progress['total_bytes'])} %" if progress else ""
            shown.add_row(f"  {volume['name']}", _state(volume) + done, format_size(volume["size"]), volume["primary"])
        for part in (group, *group["volumes"]):
            if part.get("reason"):
                reasons.append(f"{part['name']}: {part['reason'].get('text')} ({part['reason'].get('code')})")
        if window["short"]:
            reasons.append(f"{group['name']}: the window is shorter than configured; give history more space")
        for gap in window["gaps"]:
            end = gap["to"]["seq"] if gap["to"] else "open"
            reasons.append(f"{group['name']}: gap from seq {gap['from']['seq']} to {end}: {gap['reason']['text']}")
    running = ", ".join(f"{role} {pid or 'not running'}" for role, pid in answer["processes"].items())
    verdict = "[green]healthy[/]" if answer["healthy"] else "[bold red]not healthy[/]"
    return Lines(shown, "", *dict.fromkeys(reasons), f"{verdict} ({running})")


def _window(window: dict[str, Any]) -> str:
    """How far back one can go, of what was asked for."""
    ends = [window[end]["time"] for end in ("oldest", "newest")]
    if None in ends:
        return "?"
    first, last = (datetime.fromisoformat(end[:26] + "Z") for end in ends)
    configured = window["configured_seconds"]
    asked = f" of {duration(int(configured * 10**9))}" if configured is not None else ""
    return f"{duration(round((last - first).total_seconds()) * 10**9)}{asked}"


def _state(part: dict[str, Any]) -> str:
    state = part["state"] or "unknown"
    return f"[{_STYLES.get(state, 'red')}]{state}[/]"


def _lag(replay: dict[str, Any]) -> str:
    if replay["lag_seconds"] is None:
        return "?"
    return f"{replay['lag_seconds']:.1f} s, {_size(replay['lag_bytes'])}"


def _size(number: int | None) -> str:
    if number is None:
        return "?"
    value, unit = float(number), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
