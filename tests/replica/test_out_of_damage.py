"""Damage of what a replayer keeps stops its group with a reason, and a reset with a resync is the way out."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cdp import storage
from cdp.errors import RefusedError
from cdp.journal import batch as fmt
from tests.recovery.serving import past_of
from tests.replica.helpers import WAIT_SECONDS, rig
from tests.support.running import wait_for

SIZE = 16 * 4096


def undo(folder: Path) -> None:
    """All of the undo log but its openings."""
    for path in (folder / "history" / "undo").glob("undo-*"):
        path.write_bytes(path.read_bytes()[:4096])


def position(folder: Path) -> None:
    (folder / "committed").write_bytes(b"00000000\n{}")


def missing_position(folder: Path) -> None:
    (folder / "committed").unlink()


def replica(folder: Path) -> None:
    (folder / "replica" / "db.raw").unlink()


def test_a_reset_waits_for_no_unlinking_and_a_restart_finishes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 9: a large old history goes in the background; those who read the past do not wait for it."""
    with rig(tmp_path, {"db": SIZE}) as r:
        r.feed.write(1, 0, os.urandom(SIZE))
        r.caught_up()
        at, go_on, real = threading.Event(), threading.Event(), storage.unlink

        def slow(path: str) -> None:
            if "/history/" in path:
                at.set()
                assert go_on.wait(WAIT_SECONDS)
                raise OSError(errno.EIO, "Input/output error")  # it ends there, as by a kill
            real(path)

        monkeypatch.setattr(storage, "unlink", slow)
        behind = r.feed.flush()
        r.feed.volume(1, "db", SIZE)
        r.feed.gap(1, opens=True)
        end = r.feed.gap(1, opens=False)
        r.replayer.reset_history(behind)
        assert at.wait(WAIT_SECONDS)
        r.caught_up()
        assert r.read("db", end) == bytes(r.feed.now[1])
        go_on.set()
        r.replayer.stop()
        monkeypatch.undo()
        old = tmp_path / "replayer" / "history"
        assert old.exists()
        r.start()
        wait_for(lambda: not old.exists(), "the old history is gone")
        assert r.read("db", end) == bytes(r.feed.now[1])


@pytest.mark.parametrize("damage", [undo, position, missing_position, replica])
def test_a_reset_and_a_resync_are_the_way_out(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    """Promise 4: never served, never repaired silently; promise 8: no point before the resync's end."""
    with rig(tmp_path, {"db": SIZE}) as r:
        for _ in range(3):
            r.feed.write(1, 0, os.urandom(SIZE))
            r.feed.flush()
        r.caught_up().stop()
        damage(tmp_path / "replayer")
        replayer = r.start()
        assert replayer.state == "stopped" and (replayer.reason or {})["code"] == "corrupt"
        for _ in range(2):  # again, before the resync has ended
            behind = r.feed.flush()
            r.feed.volume(1, "db", SIZE)
            r.feed.gap(1, opens=True)
            replayer.reset_history(behind)
            r.caught_up()
            assert replayer.state == "resyncing"
        content = bytes(r.feed.now[1])
        r.feed.record(fmt.SYNC, 1, 0, SIZE, content)
        end = r.feed.gap(1, opens=False)
        r.feed.write(1, 77, b"goes on")
        r.caught_up()
        assert replayer.state == "protected"
        assert r.read("db", end) == content and r.replica("db") == bytes(r.feed.now[1])
        replayer.stop()
        r.start()
        assert r.read("db", end) == content


def test_a_volume_has_no_point_before_its_own_resync_behind_a_reset(tmp_path: Path) -> None:
    """Promise 8: the second volume's gap begins behind the first's, and the new history in front of both."""
    with rig(tmp_path, {"db": SIZE, "log": SIZE}) as r:
        r.feed.write(2, 0, os.urandom(SIZE))
        r.caught_up().stop()
        undo(tmp_path / "replayer")
        (tmp_path / "replayer" / "replica" / "log.raw").write_bytes(b"damaged!" * (SIZE // 8))
        r.start()
        behind = r.feed.flush()
        for volume in (1, 2):
            first = r.feed.volume(1, "db", SIZE)
            r.feed.volume(2, "log", SIZE)
            r.feed.gap(volume, opens=True, from_seq=first)
        r.replayer.reset_history(behind)
        for volume in (1, 2):
            r.feed.record(fmt.SYNC, volume, 0, SIZE, bytes(r.feed.now[volume]))
            end = r.feed.gap(volume, opens=False)
        r.caught_up()
        for _ in range(2):
            assert r.read("log", end) == bytes(r.feed.now[2])
            for seq in range(behind + 1, end):
                with pytest.raises(RefusedError):
                    past_of(r, tmp_path / "scratch").open(f"log@seq:{seq}", "test")
            r.replayer.stop()
            r.start()
