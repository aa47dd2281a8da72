"""What Grafana is given: its dashboards chart metrics that exist, from the datasource that is provisioned."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import yaml

from appliance import metrics
from tests.compose.files import GRAFANA, ROOT, dashboards, expressions, mounts, services

DASHBOARDS = dashboards()
PROVISIONING = ROOT / "grafana" / "provisioning"


@pytest.fixture(params=DASHBOARDS)
def dashboard(request: pytest.FixtureRequest) -> dict[str, Any]:
    return DASHBOARDS[request.param]


def test_every_metric_exists(dashboard: dict[str, Any]) -> None:
    """By name; that labels and expressions fit is seen with a real Prometheus (`make test-compose`)."""
    known = set(re.findall(r'"(cdp_[a-z_]+)"', inspect.getsource(metrics)))
    charted = set()
    for title, expression in expressions(dashboard):
        names = set(re.findall(r"\bcdp_[a-z_]+", expression))
        assert names <= known, f"{title}: there is no metric {', '.join(sorted(names - known))}"
        charted |= names
    assert charted


def test_panels_are_whole(dashboard: dict[str, Any]) -> None:
    """Each says what it is for; none lies on another; all ask the provisioned datasource."""
    sources = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yml").read_text())["datasources"]
    uids = {source["uid"] for source in sources}
    seen: dict[tuple[int, int], str] = {}
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert len(numbers) == len(set(numbers))
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert x < 24 and (x, y) not in seen, f"{panel['title']} lies on {seen.get((x, y))}"
                seen[x, y] = panel["title"]
        if panel["type"] != "row":
            assert panel["description"] and panel["targets"]
            assert {panel["datasource"]["uid"]} | {t["datasource"]["uid"] for t in panel["targets"]} <= uids


def test_grafana_finds_its_files() -> None:
    mounted = mounts(services()[GRAFANA])
    provider = yaml.safe_load((PROVISIONING / "dashboards" / "cdp.yml").read_text())["providers"][0]
    assert mounted[provider["options"]["path"]] == ("./grafana/dashboards", "ro")
    home = services()[GRAFANA]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home.removeprefix(provider["options"]["path"] + "/") in DASHBOARDS
    for kind in ("datasources", "dashboards"):
        assert mounted[f"/etc/grafana/provisioning/{kind}"] == (f"./grafana/provisioning/{kind}", "ro")
    source = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yml").read_text())["datasources"][0]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in services()
