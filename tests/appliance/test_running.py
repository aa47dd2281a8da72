"""A running appliance through its commands: the JSON shapes, the exit codes, every command once on real data."""

from __future__ import annotations

import json
import re
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.nbd import NbdClient
from tests.support.running import CDP, Appliance, running

SIZE = 8 << 20
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z")
pytestmark = pytest.mark.xdist_group("appliance-running")


@pytest.fixture(scope="module")
def appliance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    with running(tmp_path_factory.mktemp("a") / "x", {"db": SIZE, "log": SIZE}) as made:
        made.wait_protected()
        yield made


def write(appliance: Appliance, offset: int, data: bytes, volume: str = "db") -> None:
    with NbdClient(appliance.socket("collector"), volume) as client:
        client.write(offset, data)
        client.flush()


def read(appliance: Appliance, export: str, side: str = "replayer") -> bytes:
    with NbdClient(appliance.socket(side), export) as client:
        return client.read_all()


def is_point(found: Any) -> bool:
    return set(found) == {"seq", "time"} and isinstance(found["seq"], int) and bool(TIME.fullmatch(found["time"]))


def error_of(appliance: Appliance, code: int, *arguments: str) -> dict[str, Any]:
    """The error under --json; stderr must be a sentence and never a traceback."""
    done = appliance.run(*arguments, "--json")
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.startswith("cdp: ") and "Traceback" not in done.stderr
    error = json.loads(done.stdout)["error"]
    assert set(error) == {"code", "message", "hint", "before", "after"}
    return dict(error)


def test_status_has_the_shape_that_scripts_rely_on(appliance: Appliance) -> None:
    status = appliance.json("status")
    assert status["healthy"] is True and all(status["processes"].values())
    (group,) = status["groups"]
    assert (group["name"], group["state"]) == ("shop", "protected")
    assert set(group["journal"]) == {"first_seq", "last_seq", "durable_seq", "bytes"}
    assert set(group["replay"]) == {"applied_seq", "lag_seq", "lag_bytes", "lag_seconds"}
    assert is_point(group["window"]["oldest"]) and is_point(group["window"]["newest"])
    assert group["window"]["configured_seconds"] == 86400 and group["window"]["short"] is False
    assert [v["name"] for v in group["volumes"]] == ["db", "log"]
    assert all({"size", "state", "primary", "replica"} <= set(v) for v in group["volumes"])
    assert "protected" in appliance.cli("status")


def test_sockets_are_private(appliance: Appliance) -> None:
    for side in ("collector", "replayer"):
        mode = (appliance.folder / "state" / side / "api.sock").stat().st_mode
        assert stat.S_IMODE(mode) == 0o600


def test_bookmarks_points_diff_and_times_that_come_back(appliance: Appliance) -> None:
    write(appliance, 0, b"a" * 8192)
    made = appliance.json("bookmark", "shop", "first", "--wait")
    assert (made["group"], made["name"]) == ("shop", "first") and is_point({k: made[k] for k in ("seq", "time")})
    write(appliance, 4096, b"b" * 4096)
    second = appliance.json("bookmark", "db", "second", "--wait")
    points = appliance.json("points", "db", "--limit", "1")
    assert (points["volume"], points["group"]) == ("db", "shop")
    assert [b["name"] for b in points["bookmarks"]][-2:] == ["first", "second"]
    assert len(points["barriers"]) == 1 and is_point(points["barriers"][0]) and points["gaps"] == []
    diff = appliance.json("diff", "db@first", f"db@{second['time']}")
    assert diff["extents"] == [{"offset": 4096, "length": 4096}] and diff["bytes"] == 4096
    assert diff["from"] == {"seq": made["seq"], "time": made["time"]} and diff["to"]["seq"] == second["seq"]
    assert read(appliance, "db@first")[:8192] == b"a" * 8192
    assert appliance.json("points", "shop")["volume"] is None


def test_export_is_the_point_and_never_overwrites(appliance: Appliance, tmp_path: Path) -> None:
    write(appliance, 1 << 20, b"e" * 4096)
    appliance.bookmark("exported")
    write(appliance, 1 << 20, b"f" * 4096)
    file = tmp_path / "out.raw"
    answer = appliance.json("export", "db@exported", str(file))
    assert is_point(answer["point"]) and file.read_bytes() == read(appliance, "db@exported")
    assert error_of(appliance, 4, "export", "db@exported", str(file))["code"] == "exists"
    assert "out.raw" in appliance.cli("export", "db@exported", str(tmp_path / "sub-out.raw"))
    quiet = appliance.run("export", "db@exported", str(tmp_path / "second.raw"))
    assert quiet.stderr == "" and answer["point"]["time"] in quiet.stdout  # no bar where nobody looks
    assert appliance.run("export", "db@exported", str(tmp_path / "no" / "x.raw")).returncode == 6


