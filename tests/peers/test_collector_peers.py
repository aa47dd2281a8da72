"""nbdinfo, nbdcopy, nbdsh, qemu-img, qemu-io and fio against the collector."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.peers.conftest import MIB, VOLUMES, Program
from tests.support.running import Appliance

pytestmark = pytest.mark.xdist_group("peers")


def test_nbdinfo_lists_and_describes_every_volume(appliance: Appliance, program: Program) -> None:
    listed = json.loads(program("nbdinfo", "--list", "--json", appliance.uri("")).stdout)["exports"]
    assert {e["export-name"]: e["export-size"] for e in listed} == VOLUMES
    for export in listed:
        assert export["can_flush"] and export["can_fua"] and export["can_trim"] and export["can_zero"]
        assert export["can_multi_conn"] and not export["is_read_only"]
        assert "base:allocation" in export["contexts"]
        assert (export["block_size_minimum"], export["block_size_preferred"]) == (1, 4096)
        assert export["block_size_maximum"] == 32 * MIB


def test_nbdinfo_maps_what_was_written(appliance: Appliance, program: Program) -> None:
    """Holes of the primary are holes over NBD; what was written is data."""
    uri = appliance.uri("sparse")
    program("qemu-io", "-f", "raw", "-c", "write -P 1 8M 1M", "-c", "write -P 2 24M 64k", uri)
    extents = json.loads(program("nbdinfo", "--map", "--json", uri).stdout)
    data = [(e["offset"], e["length"]) for e in extents if not e["type"] & 1]
    assert data == [(8 * MIB, MIB), (24 * MIB, 65536)]
    totals = program("nbdinfo", "--map", "--totals", uri).stdout
    assert "hole,zero" in totals


def test_nbdcopy_there_and_back(appliance: Appliance, program: Program, tmp_path: Path) -> None:
    """Several connections, flushed; primary and replica hold it too."""
    source, back = tmp_path / "source", tmp_path / "back"
    source.write_bytes(os.urandom(VOLUMES["copied"] // 2) + bytes(VOLUMES["copied"] // 2))
    program("nbdcopy", "--flush", "--connections=4", str(source), appliance.uri("copied"))
    program("nbdcopy", appliance.uri("copied"), str(back))
    assert back.read_bytes() == source.read_bytes()
    assert appliance.primary("copied").read_bytes() == source.read_bytes()
    assert appliance.json("verify", "copied")["equal"] is True


NBDSH = """
import nbd
size = h.get_size()
assert size == {size}, size
h.pwrite(b"x" * 777, 12345)
assert h.pread(779, 12344) == b"\\0" + b"x" * 777 + b"\\0"
h.pwrite(b"y", size - 1)
assert h.pread(513, size - 513) == b"\\0" * 512 + b"y"
h.pwrite(b"z" * 4096, 8192, nbd.CMD_FLAG_FUA)
h.zero(100, 12400)
assert h.pread(777, 12345) == b"x" * 55 + b"\\0" * 100 + b"x" * 622
h.zero(4096, 8192, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
assert h.pread(4096, 8192) == bytes(4096)
h.trim(1 << 20, 0)
assert h.pread(1 << 20, 0) == bytes(1 << 20)
h.cache(4096, 0)
h.flush()
pieces = []
h.pread_structured(65536, 0, lambda data, offset, status, error: pieces.append((offset, len(data))), nbd.CMD_FLAG_DF)
assert pieces == [(0, 65536)], pieces
h.set_strict_mode(0)
for what, wanted in (
    (lambda: h.pread(1, size), "EINVAL"),
    (lambda: h.pwrite(b"1", size), "ENOSPC"),
    (lambda: h.trim(2, size - 1), "EINVAL"),
    (lambda: h.zero(2, size - 1), "ENOSPC"),
    (lambda: h.pread(4096, 0, 1 << 9), "EINVAL"),
):
    try:
        what()
    except nbd.Error as e:
        assert e.errno == wanted, (e.errno, wanted)
    else:
        raise AssertionError(wanted)
assert h.pread(1, size - 1) == b"y"
print("all corners held")
"""


def test_nbdsh_turns_the_corners(appliance: Appliance, program: Program) -> None:
    """Odd sizes, flags, a size that ends within a page, and the document's errno for each wrong request."""
    script = NBDSH.format(size=VOLUMES["odd"])
    done = program("nbdsh", "--base-allocation", "-u", appliance.uri("odd"), "-c", script)
    assert "all corners held" in done.stdout
    assert appliance.json("verify", "odd")["equal"] is True


def test_nbdsh_is_refused_an_unknown_export(appliance: Appliance, program: Program) -> None:
    done = program("nbdsh", "-u", appliance.uri("nosuch"), "-c", "1", expect=1)
    assert "nosuch" in done.stderr


def test_qemu_img_converts_compares_and_maps(appliance: Appliance, program: Program, tmp_path: Path) -> None:
    image, back, uri = str(tmp_path / "image.raw"), str(tmp_path / "back.qcow2"), appliance.uri("converted")
    size = VOLUMES["converted"]
    with open(image, "wb") as f:
        f.truncate(size)
        for at in (0, 5 * MIB, size - 4096):
            f.seek(at)
            f.write(os.urandom(4096))
    program("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, uri)
    program("qemu-img", "compare", "-f", "raw", "-F", "raw", image, uri)
    program("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, back)
    program("qemu-img", "compare", "-f", "raw", "-F", "qcow2", image, back)
    extents = json.loads(program("qemu-img", "map", "--output=json", "-f", "raw", uri).stdout)
    assert sum(e["length"] for e in extents) == size
    assert any(e["zero"] for e in extents), "a sparse image stays sparse"


def test_qemu_io_pokes(appliance: Appliance, program: Program) -> None:
    """Writes, zeroes (with and without unmap), discards and vectored writes, read back with their patterns."""
    commands = [
        "write -P 0x11 0 1M", "write -P 0x22 513 1000", "aio_write -P 0x33 2M 64k", "aio_write -P 0x44 3M 64k",
        "aio_flush", "writev -P 0x55 5M 512 1024 4096", "write -z 64k 64k", "write -z -u 128k 64k",
        "discard 256k 64k", "write -f -P 0x66 15M 4k", "flush",
        "read -P 0x11 0 513", "read -P 0x22 513 1000", "read -P 0x11 1513 100", "read -P 0 64k 128k",
        "read -P 0 256k 64k", "read -P 0x11 320k 64k", "read -P 0x33 2M 64k", "read -P 0x44 3M 64k",
        "read -P 0x55 5M 5632", "read -P 0x66 15M 4k",
    ]  # fmt: skip
    arguments = [part for command in commands for part in ("-c", command)]
    done = program("qemu-io", "-f", "raw", "-d", "unmap", *arguments, appliance.uri("poked"))
    assert "verification failed" not in done.stdout + done.stderr
    assert appliance.json("verify", "poked")["equal"] is True


def test_fio_verifies(appliance: Appliance, program: Program, tmp_path: Path) -> None:
    """Mixed sizes at depth, trims among them, each block's checksum read back."""
    program(
        "fio", "--name=hammer", "--ioengine=nbd", f"--uri={appliance.uri('hammered')}", "--rw=randwrite",
        "--bsrange=512-64k", "--bs_unaligned=0", "--blockalign=512", f"--size={VOLUMES['hammered']}", "--iodepth=16",
        "--io_size=24m", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--fsync=64", cwd=str(tmp_path),
    )  # fmt: skip
    assert appliance.json("verify", "hammered")["equal"] is True
