"""The process that serves the primaries over NBD and splits their writes (`python -m appliance.collector_child`)."""

from __future__ import annotations

import sys
from typing import Any

from appliance import child
from appliance.paths import RELAY as RELAY_CONSUMER
from cdp.collector.replicated import ReplicatedSpec
from cdp.collector.service import Collector, GroupSpec, VolumeSpec


def make(settings: dict[str, Any]) -> tuple[Collector, Collector]:
    """The collector of these settings, which is what it exports too."""
    groups = [
        GroupSpec(
            name=group["name"],
            volumes=[VolumeSpec(v["name"], v["primary"], v["size"]) for v in group["volumes"]],
            replicated=ReplicatedSpec(**group["replicated"]) if group["replicated"] else None,
            consumers=["replayer"] if settings["kafka"] is None else [RELAY_CONSUMER],
        )
        for group in settings["groups"]
    ]
    collector = Collector(
        settings["state_dir"], groups, segment_bytes=settings["segment_size"], max_bytes=settings["max_size"],
        small_batches=settings["kafka"] is not None,
    )  # fmt: skip
    return collector, collector


if __name__ == "__main__":
    sys.exit(child.main(make))
