"""Putting a replica back takes as much memory for a whole volume as for a block."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest

from cdp.history.history import Extent, History
from cdp.history.undo import UndoLog
from tests.history.support import BLOCK, Group, write

# A bundle's worth of blocks, and bundles: a discard of 1 GiB whose batch never ended.
BLOCKS, BUNDLES = 2048, 128
MAX_BYTES = 8 << 20


def test_a_discard_of_everything_is_put_back_in_little_memory(tmp_path: Path) -> None:
    """Promise 9: memory does not grow with what a killed replayer had not committed."""
    history = History(str(tmp_path), segment_bytes=1 << 20)
    history.cut(0)
    for i in range(BUNDLES):
        pending = history.append([], [Extent(0, i * BLOCKS, BLOCKS, 1, None)], False)
        history.sync(pending)
        history.publish(pending)
    history.close()
    history = History(str(tmp_path), segment_bytes=1 << 20)
    tracemalloc.start()
    try:
        assert sum(extent.count for extent in history.recover(0)) == BLOCKS * BUNDLES
        history.cut(0)
        assert tracemalloc.get_traced_memory()[1] < MAX_BYTES
    finally:
        tracemalloc.stop()
    history.close()


class Killed(RuntimeError):
    """Ends what was under way."""


def test_files_that_a_killed_start_left_do_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 9: what was cut off but not freed yet, and a segment that was never begun, are of no use to anybody."""
    group = Group(tmp_path, 8, segment_bytes=1 << 14)
    for _ in range(16):
        group.bundle([write(0, os.urandom(BLOCK))])
    assert len(group.history.log.segments) > 3
    group.history.close()
    (tmp_path / "history" / "undo" / f"undo-{17:020d}-{99:010d}").write_bytes(bytes(BLOCK))
    group.history = group.open()
    committed = group.batches[2].last_seq

    def die(log: UndoLog, path: str) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(UndoLog, "_free", die)
        with pytest.raises(Killed):
            group.put_back(committed)
    group.history.close()
    group.history = group.open()
    group.put_back(committed)
    files = {str(path) for path in (tmp_path / "history" / "undo").glob("undo-*")}
    assert files == {segment.path for segment in group.history.log.segments.values()}
    assert all(group.read(seq) == version for seq, version in group.versions.items())
    group.close()
