"""The files of the deployment, read as the programs read them that they are for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent.parent
COMPOSE, THREE = ROOT / "docker-compose.yml", ROOT / "docker-compose.three.yml"
CONFIGS = ROOT / "appliance" / "compose"
DOCKERFILE = ROOT / "appliance" / "Dockerfile"
ROLES = ("collector", "relay", "replayer")
# `${NAME:-default}`, the one form that is used.
_VARIABLE = re.compile(r"\$\{([A-Z_]+):-([^}]*)\}")
# Its image is the only one that is in none of the registries that every developer reaches.
GRAFANA = "grafana"


def plain(text: str, environ: Mapping[str, str] | None = None) -> str:
    """A value as Compose sees it, from the environment or by its default."""
    return _VARIABLE.sub(lambda found: (environ or {}).get(found[1], found[2]), text)


def compose(path: Path = COMPOSE) -> dict[str, Any]:
    """The whole file; `<<` is resolved."""
    content = yaml.safe_load(path.read_text())
    assert isinstance(content, dict)
    return content


def services() -> dict[str, dict[str, Any]]:
    """By name."""
    found: dict[str, dict[str, Any]] = compose()["services"]
    return found


def mounts(service: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """What is mounted where: path in the container → (volume or path, `ro` or `rw`)."""
    found = {}
    for text in service.get("volumes", ()):
        source, target, *mode = text.split(":")
        found[target] = (source, mode[0] if mode else "rw")
    return found


def published(service: dict[str, Any]) -> list[tuple[str, int, int]]:
    """(host address, host port, port in the container) of each published port, by the defaults."""
    parts = (plain(text).split(":") for text in service.get("ports", ()))
    return [(host, int(outside), int(inside)) for host, outside, inside in parts]


def prometheus_targets() -> dict[str, list[str]]:
    """Job → `host:port` of each target."""
    scraped = yaml.safe_load((ROOT / "grafana" / "prometheus.yml").read_text())["scrape_configs"]
    return {job["job_name"]: [t for static in job["static_configs"] for t in static["targets"]] for job in scraped}


def dashboards() -> dict[str, dict[str, Any]]:
    """File name → dashboard."""
    found = sorted((ROOT / "grafana" / "dashboards").glob("*.json"))
    return {path.name: json.loads(path.read_text()) for path in found}


def expressions(dashboard: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(title of the panel, PromQL) of each target; Grafana's own variables stand for everything, and for a minute."""
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"].replace("$group", ".*").replace("$__rate_interval", "1m")
