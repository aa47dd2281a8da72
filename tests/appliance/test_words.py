"""What people read: no library's words, nothing cut off, one look at a bad night says where to go."""

from __future__ import annotations

import subprocess
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from appliance import health
from appliance.cli import status
from appliance.client import Client
from appliance.reaching import Reach
from cdp.errors import UnreachableError
from tests.appliance.test_health import COLLECTOR, GROUPS, figures
from tests.appliance.test_health import REPLAYER as THEIRS
from tests.support.running import CDP


def shown(answer: dict[str, object]) -> str:
    console = Console(file=StringIO(), width=80, soft_wrap=True, highlight=False)
    console.print(status._page(answer))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_a_status_of_one_process_alone_is_a_page() -> None:
    page = shown(health.status(GROUPS, COLLECTOR, None))
    assert "replayer cannot be reached" in page
    assert page.rstrip().endswith("not healthy (collector 11, replayer not running)")
    assert "unknown" in shown(health.status(GROUPS, None, THEIRS))


def test_a_status_after_many_rollbacks_stays_short_and_cuts_nothing_off() -> None:
    gaps = [{"volume": "db", "from": {"seq": n, "time_ns": 0}, "to": {"seq": n + 1, "time_ns": 1},
             "reason": {"code": "rollback", "text": f"rollback {n}"}} for n in range(50)]  # fmt: skip
    long = "file:/" + "x" * 200
    groups = [GROUPS[0] | {"volumes": [{"name": "db", "size": 4096, "primary": long}]}]
    page = shown(health.status(groups, COLLECTOR, figures(THEIRS, gaps=gaps)))
    assert "db: no points from seq 49 to 50: rollback 49" in page
    assert "rollback 3\n" not in page and "cdp points shop" in page
    assert page.count("x") >= 200 and "…" not in page


def test_a_process_that_is_not_there_is_said_in_words(tmp_path: Path) -> None:
    for prepare in (lambda: None, (tmp_path / "replayer").mkdir, (tmp_path / "replayer" / "api.sock").touch):
        prepare()
        with pytest.raises(UnreachableError) as refused:
            Client(Reach(str(tmp_path))).status("replayer")
        assert "Errno" not in str(refused.value) and "it is not running" in str(refused.value)


def test_a_folder_that_is_missing_is_said_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "cdp.toml").mkdir()
    done = subprocess.run([CDP, "config"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    gone = tmp_path / "gone"
    gone.mkdir()
    done = subprocess.run(["sh", "-c", f"rmdir ../gone; {CDP} init"], cwd=gone, capture_output=True, text=True)
    assert done.returncode == 6 and "Create it first" in done.stderr and "Traceback" not in done.stderr
