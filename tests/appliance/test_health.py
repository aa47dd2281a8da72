"""The rules of `status`: worst state, lag, null figures of what cannot be reached, healthy."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from appliance import health

SECOND = 10**9
GROUPS = [{"name": "shop", "window_ns": 86400 * SECOND, "max_lag_ns": 60 * SECOND,
           "volumes": [{"name": "db", "size": 4096, "primary": "file:/db"}]}]  # fmt: skip
COLLECTOR = {"pid": 11, "figures": {"time_ns": 100 * SECOND, "groups": {"shop": {
    "state": "protected", "reason": None, "epoch": 3, "consumers": {"replayer": 9},
    "journal": {"first_seq": 1, "last_seq": 10, "durable_seq": 10, "bytes": 500},
    "volumes": {"db": {"id": 0, "size": 8192, "state": "protected", "reason": None, "clients": 1, "progress": None}},
}}}}  # fmt: skip
REPLAYER = {"pid": 12, "figures": {"groups": {"shop": {
    "state": "protected", "reason": None, "applied_seq": 10, "applied_time_ns": 99 * SECOND, "lag_bytes": 0,
    "oldest": {"seq": 1, "time_ns": 0}, "newest": {"seq": 10, "time_ns": 99 * SECOND}, "window_short": False,
    "gaps": [], "history_bytes": 77, "next_time_ns": None,
    "volumes": {"db": {"replica": "/r/db.raw", "state": "protected", "reason": None}},
}}}}  # fmt: skip


def figures(side: dict[str, Any], **changes: Any) -> dict[str, Any]:
    changed = copy.deepcopy(side)
    changed["figures"]["groups"]["shop"].update(changes)
    return changed


@pytest.mark.parametrize(
    ("replicated", "healthy"),
    [(None, True)] + [({"state": s, "acknowledged_seq": 9, "waiting": 0}, s == "replicated")
                      for s in ("replicated", "local", "late", "fenced")],
)  # fmt: skip
def test_flushes_that_do_not_wait_for_the_carrier_are_not_healthy(replicated: Any, healthy: bool) -> None:
    answer = health.status(GROUPS, figures(COLLECTOR, replicated=replicated), REPLAYER)
    assert answer["healthy"] is healthy
    assert answer["groups"][0].get("replicated") == replicated


def test_the_shape_that_scripts_rely_on() -> None:
    answer = health.status(GROUPS, COLLECTOR, REPLAYER)
    group = answer["groups"][0]
    assert answer["healthy"] is True and answer["processes"] == {"collector": 11, "replayer": 12}
    assert (group["name"], group["state"], group["epoch"]) == ("shop", "protected", 3)
    assert group["journal"] == {"first_seq": 1, "last_seq": 10, "durable_seq": 10, "bytes": 500}
    assert group["replay"] == {"applied_seq": 10, "lag_seq": 0, "lag_bytes": 0, "lag_seconds": 0}
    assert group["window"]["oldest"] == {"seq": 1, "time": "1970-01-01T00:00:00.000000000Z"}
    assert group["window"]["newest"] == {"seq": 10, "time": "1970-01-01T00:01:39.000000000Z"}
    assert group["window"]["configured_seconds"] == 86400 and group["window"]["gaps"] == []
    assert group["history"] == {"bytes": 77} and "reason" not in group
    volume = group["volumes"][0]
    assert (volume["name"], volume["size"], volume["primary"]) == ("db", 8192, "file:/db")
    assert (volume["state"], volume["replica"]) == ("protected", "/r/db.raw")


@pytest.mark.parametrize(
    ("applied", "next_ns", "seconds", "healthy"),
    [(9, 98 * SECOND, 2.0, True), (9, 30 * SECOND, 70.0, False), (9, None, 1.0, True), (10, None, 0, True),
     (11, None, 0, True)],
)  # fmt: skip
def test_lag_is_the_age_of_the_first_record_not_applied(
    applied: int, next_ns: int | None, seconds: float, healthy: bool
) -> None:
    answer = health.status(GROUPS, COLLECTOR, figures(REPLAYER, applied_seq=applied, next_time_ns=next_ns))
    assert answer["groups"][0]["replay"]["lag_seconds"] == seconds
    assert answer["healthy"] is healthy


@pytest.mark.parametrize(("ours", "theirs", "worst"), [
    ("protected", "syncing", "syncing"), ("resyncing", "syncing", "resyncing"), ("stopped", "protected", "stopped"),
    ("rolling_back", "forked", "forked"), ("syncing", "stopped", "stopped"),
])  # fmt: skip
def test_a_group_shows_the_worst_of_both_sides(ours: str, theirs: str, worst: str) -> None:
    why = {"code": "x", "text": "because"}
    volumes = {"db": {"replica": "/r", "state": theirs, "reason": why if theirs == worst else None}}
    collector = figures(COLLECTOR, state=ours, reason=why if ours == worst else None)
    answer = health.status(GROUPS, collector, figures(REPLAYER, volumes=volumes))
    assert (answer["groups"][0]["state"], answer["groups"][0]["reason"]) == (worst, why)
    assert answer["healthy"] is False


def test_what_cannot_be_reached_is_null() -> None:
    for collector, replayer in ((None, REPLAYER), (COLLECTOR, None), ({"pid": None, "figures": None}, REPLAYER)):
        answer = health.status(GROUPS, collector, replayer)
        group = answer["groups"][0]
        assert answer["healthy"] is False and group["replay"]["lag_seconds"] is None
        assert group["reason"]["code"] == "unreachable"
        missing = group["journal"] if replayer else group["window"]["oldest"]
        assert set(missing.values()) == {None}
        assert set(group) == {*health.status(GROUPS, COLLECTOR, REPLAYER)["groups"][0], "reason"}


def test_nobody_calls_protected_what_only_the_collector_knows() -> None:
    group = health.status(GROUPS, None, REPLAYER)["groups"][0]
    assert group["state"] is None and group["volumes"][0]["state"] is None and "collector" in group["reason"]["text"]
    forked = health.status(GROUPS, None, figures(REPLAYER, state="forked", reason={"code": "forked", "text": "why"}))
    assert (forked["groups"][0]["state"], forked["groups"][0]["reason"]["code"]) == ("forked", "forked")
    alone = health.status(GROUPS, COLLECTOR, None)["groups"][0]
    assert alone["state"] == "protected" and alone["window"]["gaps"] is None and "replayer" in alone["reason"]["text"]


def test_a_short_window_is_not_healthy() -> None:
    assert health.status(GROUPS, COLLECTOR, figures(REPLAYER, window_short=True))["healthy"] is False
