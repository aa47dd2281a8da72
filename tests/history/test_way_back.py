"""Putting a replica back takes as much memory for a whole volume as for a block."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

from cdp.history.history import Extent, History

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
