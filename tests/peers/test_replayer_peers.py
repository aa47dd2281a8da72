"""nbdinfo, nbdcopy, qemu-img and qemu-io against the past."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.peers.conftest import MIB, VOLUMES, Program
from tests.support.running import Appliance

pytestmark = pytest.mark.xdist_group("peers")


@pytest.fixture(scope="module")
def states(appliance: Appliance, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bookmarks of the volume `past`, each with a file that holds what the volume was then."""
    from tests.support.nbd import NbdClient

    folder, size = tmp_path_factory.mktemp("states"), VOLUMES["past"]
    image, found = bytearray(size), {}
    with NbdClient(appliance.socket("collector"), "past") as client:
        for step, name in enumerate(("one", "two", "three")):
            for at in range(step * 4096, size // 2, 64 << 10):
                block = os.urandom(1000 + step)
                client.write(at + step, block)
                image[at + step : at + step + len(block)] = block
            if step == 2:
                client.trim(MIB, MIB)
                image[MIB : 2 * MIB] = bytes(MIB)
            client.flush()
            appliance.bookmark(name)
            found[name] = folder / name
            found[name].write_bytes(image)
    return found


def test_nbdinfo_lists_volumes_and_bookmarks(appliance: Appliance, program: Program, states: dict[str, Path]) -> None:
    uri = f"nbd+unix://?socket={appliance.socket('replayer')}"
    listed = json.loads(program("nbdinfo", "--list", "--json", uri).stdout)["exports"]
    names = {e["export-name"] for e in listed}
    assert set(VOLUMES) <= names
    assert {f"past@{name}" for name in states} <= names


@pytest.mark.parametrize("name", ["one", "two", "three"])
def test_every_state_is_what_it_was(
    appliance: Appliance, program: Program, states: dict[str, Path], name: str, tmp_path: Path
) -> None:
    """Promise 6: nbdcopy over many connections, qemu-img over one, raw and through qcow2."""
    uri, expected, copy = appliance.past("past", name), str(states[name]), tmp_path / "copy"
    program("nbdcopy", uri, str(copy))
    assert copy.read_bytes() == states[name].read_bytes()
    program("qemu-img", "compare", "-f", "raw", "-F", "raw", expected, uri)
    program("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, str(tmp_path / "copy.qcow2"))
    program("qemu-img", "compare", "-f", "raw", "-F", "qcow2", expected, str(tmp_path / "copy.qcow2"))


def test_past_is_sparse(appliance: Appliance, program: Program, states: dict[str, Path]) -> None:
    """The untouched half is a hole; every byte that nbdinfo calls zero is zero."""
    image = states["two"].read_bytes()
    extents = json.loads(program("nbdinfo", "--map", "--json", appliance.past("past", "two")).stdout)
    assert sum(e["length"] for e in extents) == len(image)
    zeros = [e for e in extents if e["type"] & 2]
    assert sum(e["length"] for e in zeros) >= len(image) // 2
    for extent in zeros:
        part = image[extent["offset"] : extent["offset"] + extent["length"]]
        assert not any(part), f"{extent} is called zero and is not"
    program("qemu-img", "map", "--output=json", "-f", "raw", appliance.past("past", "two"))


def test_changed_context_covers_every_difference(
    appliance: Appliance, program: Program, states: dict[str, Path]
) -> None:
    """`cdp:changed` against the newest state: it may say more than differs, never less."""
    old, new = states["one"].read_bytes(), states["three"].read_bytes()
    uri = appliance.past("past", "one")
    extents = json.loads(program("nbdinfo", "--map=cdp:changed", "--json", uri).stdout)
    for extent in (e for e in extents if not e["type"]):
        start, end = extent["offset"], extent["offset"] + extent["length"]
        assert old[start:end] == new[start:end], f"{extent} differs and is not called changed"
    changed = sum(e["length"] for e in extents if e["type"])
    assert 0 < changed <= len(old) // 2


def test_qemu_io_writes_to_a_private_overlay(appliance: Appliance, program: Program, states: dict[str, Path]) -> None:
    """Writes to the past are read back in their connection and are gone with it."""
    uri = appliance.past("past", "one")
    program(
        "qemu-io", "-f", "raw", "-c", "write -P 0x5a 100 9000", "-c", "flush", "-c", "read -P 0x5a 100 9000",
        "-c", "write -z 4096 4096", "-c", "read -P 0 4096 4096", uri,
    )  # fmt: skip
    program("qemu-img", "compare", "-f", "raw", "-F", "raw", str(states["one"]), uri)


def test_private_overlay_is_one_connection(appliance: Appliance, program: Program, states: dict[str, Path]) -> None:
    """Two connections of one client would miss each other's writes: a writable past has no MULTI_CONN."""
    info = json.loads(program("nbdinfo", "--json", appliance.past("past", "one")).stdout)["exports"][0]
    assert info["is_read_only"] or not info["can_multi_conn"]
    assert "cdp:changed" in info["contexts"]


@pytest.mark.parametrize(
    ("point", "reason"), [("nosuch", "nosuch"), ("seq:999999999999", "999999999999"), ("", ""), ("-10parsecs", "")]
)
def test_a_refusal_says_why(appliance: Appliance, program: Program, point: str, reason: str) -> None:
    """Promise 8: refused when it is opened, with the reason in the client's message."""
    done = program("nbdinfo", appliance.past("past", point), expect=1)
    assert reason in done.stderr
