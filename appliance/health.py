"""What `cdp status` says, from the figures of both processes: pure functions over plain data.

A group shows the worst state of its volumes on both sides; a process that cannot be reached leaves its figures null.
"""

from __future__ import annotations

from typing import Any

from cdp.recovery.times import iso_utc

# From best to worst. What the replayer cannot go on from outweighs what the collector is healing.
STATES = ("protected", "syncing", "resyncing", "rolling_back", "tracking", "forked", "stopped")
Figures = dict[str, Any]


def status(
    groups: list[dict[str, Any]],
    collector: dict[str, Any] | None,
    replayer: dict[str, Any] | None,
    relay: dict[str, Any] | None = None,
    relayed: bool = False,
) -> dict[str, Any]:
    """The body of `status --json`.

    `groups` are the configured ones: name, window_ns, max_lag_ns, volumes with name, size and primary. `collector`,
    `replayer` and `relay` are answers of the parents' status calls, None where a parent cannot be reached. `relayed`:
    the configuration has a relay.
    """
    ours, theirs, between = _figures(collector), _figures(replayer), _figures(relay)
    described = []
    for g in groups:
        carrier = _relay(_of(between, g["name"])) if relayed else None
        described.append(_group(g, ours, _of(ours, g["name"]), _of(theirs, g["name"]), carrier))
    fine = [group.pop("_healthy") for group in described]  # of every group: none may keep the key
    return {
        "healthy": all(fine),
        "groups": described,
        "processes": {
            "collector": collector["pid"] if collector else None,
            "replayer": replayer["pid"] if replayer else None,
            **({"relay": relay["pid"] if relay else None} if relayed else {}),
        },
    }


def _figures(answer: dict[str, Any] | None) -> Figures | None:
    return answer["figures"] if answer else None


def _of(figures: Figures | None, group: str) -> Figures | None:
    return figures["groups"].get(group) if figures else None


def point(found: dict[str, Any] | None) -> dict[str, Any]:
    """`{"seq", "time"}` of `{"seq", "time_ns"}`, null where unknown."""
    if not found:
        return {"seq": None, "time": None}
    return {"seq": found["seq"], "time": iso_utc(found["time_ns"])}


def _relay(found: Figures | None) -> Figures:
    """What is between the collector and the broker; unknown where it cannot be reached."""
    if found is None:
        text = "the relay cannot be reached: nothing is carried to Kafka"
        return {"state": None, "topic": None, "carried_seq": None, "reason": {"code": "unreachable", "text": text}}
    shown = {key: found[key] for key in ("state", "topic", "carried_seq")}
    return shown | ({"reason": found["reason"]} if found["reason"] else {})


def _group(
    configured: dict[str, Any], all_ours: Figures | None, c: Figures | None, r: Figures | None, relay: Figures | None
) -> Figures:
    volumes = [_volume(v, c, r) for v in configured["volumes"]]
    state, reason = _state(c, [(c or {}), (r or {}), (relay or {}), *volumes])
    journal = (c or {}).get("journal") or {}
    lag = _lag(all_ours, c, r)
    described = {
        "name": configured["name"],
        "state": state,
        "epoch": (c or {}).get("epoch"),
        "journal": {key: journal.get(key) for key in ("first_seq", "last_seq", "durable_seq", "bytes")},
        "replay": {"applied_seq": (r or {}).get("applied_seq"), **lag},
        "window": {
            "oldest": point((r or {}).get("oldest")),
            "newest": point((r or {}).get("newest")),
            "configured_seconds": _seconds(configured["window_ns"]),
            "short": (r or {}).get("window_short"),
            "gaps": None if r is None else [gap(g) for g in r.get("gaps") or []],
        },
        "history": {"bytes": (r or {}).get("history_bytes")},
        "volumes": volumes,
        "consumers": (c or {}).get("consumers"),
    }
    away = [role for role, figures in (("collector", c), ("replayer", r)) if figures is None]
    if away:
        text = f"the {' and the '.join(away)} cannot be reached: what only it knows is unknown"
        reason = reason or {"code": "unreachable", "text": text}
    if relay is not None:
        described["relay"] = relay
        reason = reason or relay.get("reason")
    if reason:
        described["reason"] = reason
    in_time = lag["lag_seconds"] is not None and lag["lag_seconds"] <= configured["max_lag_ns"] / 1e9
    described["_healthy"] = state == "protected" and in_time and not described["window"]["short"]
    replicated = (c or {}).get("replicated")
    if replicated is not None:
        described["replicated"] = replicated
        described["_healthy"] &= replicated["state"] == "replicated"
    described["_healthy"] &= relay is None or relay.get("state") == "carrying"
    return described


def gap(found: dict[str, Any]) -> dict[str, Any]:
    """A gap: of which volume, its first withheld point, the first good one after it (null: still open), and why."""
    end = point(found["to"]) if found["to"] else None
    return {"volume": found["volume"], "from": point(found["from"]), "to": end, "reason": found["reason"]}


def _volume(configured: dict[str, Any], c: Figures | None, r: Figures | None) -> Figures:
    ours = ((c or {}).get("volumes") or {}).get(configured["name"]) or {}
    theirs = ((r or {}).get("volumes") or {}).get(configured["name"]) or {}
    state, reason = _state(c, [ours, theirs])
    described = {
        "name": configured["name"],
        "size": ours.get("size", configured["size"]),
        "state": state,
        "primary": configured["primary"],
        "replica": theirs.get("replica"),
        "clients": ours.get("clients"),
        "progress": ours.get("progress"),
    }
    if reason:
        described["reason"] = reason
    return described


def _state(collector: Figures | None, sides: list[Figures]) -> tuple[str | None, dict[str, Any] | None]:
    """The worst of these; without the collector nobody knows whether production is served, let alone protected."""
    state, reason = _worst(sides)
    return (None, None) if collector is None and state == STATES[0] else (state, reason)


def _worst(sides: list[Figures]) -> tuple[str | None, dict[str, Any] | None]:
    """The worst state among these and the reason that goes with it; None where none is known."""
    known = [side for side in sides if side.get("state") in STATES]
    if not known:
        return None, None
    worst = max(known, key=lambda side: STATES.index(side["state"]))
    same = [side.get("reason") for side in known if side["state"] == worst["state"] and side.get("reason")]
    return worst["state"], same[0] if same else None


def _seconds(duration_ns: int | None) -> int | float | None:
    if duration_ns is None:
        return None
    return duration_ns // 10**9 if duration_ns % 10**9 == 0 else duration_ns / 1e9


def _lag(all_ours: Figures | None, c: Figures | None, r: Figures | None) -> dict[str, Any]:
    """Records, bytes and seconds that the replica is behind; null where one side is unknown."""
    last = ((c or {}).get("journal") or {}).get("last_seq")
    applied = (r or {}).get("applied_seq")
    if all_ours is None or last is None or applied is None or r is None:
        return {"lag_seq": None, "lag_bytes": (r or {}).get("lag_bytes"), "lag_seconds": None}
    lag_seq = max(0, last - applied)
    seconds = 0.0
    if lag_seq:
        # The first record not applied may not have reached the replayer: then it is later than the last applied.
        since_ns = r.get("next_time_ns") or r.get("applied_time_ns") or all_ours["time_ns"]
        seconds = max(0, all_ours["time_ns"] - since_ns) / 1e9
    return {"lag_seq": lag_seq, "lag_bytes": r.get("lag_bytes"), "lag_seconds": seconds}
