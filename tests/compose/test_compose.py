"""The deployment for real (`make test-compose`): up by itself, used by a host's own NBD tools, killed and healed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.compose.files import ROLES, dashboards, expressions, prometheus_targets
from tests.compose.stack import HEAL_SECONDS, Stack, uid_in
from tests.support.book import difference
from tests.support.nbd import NbdClient
from tests.support.running import wait_for
from tests.support.stamps import StampWriter

# The first one builds the image too.
pytestmark = [pytest.mark.compose, pytest.mark.timeout(900)]

MIB = 1 << 20
# What the host's tools write, and what the kills are tried on: a part of the volume, so that it can be read whole.
IMAGE_BYTES, LOADED_BYTES = 64 * MIB, 16 * MIB
# Some 3 to 5 thousand writes a second: a load, and not more history than a shared machine has room for.
PAUSE_SECONDS = 0.0002
# So many requests after a kill that production plainly goes on.
REQUESTS_AFTER = 1000
# Two looks of Prometheus and a little.
SCRAPED_SECONDS = 60.0

Run = Callable[..., str]


@pytest.fixture
def run(peer: Callable[[str], str]) -> Run:
    """`run("nbdcopy", …)`: a program of the host, which must end well."""

    def call(program: str, *arguments: str) -> str:
        ran = subprocess.run([peer(program), *arguments], capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, f"{program} {' '.join(arguments)}: {ran.stdout}\n{ran.stderr}"
        return ran.stdout

    return call


def read(client: NbdClient, length: int) -> bytes:
    return b"".join(client.read(at, MIB) for at in range(0, length, MIB))


def test_it_comes_up_protected(stack: Stack) -> None:
    """From nothing, with nothing written before; every container can ask every part, and none runs as root."""
    status = stack.wait_protected()
    assert set(status["processes"]) == set(ROLES)
    assert status["groups"][0]["relay"]["state"] == "carrying"
    for role in ROLES:
        assert stack.json("status", service=role, expect=(0, 1))["processes"] == status["processes"]
    assert {uid_in(stack, role) for role in ROLES} == {10809}
    assert uid_in(stack, "kafka") and uid_in(stack, "prometheus")
    assert stack.container("secrets")["State"]["ExitCode"] == 0
    for service in stack.services:
        named = [m["Name"] for m in stack.container(service)["Mounts"] if m["Type"] == "volume"]
        unnamed = [name for name in named if not name.startswith(stack.project)]
        assert not unnamed, f"{service}: `down` would leave {unnamed} behind"


def test_the_secrets_were_made_and_are_asked_for(stack: Stack) -> None:
    """The token is cdp's alone; the API on the network answers nobody without it."""
    look = ("exec", "--no-TTY", "relay", "stat", "-c", "%a %u %s", "/run/secrets/cdp/token")
    assert stack.done(*look).split() == ["400", "10809", "33"]
    ask = "import httpx; print(httpx.get('http://replayer:10812/v1/status').status_code)"
    assert stack.done("exec", "--no-TTY", "relay", "python", "-c", ask).strip() == "401"


def test_the_whole_of_a_recovery(stack: Stack, run: Run, tmp_path: Path) -> None:
    """A host's tools write and destroy; one command brings every byte back, and the broken state stays a point."""
    image, copy = tmp_path / "image", tmp_path / "copy"
    image.write_bytes(os.urandom(IMAGE_BYTES))
    run("nbdcopy", "--flush", str(image), stack.uri("db"))
    stack.cdp("bookmark", "shop", "good", "--wait")
    with open(image, "r+b") as whole:
        whole.truncate(int(run("nbdinfo", "--size", stack.uri("db"))))
    assert stack.json("points", "db")["bookmarks"]
    run("qemu-io", "-f", "raw", "-c", "write -P 0xdd 0 8M", "-c", "discard 16M 4M", "-c", "flush", stack.uri("db"))
    run("fio", "--name=destroy", "--ioengine=nbd", f"--uri={stack.uri('db')}", "--rw=randwrite", "--bs=4k",
        "--iodepth=16", "--offset=32M", "--size=16M", "--io_size=8M", "--end_fsync=1")  # fmt: skip
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(image), stack.past("db", "good"))
    done = stack.json("rollback", "db", "--to", "good", "--yes")
    run("nbdcopy", stack.uri("db"), str(copy))
    subprocess.run(["cmp", str(image), str(copy)], check=True)
    assert stack.json("verify", "db")["equal"]
    run("qemu-io", "-r", "-f", "raw", "-c", "read -P 0xdd 0 8M", "-c", "read -P 0 16M 4M",
        stack.past("db", done["bookmark"]))  # fmt: skip
    stack.wait_protected()


