"""Two sites in two networks joined by a cable: it is pulled, production goes on; it is plugged in, and all is well."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kafka.sites import SiteBroker, Sites, running_sites
from tests.kafka.test_kafka_processes import folder, journal_at, qemu_io
from tests.support.network import Authority, Cable, token_file
from tests.support.running import CDP, wait_for

__all__ = ["folder", "qemu_io"]  # fixtures

pytestmark = pytest.mark.slow
SIZE = 64 << 20
MIB = 1 << 20


@pytest.fixture
def cable(peer: Callable[[str], str]) -> Iterator[Cable]:
    made = Cable(peer("ip"))
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def broker(cable: Cable, kafka_folder: Path, folder: Path) -> Iterator[SiteBroker]:
    made = SiteBroker(kafka_folder / folder.name, cable.addresses["a"], cable.inside("a"))
    try:
        made.start()
        yield made
    finally:
        made.kill()


@pytest.fixture
def sites(cable: Cable, broker: SiteBroker, folder: Path, peer: Callable[[str], str]) -> Iterator[Sites]:
    """With TLS: each site has a certificate for its address."""
    authority = Authority(peer("openssl"), folder / "ca")
    control = {}
    for site, address in cable.addresses.items():
        certificate, key = authority.certify(site, f"IP:{address}")
        control[site] = (f'token_file = "{token_file(folder)}"\ncertificate = "{certificate}"\nkey = "{key}"\n'
                         f'ca = "{authority.ca}"')  # fmt: skip
    prefixes = {site: cable.inside(site) for site in cable.addresses}
    with running_sites(
        folder, {"db": SIZE}, journal_at(broker), control, hosts=cable.addresses, prefixes=prefixes
    ) as made:
        wait_for(made.is_settled, "healthy, as seen from B", 60)
        yield made


def test_the_link_is_cut_and_heals(sites: Sites, cable: Cable, qemu_io: Callable[..., None], tmp_path: Path) -> None:
    a, b = sites.a, sites.b
    qemu_io(a.uri("db"), "write -P 0x11 0 32M", "flush")
    b.cli("bookmark", "shop", "good", "--wait")
    cable.pull()
    qemu_io(a.uri("db"), "write -P 0x22 0 32M", "flush", "read -P 0x22 0 32M")
    a.cli("bookmark", "shop", "alone")
    status = b.json("status", expect=(1,))
    assert {"collector", "relay"} <= set(status["unreached"]) and not status["healthy"]
    status = a.json("status", expect=(1,))
    assert set(status["unreached"]) == {"replayer"} and status["groups"][0]["relay"]["state"] == "carrying"
    b.cli("export", "db@good", str(tmp_path / "good.raw"))
    assert (tmp_path / "good.raw").read_bytes()[: 32 * MIB] == b"\x11" * (32 * MIB)
    assert "alone" not in {mark["name"] for mark in b.json("points", "db")["bookmarks"]}
    cable.plug()
    wait_for(sites.is_settled, "no lag any more, as seen from B", 90)
    qemu_io(b.past("db", "alone"), "read -P 0x22 0 32M")
    done = b.json("rollback", "db", "--to", "good", "--yes")
    qemu_io(a.uri("db"), "read -P 0x11 0 32M")
    assert b.json("verify", "db")["equal"] and done["end"]["seq"] > done["begin"]["seq"]


def test_the_link_is_cut_in_a_rollback(sites: Sites, cable: Cable, qemu_io: Callable[..., None]) -> None:
    """It goes on by itself: whoever waits for it sees its end."""
    a, b = sites.a, sites.b
    qemu_io(a.uri("db"), "write -P 0x11 0 64M", "flush")
    b.cli("bookmark", "shop", "good", "--wait")
    qemu_io(a.uri("db"), "write -P 0x22 0 64M", "flush")
    b.cli("bookmark", "shop", "bad", "--wait")
    command = subprocess.Popen(
        [*b.prefix, CDP, "--config", str(b.config), "rollback", "db", "--to", "good", "--yes", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    job = b.folder / "state" / "replayer" / "rollbacks" / "1.json"
    try:
        wait_for(lambda: job.exists() and json.loads(job.read_text())["step"] not in ("lock", "begin"), "it began")
        cable.pull()
        assert "collector" in b.json("status", expect=(1,))["unreached"]
        assert a.run("ready", "collector").returncode == 0
        cable.plug()
        said, errors = command.communicate(timeout=100)
    finally:
        command.kill()
    assert command.returncode == 0, errors
    assert json.loads(said)["end"]
    qemu_io(a.uri("db"), "read -P 0x11 0 64M")
    assert b.json("verify", "db")["equal"]
