"""A group of which one volume is in a gap, and one came later: what is offered of each, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.nbd import NbdClient, NbdRefused
from tests.support.running import Appliance, wait_for

SIZE = 4 << 20
pytestmark = pytest.mark.xdist_group("appliance-one-of-two")


def states(appliance: Appliance) -> dict[str, str]:
    (group,) = appliance.look()["groups"]
    return {v["name"]: v["state"] for v in group["volumes"]}


def opens(appliance: Appliance, export: str) -> bool:
    try:
        with NbdClient(appliance.socket("replayer"), export):
            return True
    except NbdRefused:
        return False


def test_what_one_volume_lacks_is_said_and_kept_from_nobody_else(tmp_path: Path) -> None:
    """Promise 8: what cannot be opened is not listed; what can be, is, and the answer tells them apart."""
    appliance = Appliance(tmp_path / "x", {"db": SIZE})
    try:
        appliance.start()
        appliance.wait_protected()
        with NbdClient(appliance.socket("collector"), "db") as client:
            client.write(0, b"a" * 4096)
            client.flush()
        appliance.bookmark("early")
        appliance.stop()
        with open(appliance.primary("db"), "r+b") as file:
            file.write(b"somebody else")
        appliance.volumes["late"] = SIZE
        appliance.write_config()
        appliance.start()
        wait_for(lambda: states(appliance) == {"db": "stopped", "late": "protected"}, "one stopped, one protected")
        with NbdClient(appliance.socket("collector"), "late") as client:
            client.flush()
        check_bookmarks(appliance)
        check_points(appliance)
        (gap,) = appliance.json("status", expect=(1,))["groups"][0]["window"]["gaps"]
        assert (gap["volume"], gap["to"], gap["reason"]["code"]) == ("db", None, "primary_changed")
        assert "db: no points from seq" in appliance.cli("status", expect=(1,))
        appliance.stop()
    finally:
        appliance.end()


def check_bookmarks(appliance: Appliance) -> None:
    answer = appliance.json("bookmark", "shop", "half", "--wait")
    (withheld,) = answer["withheld"]
    assert (withheld["volume"], withheld["reason"]["code"]) == ("db", "primary_changed")
    said = appliance.cli("bookmark", "shop", "half-again", "--wait")
    assert "Warning: db cannot be opened at it" in said
    assert opens(appliance, "late@half") and not opens(appliance, "db@half")


def check_points(appliance: Appliance) -> None:
    late: dict[str, Any] = appliance.json("points", "late")
    assert [b["name"] for b in late["bookmarks"]] == ["half", "half-again"]
    listed = [p["seq"] for p in (late["oldest"], *late["barriers"], *late["bookmarks"])]
    assert len(late["barriers"]) == 1 and all(opens(appliance, f"late@seq:{seq}") for seq in listed)
    assert not opens(appliance, f"late@seq:{late['oldest']['seq'] - 1}")
    group = appliance.json("points", "shop")
    assert "early" in [b["name"] for b in group["bookmarks"]]
    assert [g["volume"] for g in group["gaps"]] == ["db"]
