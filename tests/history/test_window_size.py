"""A window that is limited by size is used for points."""

from __future__ import annotations

import os
from pathlib import Path

from tests.history.support import BLOCK, Group, write

SEGMENT_BYTES = 1 << 15
WINDOW_BYTES = 12 * SEGMENT_BYTES


def test_files_kept_to_be_recycled_take_little_of_the_window(tmp_path: Path) -> None:
    """Promise 8: points go because others need their room, not because nothing happens."""
    group = Group(tmp_path, 8, segment_bytes=SEGMENT_BYTES)
    while group.history.bytes <= WINDOW_BYTES:
        group.bundle([write(0, os.urandom(BLOCK))])
    for _ in range(12):
        group.history.retain(None, WINDOW_BYTES, [], 0)
    assert group.history.bytes <= WINDOW_BYTES
    assert sum(segment.file_bytes for segment in group.history.log.segments.values()) > WINDOW_BYTES * 2 // 3
    for _ in range(40):
        group.bundle([write(0, os.urandom(BLOCK))])
        group.history.retain(None, WINDOW_BYTES, [], 0)
    assert sum(segment.file_bytes for segment in group.history.log.segments.values()) > WINDOW_BYTES * 2 // 3
    oldest = group.history.oldest_seq
    assert all(group.read(seq) == version for seq, version in group.versions.items() if seq >= oldest)
    group.close()