def test_verify_compares_the_whole_volume(appliance: Appliance) -> None:
    answer = appliance.json("verify", "db")
    assert set(answer) == {"volume", "seq", "equal", "mismatches"}
    assert (answer["volume"], answer["equal"], answer["mismatches"]) == ("db", True, [])
    assert "equal" in appliance.cli("verify", "shop")


def test_rollback_and_forward_again(appliance: Appliance) -> None:
    write(appliance, 2 << 20, b"1" * 4096)
    good = appliance.bookmark("good")
    write(appliance, 2 << 20, b"2" * 8192)
    bad = read(appliance, "db", "collector")
    dry = appliance.json("rollback", "db", "--to", "good", "--dry-run")
    assert dry["target"]["seq"] == good and (dry["bytes"], dry["extents"]) == (8192, 1)
    assert dry["begin"] is dry["end"] is dry["bookmark"] is None
    assert read(appliance, "db", "collector") == bad
    done = appliance.json("rollback", "db", "--to", "good", "--yes")
    assert done["target"]["seq"] == good and is_point(done["begin"]) and is_point(done["end"])
    assert (done["bytes"], done["extents"]) == (8192, 1)
    assert read(appliance, "db", "collector") == read(appliance, "db@good")
    assert done["bookmark"] == f"rollback-{done['begin']['seq']}"
    assert error_of(appliance, 4, "diff", f"db@seq:{done['begin']['seq'] + 1}", "db@now")["code"] == "in_rollback"
    barriers = [point["seq"] for point in appliance.json("points", "db")["barriers"]]  # the copying flushes too
    assert barriers and not [seq for seq in barriers if done["begin"]["seq"] < seq < done["end"]["seq"]]
    appliance.cli("rollback", "shop", "--to", done["bookmark"], "--yes")
    assert read(appliance, "db", "collector") == bad


def test_rollback_asks_and_refuses_while_clients_are_there(appliance: Appliance) -> None:
    appliance.bookmark("asked")
    assert error_of(appliance, 4, "rollback", "db", "--to", "asked")["code"] == "declined"
    closed = f'exec "{CDP}" --config "{appliance.config}" rollback db --to asked <&-'
    assert subprocess.run(["sh", "-c", closed], capture_output=True, check=False).returncode == 4
    with NbdClient(appliance.socket("collector"), "db"):
        assert error_of(appliance, 4, "rollback", "db", "--to", "asked", "--yes")["code"] == "busy"
        appliance.cli("rollback", "db", "--to", "asked", "--yes", "--disconnect")
    write(appliance, 0, b"back in service")


def test_resync_and_consumers(appliance: Appliance) -> None:
    assert "replayer" in appliance.json("consumer", "list", "shop")["consumers"]
    assert error_of(appliance, 3, "consumer", "list", "nobody")["code"] == "not_found"
    appliance.cli("resync", "log")
    appliance.wait_protected()
    assert appliance.json("verify", "log")["equal"] is True


@pytest.mark.parametrize(
    ("code", "word", "arguments"),
    [
        (2, "usage", ["points"]),
        (2, "usage", ["frobnicate"]),
        (2, "usage", ["diff", "db", "db@now"]),
        (2, "usage", ["diff", "db@now", "log@now"]),
        (2, "usage", ["rollback", "db"]),
        (2, "usage", ["rollback", "db", "--to", "now", "--undo"]),
        (2, "usage", ["export", "db@now", "/tmp/no-format"]),
        (2, "point_syntax", ["diff", "db@--10m", "db@now"]),
        (2, "point_syntax", ["bookmark", "shop", "now"]),
        (2, "point_syntax", ["bookmark", "shop", "rollback-1"]),
        (3, "not_found", ["points", "nope"]),
        (3, "not_found", ["diff", "db@never-was", "db@now"]),
        (3, "not_found", ["rollback", "db", "--undo"]),
        (4, "future", ["diff", "db@2199-01-01T00:00:00Z", "db@now"]),
        (4, "outside_window", ["export", "db@-3d", "/tmp/never-written.raw"]),
        (4, "beyond_newest", ["rollback", "db", "--to", "seq:999999999", "--yes"]),
    ],
)
def test_what_goes_wrong_has_its_exit_code_and_word(
    appliance: Appliance, code: int, word: str, arguments: list[str]
) -> None:
    assert error_of(appliance, code, *arguments)["code"] == word


def test_a_taken_name_is_refused_and_neighbours_are_named(appliance: Appliance) -> None:
    appliance.bookmark("taken")
    assert error_of(appliance, 4, "bookmark", "shop", "taken")["code"] == "name_taken"
    error = error_of(appliance, 4, "diff", "db@-3d", "db@now")
    assert error["before"] is None and is_point(error["after"])


def test_a_second_appliance_on_the_same_state_is_refused(appliance: Appliance) -> None:
    assert "in use" in str(error_of(appliance, 4, "check")["message"])
