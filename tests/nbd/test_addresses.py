"""Where a server listens: sockets that are stale, in use, far away; TCP."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from cdp.errors import RefusedError
from cdp.nbd.client import Client
from cdp.nbd.loop import Loop
from tests.nbd.memory_export import FileExport, OneExport
from tests.nbd.serving import Server, on_loop, serving


def test_stale_socket_is_replaced_and_a_live_one_refused(server: Server, tmp_path: Path, image: str) -> None:
    other = Loop(OneExport(FileExport(image)))
    with pytest.raises(RefusedError, match="in use"):
        other.listen(server.address)
    stale = tmp_path / "stale.sock"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(stale))
    dead.close()
    assert other.listen(f"unix:{stale}") == f"unix:{stale}"
    (tmp_path / "file").write_text("precious")
    with pytest.raises(RefusedError, match="no socket"):
        other.listen(f"unix:{tmp_path}/file")
    other.stop()
    other.run()
    assert not stale.exists()


def test_long_paths_and_tcp(tmp_path: Path, image: str) -> None:
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    with serving(OneExport(FileExport(image)), folder) as server:
        with Client.connect(server.uri()) as c:
            assert c.read(0, 1) == b"\0"
        bound: list[str] = []
        on_loop(server, lambda: bound.append(server.loop.listen("tcp:127.0.0.1:0")))
        with Client.connect(bound[0].replace("tcp:", "nbd://") + "/x") as c:
            c.write(0, bytes(3 << 20))
            assert c.read(0, 3 << 20) == bytes(3 << 20)
