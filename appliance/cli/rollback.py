"""`cdp rollback`: puts a volume or a group back to a point, onto the primaries."""

from __future__ import annotations

import os
import sys
import threading
from datetime import UTC
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from appliance import paths
from appliance.cli.context import Json, client, config, emit, err, named, out, when, zone
from appliance.settings import rollback_settings
from cdp import storage
from cdp.config import Group, Volume
from cdp.errors import NotFoundError, RefusedError, UnreachableError, UsageError, from_dict
from cdp.recovery import job as jobs
from cdp.recovery.plan import Plan, Space, plan
from cdp.recovery.times import parse_iso, read_in, zone_named

# Between two looks at a job that runs: a progress bar that moves; without one only its end is waited for.
LOOK_SECONDS, QUIET_SECONDS = 0.1, 10.0
# Between two looks at one that does not run, until somebody runs it again.
PAUSE_SECONDS = 0.1
# A replayer's parent that is started again meanwhile is back by then.
AWAY_SECONDS = 60.0
_ANSWER = ("target", "bookmark", "begin", "end", "bytes", "extents", "group", "volumes", "direction")


def add_to(app: typer.Typer) -> None:
    app.command(
        epilog="Examples: cdp rollback db --to -10m    cdp rollback shop --to before-upgrade --yes    "
        "cdp rollback db --undo"
    )(rollback)


