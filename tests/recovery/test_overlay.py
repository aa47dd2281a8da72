"""Private writes over a point: a model test against a bytearray, and every limit."""

from __future__ import annotations

import errno
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdp.recovery.overlay import BLOCK_BYTES, HOLE_ZERO, REGION_BLOCKS, Overlay, OverlayBudget

SIZE = 40 * BLOCK_BYTES + 777  # an odd end


class Below:
    """A fixed point under the overlay: every third block is a hole."""

    def __init__(self, size: int) -> None:
        self.content = bytearray(os.urandom(size))
        for block in range(0, size // BLOCK_BYTES, 3):
            self.content[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES] = bytes(BLOCK_BYTES)

    def read_into(self, offset: int, target: memoryview) -> None:
        target[:] = self.content[offset : offset + len(target)]

    def allocation(self, offset: int, length: int) -> list[tuple[int, int]]:
        extents, end = [], offset + length
        while offset < end:
            block = offset // BLOCK_BYTES
            stop = min((block + 1) * BLOCK_BYTES, end)
            hole = block % 3 == 0 and block < len(self.content) // BLOCK_BYTES
            extents.append((stop - offset, HOLE_ZERO if hole else 0))
            offset = stop
        return extents


ranges = st.tuples(st.integers(0, SIZE - 1), st.integers(1, 6 * BLOCK_BYTES)).map(
    lambda r: (r[0], min(r[1], SIZE - r[0]))
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["write", "zero"]), ranges), max_size=30))
def test_like_a_bytearray(tmp_path_factory, steps):
    below = Below(SIZE)
    model = bytearray(below.content)
    budget = OverlayBudget()
    overlay = Overlay(below, SIZE, str(tmp_path_factory.mktemp("scratch")), budget)
    for number, (what, (offset, length)) in enumerate(steps):
        if what == "write":
            data = bytes([number + 1]) * length
            overlay.write(offset, memoryview(data))
            model[offset : offset + length] = data
        else:
            overlay.zero(offset, length)
            model[offset : offset + length] = bytes(length)
    whole = bytearray(SIZE)
    overlay.read_into(0, memoryview(whole))
    assert whole == model
    at = 0
    for length, flags in overlay.allocation(0, SIZE):
        if flags & 2:
            assert not any(model[at : at + length])
        at += length
    assert at == SIZE
    overlay.close()
    overlay.close()
    assert (budget.overlays_left, budget.regions_left) == (16, 1 << 17)


def test_a_scratch_file_has_no_name_and_goes_with_its_overlay(tmp_path):
    overlay = Overlay(Below(SIZE), SIZE, str(tmp_path / "new"), OverlayBudget())
    overlay.write(1, memoryview(b"x"))
    assert os.listdir(tmp_path / "new") == []
    overlay.close()


def test_bytes_are_bounded_and_zeros_give_back_room(tmp_path):
    """Promise 9."""
    overlay = Overlay(Below(SIZE), SIZE, str(tmp_path), OverlayBudget(bytes_each=4 * BLOCK_BYTES))
    overlay.write(0, memoryview(bytes(4 * BLOCK_BYTES)))
    overlay.write(100, memoryview(b"again in the same blocks"))
    with pytest.raises(OSError) as refused:
        overlay.write(5 * BLOCK_BYTES, memoryview(b"x"))
    assert refused.value.errno == errno.ENOSPC
    overlay.zero(BLOCK_BYTES, BLOCK_BYTES)
    overlay.write(5 * BLOCK_BYTES, memoryview(b"x"))
    assert overlay.bytes == 4 * BLOCK_BYTES
    overlay.close()


def test_number_and_map_are_bounded(tmp_path):
    """Promise 9."""
    size = 1 << 40
    budget = OverlayBudget(overlays=1, regions=2)
    overlay = Overlay(Below(0), size, str(tmp_path), budget)
    with pytest.raises(OSError) as refused:
        Overlay(Below(0), size, str(tmp_path), budget)
    assert refused.value.errno == errno.ENOSPC
    region = REGION_BLOCKS * BLOCK_BYTES
    overlay.zero(0, 2 * region)
    with pytest.raises(OSError) as refused:
        overlay.zero(5 * region, 1)
    assert refused.value.errno == errno.ENOSPC
    overlay.close()
    Overlay(Below(0), size, str(tmp_path), budget).close()


def test_a_discard_of_a_large_volume_is_quick_and_small(tmp_path):
    size = 1 << 40
    overlay = Overlay(Below(0), size, str(tmp_path), OverlayBudget())
    for offset in range(0, size, 4 << 30):
        overlay.zero(offset, 4 << 30)
    assert overlay.allocation(0, size) == [(size, HOLE_ZERO)]
    assert overlay.bytes == 0
    overlay.close()
