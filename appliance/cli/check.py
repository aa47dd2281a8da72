"""`cdp check`: with the appliance down, puts the replica to its committed seq."""

from __future__ import annotations

from typing import Any

import typer

from appliance import paths
from appliance.cli.context import Json, config, emit, out
from cdp.recovery.times import iso_utc


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Example: cdp check && qemu-img info cdp-state/replayer/groups/shop/replica/db.raw")(check)


def check(as_json: Json = False) -> None:
    """Put every replica to its committed state, so that its file can be used by itself. Refused while it runs."""
    from cdp.replica import restart  # the history's libraries take longer to load than most commands to run

    c = config()
    found = restart.check(paths.folder(c.appliance.state_dir, paths.REPLAYER), c.journal.segment_size)
    if as_json:
        emit({"groups": {name: _plain(group) for name, group in found.items()}})
        return
    if not found:
        out.print("There is no replica yet.")
    for name, group in found.items():
        time_ns: Any = group["time_ns"]
        when = f" ({iso_utc(time_ns)})" if time_ns else ""
        out.print(f"{name}: at seq {group['committed_seq']}{when}; {group['blocks_put_back']} blocks were put back.")
        replicas: Any = group["replicas"]
        for volume, path in replicas.items():
            out.print(f"  {volume}: {path}")


def _plain(group: dict[str, Any]) -> dict[str, Any]:
    time_ns = group["time_ns"]
    return {
        "seq": group["committed_seq"],
        "time": iso_utc(time_ns) if time_ns else None,
        "blocks_put_back": group["blocks_put_back"],
        "replicas": group["replicas"],
    }
