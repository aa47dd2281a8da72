"""The tour runs, proves what it says, leaves nothing behind, and needs no file system tools."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.running import CDP

STEPS = 8
# Without e2fsprogs: the same program, told that none of its tools is installed.
WITHOUT_TOOLS = """
import sys
from appliance import demo_data
demo_data.tool = lambda name: None
from appliance.cli.main import run
sys.exit(run(["demo"]))
"""


def check(command: list[str], tmp_path: Path) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=110, check=False, cwd=Path(__file__).parents[2],
        env={"PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("✓") == STEPS and "All of it took" in done.stdout
    assert list(tmp_path.iterdir()) == []
    return done.stdout


def test_the_tour(tmp_path: Path) -> None:
    assert "byte for byte" in check([CDP, "demo"], tmp_path)


@pytest.mark.slow
def test_the_tour_without_file_system_tools(tmp_path: Path) -> None:
    assert "random data" in check([sys.executable, "-c", WITHOUT_TOOLS], tmp_path)
