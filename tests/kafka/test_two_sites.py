"""An appliance on two machines: what the command line does, it does at either site, honestly when one is away."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.kafka.broker import Broker
from tests.kafka.sites import Sites, running_sites
from tests.kafka.test_kafka_processes import folder, journal_at, qemu_io
from tests.support.network import token_file
from tests.support.running import wait_for

__all__ = ["folder", "qemu_io"]  # fixtures

SIZE = 16 << 20


@pytest.fixture
def sites(broker: Broker, folder: Path) -> Iterator[Sites]:
    control = f'token_file = "{token_file(folder)}"'
    with running_sites(folder, {"db": SIZE}, journal_at(broker), {"a": control, "b": control}) as made:
        wait_for(made.is_settled, "healthy, as seen from B", 60)
        yield made


@pytest.mark.timeout(240)  # some thirty command lines, on a machine that is busy with other tests
def test_everything_works_at_either_site(sites: Sites, qemu_io: Callable[..., None], tmp_path: Path) -> None:
    a, b = sites.a, sites.b
    assert not (b.folder / "state" / "collector").exists() and not (a.folder / "state" / "replayer").exists()
    qemu_io(a.uri("db"), "write -P 0x11 0 4M", "flush")
    b.cli("bookmark", "shop", "good", "--wait")
    qemu_io(a.uri("db"), "write -P 0xee 1M 1M", "discard 2M 1M", "flush")
    a.cli("bookmark", "shop", "bad", "--wait")
    assert b.json("verify", "db")["equal"]
    # From B, whose rollback writes the primary at A; then forward again from A, where nothing of the replayer is.
    done = b.json("rollback", "db", "--to", "good", "--yes")
    qemu_io(a.uri("db"), "read -P 0x11 0 4M")
    a.cli("rollback", "db", "--to", done["bookmark"], "--yes")
    qemu_io(a.uri("db"), "read -P 0xee 1M 1M", "read -P 0 2M 1M", "read -P 0x11 3M 1M")
    assert a.json("verify", "db")["equal"]
    for site in (a, b):
        out = tmp_path / f"{site.folder.name}.raw"
        site.cli("export", "db@good", str(out))
        assert out.read_bytes() == b"\x11" * (4 << 20) + bytes(SIZE - (4 << 20))
        assert site.json("diff", "db@good", "db@bad")["bytes"] >= 2 << 20
        assert {"good", "bad"} <= {mark["name"] for mark in site.json("points", "db")["bookmarks"]}
        assert site.json("consumer", "list", "shop")["consumers"].keys() == {"primary", "relay"}
        for role in ("collector", "relay", "replayer"):
            assert site.run("ready", role).returncode == 0
    b.cli("resync", "db")
    wait_for(sites.is_settled, "healthy after a resync that B asked for", 60)
    page = httpx.get(f"{sites.monitor('relay')}/metrics").text
    samples = {s.name: s for family in text_string_to_metric_families(page) for s in family.samples}
    assert samples["cdp_relay_carried_seq"].value > 0 and "cdp_relay_kept_bytes" in samples


@pytest.mark.slow
def test_a_site_whose_collector_is_away(sites: Sites, qemu_io: Callable[..., None], tmp_path: Path) -> None:
    a, b = sites.a, sites.b
    qemu_io(a.uri("db"), "write -P 0x21 0 1M", "flush")
    b.cli("bookmark", "shop", "before", "--wait")
    for role in ("collector", "relay"):
        a.services.pop(role).stop()
    status = b.json("status", expect=(1,))
    assert set(status["unreached"]) == {"collector", "relay"} and status["processes"]["replayer"]
    assert all("127.0.0.1" in sentence for sentence in status["unreached"].values())
    page = b.run("status")
    assert page.returncode == 1 and "collector cannot be reached at http://127.0.0.1" in page.stdout
    b.cli("export", "db@before", str(tmp_path / "past.raw"))
    assert (tmp_path / "past.raw").read_bytes()[: 1 << 20] == b"\x21" * (1 << 20)
    assert b.json("diff", "db@before", "db@now")["bytes"] == 0
    assert b.json("points", "db")["newest"]["seq"]
    qemu_io(b.past("db", "before"), "read -P 0x21 0 1M")
    for command in (("bookmark", "shop", "x"), ("verify", "db"), ("rollback", "db", "--to", "before", "--yes")):
        done = b.run(*command)
        assert done.returncode == 5 and "collector cannot be reached at" in done.stderr, done.stderr
    a.start("collector", "relay")
    wait_for(sites.is_settled, "healthy again", 60)


@pytest.mark.slow
def test_another_token_is_said_at_the_command_and_in_the_status(sites: Sites) -> None:
    a, b = sites.a, sites.b
    wrong = b.folder / "wrong"
    wrong.mkdir()
    text = b.config.read_text().replace(f"{a.folder.parent}/token", str(token_file(wrong, "no-token-of-these-sites")))
    b.config.write_text(text)
    done = b.run("bookmark", "shop", "x")
    assert done.returncode == 4 and "another token than its own" in done.stderr
    page = b.run("status")
    assert page.returncode == 1 and "collector refuses" in page.stdout and "token_file in [control]" in page.stdout
