"""A real child under the real supervisor: commands, figures, kills, refusals, a clean stop."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from appliance.supervisor import Supervisor
from cdp.errors import CdpError, RefusedError, StorageError, UnreachableError, UsageError
from tests.support.running import wait_for

LIMIT_SECONDS = 30.0
ROOT = Path(__file__).parents[2]


def supervised(tmp_path: Path, test: Callable[[Supervisor], Awaitable[Any]], **settings: Any) -> Any:
    """Runs `test` with a supervisor over the tiny child; stops it cleanly."""

    async def body() -> Any:
        given = {"listen": [f"unix:{tmp_path}/tiny.sock"], "stopped": str(tmp_path / "stopped"), **settings}
        supervisor = Supervisor("collector", "tests.appliance.tiny_child", given)
        running = asyncio.create_task(supervisor.run())
        ready = asyncio.create_task(supervisor.ready.wait())
        await asyncio.wait({running, ready}, timeout=LIMIT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        try:
            return await asyncio.wait_for(test(supervisor), LIMIT_SECONDS) if supervisor.ready.is_set() else None
        finally:
            await supervisor.stop()
            await running

    return asyncio.run(body())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_SECONDS):
        while not condition():
            await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_commands_come_back_with_results_and_errors_whole(tmp_path: Path) -> None:
    async def test(s: Supervisor) -> None:
        assert s.listen == [f"unix:{tmp_path}/tiny.sock"]
        answers = await asyncio.gather(*(s.command("bookmark", {"n": n}, 5) for n in range(50)))
        assert [a["echo"]["n"] for a in answers] == list(range(50))
        with pytest.raises(RefusedError) as refused:
            await s.command("consumers", {}, 5)
        assert (refused.value.code, refused.value.before) == ("busy", {"seq": 1, "time_ns": 2})
        with pytest.raises(StorageError, match="a bug"):
            await s.command("verify", {}, 5)
        with pytest.raises(UnreachableError, match="did not answer"):
            await s.command("clients", {}, 0.05)
        assert (await s.figures())["pid"] == s.pid

    supervised(tmp_path, test)
    assert (tmp_path / "stopped").read_text() == "clean"


def test_figures_are_asked_at_most_ten_times_a_second_and_are_fresh(tmp_path: Path) -> None:
    async def test(s: Supervisor) -> float:
        loop = asyncio.get_running_loop()
        began = loop.time()
        for _ in range(4):
            await asyncio.gather(*(s.figures() for _ in range(20)))
        return loop.time() - began

    assert supervised(tmp_path, test) >= 0.3


def test_a_killed_child_comes_back_and_callers_hear_of_it(tmp_path: Path) -> None:
    async def test(s: Supervisor) -> None:
        first = s.pid
        assert first is not None
        waiting = asyncio.create_task(s.command("clients", {}, 20))
        await s.figures()
        os.kill(first, signal.SIGKILL)
        with pytest.raises(UnreachableError):
            await waiting
        await until(lambda: s.ready.is_set() and s.pid != first)
        assert s.restarts == 1
        with pytest.raises(UnreachableError):
            await s.command("trust", {}, 20)  # ends the child from inside
        await until(lambda: s.ready.is_set() and s.restarts == 2)

    supervised(tmp_path, test)


def test_a_child_that_refuses_to_start_ends_the_command_with_its_sentence(tmp_path: Path) -> None:
    async def test(_: Supervisor) -> None:
        pytest.fail("it must not get ready")

    with pytest.raises(UsageError, match="no such thing") as caught:
        supervised(tmp_path, test, refuse="There is no such thing.")
    assert caught.value.hint == "A hint."


def test_a_port_in_use_is_one_sentence(tmp_path: Path) -> None:
    async def test(_: Supervisor) -> None:
        with pytest.raises(CdpError) as caught:
            await asyncio.to_thread(supervised, tmp_path, test)
        assert caught.value.exit_code == 4

    supervised(tmp_path, test)


def test_a_first_start_that_just_dies_is_tried_again(tmp_path: Path) -> None:
    async def test(s: Supervisor) -> int:
        return s.restarts

    assert supervised(tmp_path, test, die_once=str(tmp_path / "died")) == 1


def test_the_child_dies_with_its_parent(tmp_path: Path) -> None:
    program = f"""
import asyncio
from appliance.supervisor import Supervisor
async def body():
    s = Supervisor("collector", "tests.appliance.tiny_child", {{"listen": ["unix:{tmp_path}/t.sock"]}})
    task = asyncio.create_task(s.run())
    await s.ready.wait()
    print(s.pid, flush=True)
    await task
asyncio.run(body())
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert alive(child)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_for(lambda: not alive(child), "the child ended with its parent", 2)


def test_a_child_alone_says_what_it_is_part_of() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.appliance.tiny_child"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "cdp collector" in done.stderr
