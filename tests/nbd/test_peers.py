"""Real NBD peers against the loop with a file behind it: another reading of the protocol than ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nbd.memory_export import FileExport, OneExport
from tests.nbd.serving import Server, serving

SIZE = 32 << 20


def run(*command: str, seconds: float = 60) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    # nbdsh runs the first python3 that it finds; only the system's has its bindings.
    environment = {**os.environ, "PATH": f"/usr/bin:/bin:{os.environ['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.raw"
    path.touch()
    os.truncate(path, SIZE)
    with path.open("r+b") as f:
        for offset in range(0, SIZE, 4 << 20):
            f.seek(offset)
            f.write(os.urandom(1 << 20))
    return path


@pytest.fixture
def server(tmp_path: Path, image: Path) -> Iterator[Server]:
    with serving(OneExport(FileExport(str(image)), "", "x", "name with spaces"), tmp_path) as running:
        yield running


def test_nbdinfo(server: Server) -> None:
    listed = json.loads(run("nbdinfo", "--json", "--list", server.uri("")))
    assert {e["export-name"] for e in listed["exports"]} == {"", "x", "name with spaces"}
    info = json.loads(run("nbdinfo", "--json", server.uri("name%20with%20spaces")))["exports"][0]
    assert info["export-size"] == SIZE and info["can_multi_conn"] and info["can_fast_zero"]
    assert info["block_size_preferred"] == 4096 and info["block_size_maximum"] == 32 << 20
    extents = json.loads(run("nbdinfo", "--json", "--map", server.uri()))
    assert sum(e["length"] for e in extents) == SIZE and {e["type"] for e in extents} == {0, 3}


def test_nbdcopy_both_ways(server: Server, image: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.raw"
    run("nbdcopy", server.uri(), str(target))
    assert target.read_bytes() == image.read_bytes()
    target.write_bytes(os.urandom(SIZE))
    run("nbdcopy", "--flush", "--requests=64", str(target), server.uri())
    assert target.read_bytes() == image.read_bytes()


SHELL = """
h.connect_uri(URI)
assert h.get_structured_replies_negotiated()
buf = bytearray(range(256)) * 64
h.pwrite(buf, 12345, nbd.CMD_FLAG_FUA)
assert h.pread(len(buf), 12345) == buf
cookies = [h.aio_pread(nbd.Buffer(1 << 20), i << 20) for i in range(16)]
while cookies:
    h.poll(-1)
    cookies = [c for c in cookies if not h.aio_command_completed(c)]
h.zero(4096, 12288, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE)
chunks = []
h.pread_structured(4096, 12288, lambda *chunk: chunks.append(chunk[1:3]) or 0, nbd.CMD_FLAG_DF)
assert chunks == [(12288, nbd.READ_DATA)] and h.pread(4096, 12288) == bytes(4096)
h.trim(4096, 0); h.cache(4096, 0); h.flush()
h.set_strict_mode(0)
for call, number in [(lambda: h.pread(2, h.get_size() - 1), 22), (lambda: h.pwrite(b"ab", h.get_size() - 1), 28)]:
    try:
        call()
        raise SystemExit("not refused")
    except nbd.Error as e:
        assert e.errnum == number, e
h.shutdown()
"""


def test_nbdsh(server: Server) -> None:
    run("nbdsh", "-c", SHELL.replace("URI", repr(server.uri())))


def test_nbdsh_without_structured_replies(server: Server) -> None:
    code = f"h.set_request_structured_replies(False); h.connect_uri({server.uri()!r}); h.pwrite(b'abc', 5); "
    run("nbdsh", "-c", code + "assert h.pread(3, 5) == b'abc'; h.shutdown()")


def test_qemu_img(server: Server, image: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.qcow2"
    run("qemu-img", "convert", "-O", "qcow2", server.uri(), str(copy))
    run("qemu-img", "compare", server.uri(), str(copy))
    mapped = json.loads(run("qemu-img", "map", "--output=json", server.uri()))
    assert any(not e["data"] for e in mapped) and any(e["data"] for e in mapped)
    image.write_bytes(bytes(SIZE))
    run("qemu-img", "convert", "-n", "-O", "raw", str(copy), server.uri())
    run("qemu-img", "compare", server.uri(), str(copy))


def test_qemu_io(server: Server) -> None:
    script = ["write -P 7 1M 3M", "read -P 7 1M 3M", "write -z -u 2M 64k", "read -P 0 2M 64k", "discard 3M 64k",
              "aio_write -f -P 9 5000 20000", "aio_flush", "flush", "read -P 9 5000 20000"]  # fmt: skip
    out = run("qemu-io", "-f", "raw", *(word for line in script for word in ("-c", line)), server.uri())
    assert "verification failed" not in out.lower()


@pytest.mark.parametrize("options", [["--bs=4k", "--iodepth=32"], ["--bsrange=512-300k", "--iodepth=16"]])
def test_fio_verify(server: Server, tmp_path: Path, options: list[str]) -> None:
    run("fio", "--name=j", "--ioengine=nbd", f"--uri={server.uri()}", "--rw=randrw", "--size=8m", "--verify=crc32c",
        "--verify_backlog=64", f"--aux-path={tmp_path}", *options)  # fmt: skip