def rollback(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A volume, or a group: all its volumes together.")],
    to: Annotated[str | None, typer.Option(metavar="POINT", help="-10m, a bookmark, a time, seq:N …")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be done.")] = False,
    disconnect: Annotated[bool, typer.Option("--disconnect", help="Cut off clients that have it open.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with one that was interrupted.")] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Put back what was there when it began.")] = False,
    abandon: Annotated[bool, typer.Option("--abandon", help="Unlock the volumes as they are.")] = False,
    as_json: Json = False,
) -> None:
    """Put a volume or a group back to a point. Nothing is lost: the state before it can be rolled back to as well."""
    group, volume = named(name)
    volumes = [volume] if volume else group.volumes
    chosen = [action for action, wanted in zip(paths.ROLLBACK_ACTIONS, (resume, undo, abandon), strict=True) if wanted]
    if len(chosen) + (to is not None) != 1:
        hint = f"For example: cdp rollback {name} --to -10m"
        raise UsageError("Give one of --to, --resume, --undo and --abandon.", hint)
    if chosen:
        job: dict[str, Any] | None = _act(chosen[0], group, volumes)
    else:
        job = _begin(group, volumes, to or "", yes, dry_run, disconnect, as_json)
    if job is None:
        return
    finished = job if not job["active"] else _follow(job, as_json)
    if chosen and chosen[0] != "resume" and finished["direction"] != chosen[0]:
        hint = f"Roll back to {finished['bookmark']} for the state before it."
        raise RefusedError(f"The rollback of {name} had come to its end before: it is done.", hint, code="busy")
    if as_json:
        emit({key: finished[key] for key in _ANSWER})
    else:
        _report(finished)


def _begin(
    group: Group, volumes: list[Volume], to: str, yes: bool, dry_run: bool, disconnect: bool, as_json: bool
) -> dict[str, Any] | None:
    """The started job; None after a dry run."""
    for volume in volumes:
        if volume.primary == "none":
            raise RefusedError(f"{volume.name} has no primary to roll back.", "Export the point instead.",
                               code="unsupported")  # fmt: skip
    names = [volume.name for volume in volumes]
    found = plan(client(), group.name, names, to, zone_named(zone()), storage.wall_ns())
    if as_json and dry_run:
        emit(found.to_json())
        return None
    if not as_json:
        out.print("\n".join(found.describe()))
    if dry_run:
        return None
    free = client().replayer("space", group=group.name)["free_bytes"]
    found.check(Space(history_free_bytes=free, journal_room_bytes=None), disconnect)
    if not yes:
        _ask(found, as_json)
    return client().begin_rollback(
        {
            "group": found.group, "volumes": found.volumes, "target_seq": found.target_seq,
            "target_time_ns": found.target_time_ns, "expression": found.expression, "disconnect": disconnect,
        }
    )  # fmt: skip


def _ask(found: Plan, as_json: bool) -> None:
    console = err if as_json else out
    answer = ""
    if sys.stdin is not None and (sys.stdin.isatty() or not as_json):  # None: it is closed
        console.print(f"Roll {' and '.join(found.volumes)} back? \\[y/N] ", end="")
        answer = sys.stdin.readline()
        if not answer.endswith("\n"):  # nobody there who could type one
            console.print()
    if answer.strip().lower() not in ("y", "yes"):
        raise RefusedError("Declined; nothing was changed.", "Use --yes to roll back without being asked.",
                           code="declined")  # fmt: skip


def _act(action: str, group: Group, volumes: list[Volume]) -> dict[str, Any]:
    names = {volume.name for volume in volumes}
    try:
        active = [job for job in client().rollbacks() if job["active"] and names & set(job["volumes"])]
        if active:
            return client().act_on_rollback(active[0]["id"], action)
    except UnreachableError:
        if action != "abandon":
            raise
        return _abandon_here(names)
    raise NotFoundError(f"There is no unfinished rollback of {group.name if len(names) > 1 else names.pop()}.")


def _abandon_here(names: set[str]) -> dict[str, Any]:
    """Without the replayer and its parent: by this process, from the job's file."""
    from appliance import rollback_child

    folder = os.path.join(paths.folder(config().appliance.state_dir, paths.REPLAYER), paths.ROLLBACKS)
    files = sorted(name for name in os.listdir(folder) if name.endswith(".json")) if os.path.isdir(folder) else []
    for name in files:
        path = os.path.join(folder, name)
        job = jobs.load(path)
        if job.active and names & set(job.volumes):
            ended = rollback_child.run(rollback_settings(config(), path, jobs.ABANDON), lambda _: None, lambda _: None)
            return ended.to_json() | {"active": False, "failure": None}
    raise NotFoundError(f"There is no unfinished rollback of {', '.join(sorted(names))}.")


def _follow(job: dict[str, Any], quiet: bool) -> dict[str, Any]:
    """The job at its end, with a bar until then. Raises the error that it stopped with."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    pause, gone_ns = threading.Event(), 0
    hidden = quiet or not err.is_terminal
    with Progress(*columns, console=err, disable=hidden, transient=True) as bar:
        task = bar.add_task("lock", total=None)
        while job["running"] or (job["active"] and not job["failure"]):
            if not job["running"]:
                pause.wait(PAUSE_SECONDS)
            try:
                job = client().rollback(job["id"], QUIET_SECONDS if hidden else LOOK_SECONDS)
            except UnreachableError:
                job["running"] = False
            if job["running"]:
                gone_ns = 0
            elif job["active"] and not job["failure"]:
                gone_ns = gone_ns or storage.monotonic_ns()
                if storage.monotonic_ns() - gone_ns > AWAY_SECONDS * 1e9:
                    raise _interrupted(job)
            at = job["progress"]
            if at:
                text = f"{at['step']} {at['volume'] or ''}"
                bar.update(task, description=text, completed=at["done_bytes"], total=at["total_bytes"] or None)
    if job["failure"]:
        raise from_dict(job["failure"], job["failure"]["exit_code"])
    return job


def _interrupted(job: dict[str, Any]) -> UnreachableError:
    names = " and ".join(job["volumes"])
    return UnreachableError(
        f"The rollback of {names} was interrupted at step {job['step']!r}: the replayer is not running.",
        "It goes on by itself when the replayer runs again; --undo and --abandon end it.",
    )


def _report(job: dict[str, Any]) -> None:
    names = " and ".join(job["volumes"])
    if job["direction"] == jobs.ABANDON:
        out.print(f"The rollback of {names} was abandoned: unlocked as it is.")
    elif job["direction"] == jobs.UNDO:
        out.print(f"The rollback of {names} was undone: it is as it was when the rollback began.")
    else:
        target, written = job["target"], parse_iso(job["target"]["time"] or "")
        at = f", {when(read_in(written, UTC).times_ns[0])}" if written else ""
        out.print(f"[green]{names}[/] is as it was at seq {target['seq']}{at}, proven.")
        out.print(f"{job['bytes'] or 0:,} bytes in {job['extents'] or 0:,} extents were written.")
    if job["bookmark"]:
        out.print(f"The state before it is the bookmark [bold]{job['bookmark']}[/].")
