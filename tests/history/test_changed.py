"""Which blocks differ, gathered a segment at a time: few in a large volume, many in a small one, runs and singles."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cdp.history import changed

# A volume of some MiB, one of 4 TiB, and one that ends where byte maps do.
SPANS = (1 << 10, 1 << 30, (1 << 26) + 64)


@st.composite
def gathered(draw: st.DrawFn) -> list[tuple[list[int], int]]:
    """(blocks, width) as segments bring them."""
    span = draw(st.sampled_from(SPANS))
    near = st.integers(0, 40) | st.integers(max(0, span - 40), span)
    parts = []
    for _ in range(draw(st.integers(0, 6))):
        width = draw(st.sampled_from((1, 16)))
        blocks = draw(st.lists(near | st.integers(0, span), max_size=60))
        parts.append(([block - block % width for block in blocks], width))
    return parts


def stretches_of(parts: list[tuple[list[int], int]]) -> list[tuple[int, int]]:
    found = changed._Blocks()
    for blocks, width in parts:
        found.add(np.array(blocks, np.uint64), width)
    starts, counts = found.stretches()
    return list(zip(starts.tolist(), counts.tolist(), strict=True))


@given(gathered())
def test_stretches_are_what_was_added(parts: list[tuple[list[int], int]]) -> None:
    wanted = {block + i for blocks, width in parts for block in blocks for i in range(width)}
    found = stretches_of(parts)
    assert [start + i for start, count in found for i in range(count)] == sorted(wanted)
    ends = [start + count for start, count in found]
    assert all(end < start for end, (start, _) in zip(ends, found[1:], strict=False))  # neighbours are joined


def test_the_same_far_blocks_again_and_again_are_held_once(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Promise 9: what is held is bounded by what differs, not by how often it was written."""
    monkeypatch.setattr(changed, "_MERGE_BLOCKS", 100)
    found = changed._Blocks()
    blocks = np.arange(0, 50_000_000, 1_000_000, dtype=np.uint64)
    for _ in range(100):
        found.add(blocks, 1)
        assert found._held <= 2 * 50 + 150
    assert len(found.stretches()[0]) == 50
