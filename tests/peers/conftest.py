"""One running appliance for all tests of real clients, with a volume for each that writes."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.running import Appliance, running

MIB = 1 << 20
# A program that hangs on our servers is a bug; the slowest honest one takes seconds.
PROGRAM_SECONDS = 60
# The system's own python3 first: nbdsh runs the one it finds, which must be the one that has libnbd.
ENVIRONMENT = {**os.environ, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin:" + os.environ.get("PATH", "")}
# name → size; one for each test that writes, so that none disturbs another. `odd` ends within a page.
VOLUMES = {
    "copied": 32 * MIB,
    "converted": 32 * MIB,
    "poked": 16 * MIB,
    "hammered": 32 * MIB,
    "sparse": 64 * MIB,
    "odd": 5 * MIB + 512,
    "past": 16 * MIB,
    "scratch": 8 * MIB,
    "root": 32 * MIB,
}


@pytest.fixture(scope="session")
def appliance() -> Iterator[Appliance]:
    # Not pytest's own folder: the path of a unix socket is limited to 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="cdp-peers-"))
    try:
        with running(folder, VOLUMES) as appliance:
            appliance.wait_protected()
            yield appliance
    finally:
        shutil.rmtree(folder, ignore_errors=True)


Program = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def program(peer: Callable[[str], str]) -> Program:
    """`program("qemu-io", …)` runs a peer that must succeed; `expect=1` another exit code."""

    def run(
        name: str, *arguments: str, expect: int = 0, cwd: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [peer(name), *arguments], capture_output=True, text=True, timeout=PROGRAM_SECONDS,
            cwd=cwd, env=ENVIRONMENT,
        )
        assert done.returncode == expect, f"{name} {arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run
