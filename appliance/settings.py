"""What a child is told: plain data made from the configuration, so that children need not know its model."""

from __future__ import annotations

import dataclasses
from typing import Any

from appliance import paths
from appliance.reaching import Reach
from cdp.config import Config, Group
from cdp.config_kafka import SECURITY_KEYS
from cdp.config_sections import Collector, Replayer


def child_settings(role: str, config: Config) -> dict[str, Any]:
    """Sizes in bytes, times in ns, paths absolute."""
    return {
        "state_dir": config.appliance.state_dir,
        "listen": _listen(role, config),
        "segment_size": config.journal.segment_size,
        "max_size": config.journal.max_size,
        "kafka": _kafka(config),
        "groups": [
            {
                "name": group.name,
                "replicated": _replicated(group),
                "window_ns": group.window_ns,
                "window_bytes": group.window_size,
                "volumes": [{"name": v.name, "primary": v.primary, "size": v.size} for v in group.volumes],
            }
            for group in config.groups
        ],
    }


def _listen(role: str, config: Config) -> list[str]:
    if role == paths.RELAY:
        return []
    return config.collector.listen if role == paths.COLLECTOR else config.replayer.listen


def _replicated(group: Group) -> dict[str, Any] | None:
    """None: a flush waits for this machine alone."""
    if group.ack != "replicated":
        return None
    return {"timeout_ns": group.replicated_timeout, "local_after_timeout": group.replicated_fallback == "local"}


def _kafka(config: Config) -> dict[str, Any] | None:
    """None: the journal is embedded alone."""
    j = config.journal
    if j.kind != "kafka":
        return None
    return {
        "bootstrap_servers": j.bootstrap_servers,
        "topic_prefix": j.topic_prefix,
        "replication_factor": j.replication_factor,
        "min_insync_replicas": j.min_insync_replicas,
        "retention_ns": j.retention,
        "keep_after_ack_ns": j.keep_after_ack,
        "security": {name: getattr(j, name) for name in sorted(SECURITY_KEYS)},
    }


def reach(config: Config) -> Reach:
    """How the processes of this configuration are reached."""
    roles = {paths.COLLECTOR: config.collector, paths.RELAY: config.relay, paths.REPLAYER: config.replayer}
    servers: dict[str, Collector | Replayer] = {paths.COLLECTOR: config.collector, paths.REPLAYER: config.replayer}
    return Reach(
        state_dir=config.appliance.state_dir,
        listen={role: section.listen for role, section in servers.items()},
        control_at={role: section.control_at for role, section in roles.items() if section.control_at},
        nbd_at={role: section.nbd_at for role, section in servers.items() if section.nbd_at},
        token_file=config.control.token_file,
        ca=config.control.ca,
    )


def rollback_settings(config: Config, path: str, direction: str | None) -> dict[str, Any]:
    """What the process of the rollback job at `path` is told; `direction` None: as the job says."""
    return {"path": path, "direction": direction, "reach": dataclasses.asdict(reach(config))}
