"""/healthz, /readyz, /metrics and `cdp ready` of real processes, while the child serves and while it cannot."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from appliance import metrics
from appliance.supervisor import Supervisor
from tests.appliance.test_health import REPLAYER, figures
from tests.support.nbd import NbdClient
from tests.support.network import free_port
from tests.support.running import Appliance, wait_for

SIZE = 4 << 20
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def appliance(tmp_path: Path) -> Iterator[Appliance]:
    made = Appliance(
        tmp_path / "x", {"db": SIZE},
        more={role: f'monitor = "tcp:127.0.0.1:{free_port()}"' for role in ("collector", "replayer")},
    )  # fmt: skip
    try:
        yield made
    finally:
        made.end()


def get(appliance: Appliance, role: str, path: str) -> httpx.Response:
    address = appliance.more[role].partition("tcp:")[2].rstrip('"')
    return httpx.get(f"http://{address}{path}")


def samples(text: str) -> Samples:
    """Every sample by name and labels; each family explains itself."""
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.name.startswith("cdp_") and len(family.documentation) > 10, family.name
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found
            found[key] = sample.value
    return found


def sample(page: Samples, name: str, **labels: str) -> float:
    return page[name, frozenset(labels.items())]


def scraped(appliance: Appliance, role: str) -> Samples:
    answer = get(appliance, role, "/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return samples(answer.text)


def test_the_figures_of_both_sides(appliance: Appliance) -> None:
    appliance.start("collector", "replayer")
    with NbdClient(appliance.socket("collector"), "db") as client:
        client.write(0, b"x" * 4096)
        client.flush()
        seq = appliance.bookmark("here")

        def seen() -> bool:
            page = scraped(appliance, "collector")
            consumed = page.get(("cdp_consumer_seq", frozenset({("group", "shop"), ("consumer", "replayer")})), 0)
            return sample(page, "cdp_volume_clients", group="shop", volume="db") == 1 and consumed > 0

        wait_for(seen, "a client and a consumer in the figures")
    ours = scraped(appliance, "collector")
    assert sample(ours, "cdp_group_state", group="shop", state="protected") == 1
    assert sum(v for (name, _), v in ours.items() if name == "cdp_group_state") == 1
    assert sample(ours, "cdp_volume_state", group="shop", volume="db", state="stopped") == 0
    assert sample(ours, "cdp_journal_last_seq", group="shop") >= seq
    durable, last = (sample(ours, f"cdp_journal_{end}_seq", group="shop") for end in ("durable", "last"))
    assert 0 < durable <= last
    assert sample(ours, "cdp_group_epoch", group="shop") == 1 and sample(ours, "cdp_journal_bytes", group="shop") > 0
    assert sample(ours, "cdp_volume_size_bytes", group="shop", volume="db") == SIZE
    assert sample(ours, "cdp_child_ready", role="collector") == 1
    assert sample(ours, "cdp_figures_age_seconds", role="collector") < 5
    for process in ("parent", "child"):
        assert sample(ours, "cdp_process_resident_memory_bytes", role="collector", process=process) > 1 << 20
        assert sample(ours, "cdp_process_cpu_seconds_total", role="collector", process=process) >= 0
    wait_for(lambda: sample(scraped(appliance, "replayer"), "cdp_replay_applied_seq", group="shop") >= seq, "replay")
    theirs = scraped(appliance, "replayer")
    assert sample(theirs, "cdp_replay_state", group="shop", state="protected") == 1
    assert abs(sample(theirs, "cdp_replay_applied_time_seconds", group="shop") - time.time()) < 20
    assert sample(theirs, "cdp_window_configured_seconds", group="shop") == 86400
    oldest, newest = (sample(theirs, f"cdp_window_{end}_time_seconds", group="shop") for end in ("oldest", "newest"))
    assert oldest < newest and sample(theirs, "cdp_window_short", group="shop") == 0
    for name in ("cdp_replay_committed_seq", "cdp_replay_lag_bytes", "cdp_gaps", "cdp_history_bytes"):
        assert sample(theirs, name, group="shop") >= 0
    assert sample(theirs, "cdp_child_restarts_total", role="replayer") == 0
    assert any(name == "cdp_build_info" and ("role", "replayer") in labels for name, labels in theirs)
    assert get(appliance, "replayer", "/v1/status").status_code == 404  # a monitor is not the API
    appliance.stop()


def test_alive_is_not_ready(appliance: Appliance) -> None:
    """A child that cannot come back: its lock is held, as by a process that does not end."""
    appliance.start("collector")
    assert get(appliance, "collector", "/readyz").text == "ready\n"
    assert appliance.run("ready", "collector").returncode == 0
    lock = os.open(appliance.folder / "state" / "collector" / "lock", os.O_RDWR)
    try:
        os.kill(appliance.child("collector"), signal.SIGKILL)
        wait_for(lambda: is_taken(lock), "the lock of the killed child")
        answer = wait_for(lambda: not_ready(appliance), "not ready")
        assert "collector is starting" in answer
        assert get(appliance, "collector", "/healthz").status_code == 200
        done = appliance.run("ready", "collector")
        assert done.returncode == 1 and "starting" in done.stderr and not done.stdout
        page = scraped(appliance, "collector")
        assert sample(page, "cdp_child_ready", role="collector") == 0
        assert not any(name in ("cdp_group_state", "cdp_figures_age_seconds") for name, _ in page)
    finally:
        os.close(lock)
    wait_for(lambda: get(appliance, "collector", "/readyz").status_code == 200, "ready again")
    assert sample(scraped(appliance, "collector"), "cdp_child_restarts_total", role="collector") >= 1
    appliance.stop()
    done = appliance.run("ready", "collector")
    assert done.returncode == 5 and "is not running" in done.stderr


@pytest.mark.slow
def test_a_child_that_hangs_is_not_ready(appliance: Appliance) -> None:
    appliance.start("collector")
    child = appliance.child("collector")
    os.kill(child, signal.SIGSTOP)
    try:
        assert "said nothing" in wait_for(lambda: not_ready(appliance), "noticed", 40)
        assert sample(scraped(appliance, "collector"), "cdp_figures_age_seconds", role="collector") > 10
    finally:
        os.kill(child, signal.SIGCONT)
    wait_for(lambda: get(appliance, "collector", "/readyz").status_code == 200, "ready again")
    appliance.stop()


def is_taken(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def not_ready(appliance: Appliance) -> str:
    answer = get(appliance, "collector", "/readyz")
    return answer.text if answer.status_code == 503 else ""


def rendered(**changes: Any) -> Samples:
    """The page of a replayer that sent these figures."""

    async def render() -> bytes:
        supervisor = Supervisor("replayer", "appliance.replayer_child", {})
        supervisor.latest = figures(REPLAYER, committed_seq=10, **changes)["figures"]
        return metrics.render(supervisor, [])

    return samples(asyncio.run(render()).decode())


SECOND = 10**9


@pytest.mark.parametrize(("gaps", "expected"), [
    ([], 100), ([(50, 60)], 100), ([(50, None)], 50), ([(70, None), (50, None), (20, 30)], 50),
])  # fmt: skip
def test_what_a_disaster_would_cost_counts_open_gaps(gaps: list[tuple[int, int | None]], expected: int) -> None:
    described = [
        {"volume": "db", "from": at(begin), "to": None if end is None else at(end), "reason": {"code": "x", "text": ""}}
        for begin, end in gaps
    ]
    page = rendered(applied_time_ns=100 * SECOND, newest=at(100), gaps=described)
    assert sample(page, "cdp_replay_applied_time_seconds", group="shop") == expected
    nothing = rendered(applied_time_ns=100 * SECOND, newest=None, oldest=None, gaps=[])
    assert sample(nothing, "cdp_replay_applied_time_seconds", group="shop") == 0
    assert not any(name.startswith("cdp_window_newest") for name, _ in nothing)


def test_the_reason_is_a_label_of_its_own() -> None:
    """What stops a group can be alerted on by its code; while all is well there is no such sample."""
    page = rendered(state="stopped", reason={"code": "place_expired", "text": "What it needs is gone."})
    assert sample(page, "cdp_replay_reason", group="shop", code="place_expired") == 1
    assert not any(name == "cdp_replay_reason" for name, _ in rendered())


def at(seconds: int) -> dict[str, int]:
    return {"seq": seconds, "time_ns": seconds * SECOND}


def test_a_health_check_loads_no_library() -> None:
    """It runs every few seconds on each machine."""
    code = ("import sys; from appliance.cli import entry; assert entry.ready.asked(['ready', 'relay']); "
            "print(*{m.split('.')[0] for m in sys.modules})")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"pydantic", "fastapi", "uvicorn", "typer", "rich", "httpx", "numpy", "asyncio", "ssl"}
    assert not heavy & set(done.stdout.split())


@pytest.mark.parametrize(("content", "code"), [
    ("[appliance]\nstate_dir = 3\n", 2), ("collector = 3\n", 2), ("= 3", 2), ("", 5),
    ('[collector]\ncontrol_at = "http://127.0.0.1:9"\n', 5), ('[collector]\ncontrol_at = "http://[::"\n', 5),
])  # fmt: skip
def test_ready_without_anybody_there(tmp_path: Path, content: str, code: int) -> None:
    (tmp_path / "cdp.toml").write_text('[relay]\ncontrol_at = "http://x"\n' + content if code == 5 else content)
    done = Appliance(tmp_path, {}).run("ready", "collector")
    assert done.returncode == code and done.stderr.startswith("cdp: ") and "Traceback" not in done.stderr
