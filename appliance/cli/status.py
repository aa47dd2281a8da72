"""`cdp status`: how every group and volume is doing; the exit code says healthy or not."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

import typer
from rich.console import Group as Lines
from rich.markup import escape

from appliance import health, paths
from appliance.cli.context import Json, client, config, emit, leave, out, size_text, table
from cdp.errors import CdpError, UnreachableError
from cdp.recovery.times import duration

NOT_HEALTHY = 1
# Every rollback of the window leaves a gap; the newest tell what is going on.
SHOWN_GAPS = 3
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
    errors: dict[str, CdpError] = {}
    relayed = config().journal.kind == "kafka"
    roles = (paths.REPLAYER, *([paths.RELAY] if relayed else []), paths.COLLECTOR)
    for role in roles:  # in this order: what is applied was in the journal before
        try:
            answers[role] = client().status(role)
        except CdpError as e:  # a token that is refused is no reason to be silent about the others
            answers[role] = None
            errors[role] = e
    if len(errors) == len(answers):
        refused = [e for e in errors.values() if not isinstance(e, UnreachableError)]
        if refused:
            raise refused[0]
        raise UnreachableError(f"None of {', '.join(roles)} can be reached.", next(iter(errors.values())).hint)
    groups = [
        {
            "name": g.name, "window_ns": g.window_ns, "max_lag_ns": g.max_lag,
            "volumes": [{"name": v.name, "size": v.size, "primary": v.primary} for v in g.volumes],
        }
        for g in config().groups
    ]  # fmt: skip
    collector, replayer = answers[paths.COLLECTOR], answers[paths.REPLAYER]
    answer = health.status(groups, collector, replayer, answers.get(paths.RELAY), relayed)
    return answer | {"unreached": {role: str(error) for role, error in errors.items()}}


def _page(answer: dict[str, Any]) -> Lines:
    groups = table("", "group", "state", "lag", "window", "journal", "history")
    volumes = table("", "volume", "state", "size", "clients", "primary")
    reasons: list[str] = []
    for group in answer["groups"]:
        window, replay = group["window"], group["replay"]
        groups.add_row(
            f"[bold]{group['name']}[/]", _state(group), _lag(replay), _window(window),
            size_text(group["journal"]["bytes"]), size_text(group["history"]["bytes"]),
        )  # fmt: skip
        for volume in group["volumes"]:
            clients = volume["clients"] if volume["clients"] is not None else "?"
            volumes.add_row(
                volume["name"], _state(volume) + _progress(volume), size_text(volume["size"]), str(clients),
                volume["primary"],
            )  # fmt: skip
        reasons += _reasons(group)
    reasons += map(escape, answer.get("unreached", {}).values())
    running = ", ".join(f"{role} {pid or 'not running'}" for role, pid in answer["processes"].items())
    verdict = "[green]healthy[/]" if answer["healthy"] else "[bold red]not healthy[/]"
    return Lines(groups, "", volumes, "", *dict.fromkeys(reasons), f"{verdict} ({running})")


def _progress(volume: dict[str, Any]) -> str:
    progress = volume.get("progress")
    return f" {100 * progress['done_bytes'] // max(1, progress['total_bytes'])} %" if progress else ""


def _reasons(group: dict[str, Any]) -> Iterator[str]:
    """What is not fine, a sentence each; a group's reason that is one of its volumes' is said once."""
    volumes = [volume for volume in group["volumes"] if volume.get("reason")]
    own = [] if group.get("reason") in [volume["reason"] for volume in volumes] else [group]
    for part in (*own, *volumes):
        if part.get("reason"):
            yield f"{part['name']}: {part['reason'].get('text')} ({part['reason'].get('code')})"
    if group["window"]["short"]:
        yield f"{group['name']}: the window is shorter than configured; give history more space"
    gaps = group["window"]["gaps"] or []
    for gap in gaps[-SHOWN_GAPS:]:
        end = gap["to"]["seq"] if gap["to"] else "open"
        where = gap["volume"] or group["name"]
        yield f"{where}: no points from seq {gap['from']['seq']} to {end}: {gap['reason']['text']}"
    if len(gaps) > SHOWN_GAPS:
        yield f"{group['name']}: {len(gaps) - SHOWN_GAPS} earlier gaps; see `cdp points {group['name']}`"


def _window(window: dict[str, Any]) -> str:
    """How far back one can go, of what was asked for."""
    ends = [window[end]["time"] for end in ("oldest", "newest")]
    if None in ends:
        return "?"
    first, last = (datetime.fromisoformat(end[:26] + "Z") for end in ends)
    length = duration(int((last - first).total_seconds()) * 10**9).replace(".000 s", " s")
    configured = window["configured_seconds"]
    asked = f" of {duration(int(configured * 10**9))}" if configured is not None else ""
    return f"{length}{asked}"


def _state(part: dict[str, Any]) -> str:
    state = part["state"] or "unknown"
    return f"[{_STYLES.get(state, 'red')}]{state}[/]"


def _lag(replay: dict[str, Any]) -> str:
    if replay["lag_seconds"] is None:
        return "?"
    return f"{replay['lag_seconds']:.1f} s, {size_text(replay['lag_bytes'])}"
