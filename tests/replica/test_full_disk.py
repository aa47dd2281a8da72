"""A disk that is full: replay waits, and what frees space does not wait with it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from tests.replica.faults import no_space
from tests.replica.helpers import WAIT_SECONDS, rig
from tests.support.running import wait_for

SIZE = 64 * 4096


def undo_bytes(folder: Path) -> int:
    """On the disk, files kept to be recycled included."""
    total = 0
    for path in (folder / "replayer" / "history" / "undo").iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_blocks * 512
    return total


def test_retention_goes_on_while_there_is_no_space(tmp_path: Path) -> None:
    """It is what frees space: what a released pin gives up must not wait for what waits for space."""
    with rig(tmp_path, {"db": SIZE}, segment_bytes=64 << 10, compress=False, window_bytes=256 << 10) as r:
        pin = r.replayer.pin(1)
        for _ in range(40):
            r.feed.write(1, 0, os.urandom(16384))
            r.caught_up()  # each a bundle of its own: all in one would be the newest segment, which stays
        wait_for(lambda: r.replayer.figures()["committed_seq"] == r.replayer.applied.seq, "committed")
        with no_space("pwritev", "undo") as met:
            r.feed.write(1, 0, b"z" * 4096)
            r.feed.flush()
            assert met.wait(WAIT_SECONDS)
            wait_for(lambda: r.replayer.state == "stopped", "stalled")
            assert (r.replayer.reason or {})["code"] == "no_space"
            assert r.replayer.history.oldest_seq <= 1
            assert undo_bytes(tmp_path) > 512 << 10
            pin.release()
            wait_for(lambda: undo_bytes(tmp_path) <= 256 << 10, "space given back")
            assert r.replayer.state == "stopped" and r.replayer.history.oldest_seq > 1
        r.caught_up()
        r.check_every_point()