@pytest.mark.parametrize("victim", ["kafka", "relay", "replayer", "prometheus", "collector"])
def test_a_killed_container_heals_and_nothing_is_lost(stack: Stack, victim: str) -> None:
    """Promises 2, 4 and 10: production sees nothing of any of them but the collector, whose every word holds."""
    client = wait_for(lambda: opened(stack), "the volume on the host's port")
    client.zero(0, LOADED_BYTES)
    client.flush()
    writer = StampWriter(LOADED_BYTES, seed=len(victim), pause_seconds=PAUSE_SECONDS)
    writer.start(client)
    wait_for(lambda: writer.requests > REQUESTS_AFTER or writer.error, "a load")
    before = stack.kill(victim)
    if victim == "collector":
        wait_for(lambda: writer.error, "the broken connection")
        writer.stop()
        client = wait_for(lambda: opened(stack), "the volume on the host's port", HEAL_SECONDS)
        writer.check(read(client, LOADED_BYTES))
        writer.start(client)
    at = writer.requests
    wait_for(lambda: writer.requests > at + REQUESTS_AFTER or writer.error, "writes after the kill")
    wait_for(lambda: stack.has_healed(victim, before), f"{victim} started again and ready", HEAL_SECONDS)
    writer.stop()
    assert writer.error is None, f"production was disturbed by the end of {victim}: {writer.error!r}"
    stack.wait_protected()
    check_all(stack, writer, f"after-{victim}")


def opened(stack: Stack) -> NbdClient | None:
    try:
        return stack.open("collector", "db")
    except OSError:  # it is not there, or not yet
        return None


def check_all(stack: Stack, writer: StampWriter, bookmark: str) -> None:
    """What was acknowledged is on the primary; a point of now is the same, byte for byte."""
    stack.cdp("bookmark", "shop", bookmark, "--wait")
    with stack.open("collector", "db") as client:
        primary = read(client, LOADED_BYTES)
    writer.check(primary)
    with stack.open("replayer", f"db@{bookmark}") as client:
        past = read(client, LOADED_BYTES)
    same = past == primary  # apart: pytest must not try to explain megabytes
    assert same, difference(f"db@{bookmark}", past, primary)


def test_every_earlier_point_is_still_what_it_was(stack: Stack, run: Run) -> None:
    """After all those kills: the whole volume is proven equal, and the first bookmarks open."""
    assert stack.json("verify", "db")["equal"]
    names = [bookmark["name"] for bookmark in stack.json("points", "db")["bookmarks"]]
    for name in names:
        run("nbdinfo", "--map", stack.past("db", name))


def test_what_is_taken_down_comes_back(stack: Stack, run: Run) -> None:
    """Every process of cdp ends cleanly when it is told to; `down` without `-v` keeps data, history and secrets."""
    token = ("exec", "--no-TTY", "relay", "cat", "/run/secrets/cdp/token")
    run("qemu-io", "-f", "raw", "-c", "write -P 0x77 1M 1M", "-c", "flush", stack.uri("db"))
    stack.cdp("bookmark", "shop", "kept", "--wait")
    before = stack.done(*token)
    stack.done("stop")
    assert {role: stack.container(role)["State"]["ExitCode"] for role in ROLES} == dict.fromkeys(ROLES, 0)
    stack.done("down")
    stack.start()
    stack.wait_protected()
    assert stack.done(*token) == before
    run("qemu-io", "-r", "-f", "raw", "-c", "read -P 0x77 1M 1M", stack.uri("db"))
    run("qemu-io", "-r", "-f", "raw", "-c", "read -P 0x77 1M 1M", stack.past("db", "kept"))


def test_prometheus_reads_everything_that_is_charted(stack: Stack) -> None:
    """All targets are up, and every panel has something to show."""
    jobs = set(prometheus_targets())

    def up() -> set[str]:
        return {found["metric"]["job"] for found in stack.prometheus("up == 1")}

    wait_for(lambda: up() == jobs, "all targets up", SCRAPED_SECONDS)
    protected = stack.prometheus('cdp_group_state{state="protected"} == 1')
    assert [found["metric"]["group"] for found in protected] == ["shop"]
    for dashboard in dashboards().values():
        for title, expression in expressions(dashboard):
            shown = partial(stack.prometheus, expression)  # one that Prometheus cannot read is refused here
            if "cdp_resync_" in expression:
                shown()  # there are figures only while one runs
            else:
                wait_for(shown, f"{title}: anything for {expression}", SCRAPED_SECONDS)
