"""The policy as a table."""

from __future__ import annotations

import pytest

from cdp.history.retention import Decision, SegmentFacts, decide

SEGMENTS = [SegmentFacts(i, i * 10, i * 100, 1000) for i in range(1, 6)]  # last seqs 10 … 50, last times 100 … 500


@pytest.mark.parametrize(
    ("window_ns", "window_bytes", "pins", "now_ns", "other", "expected"),
    [
        (None, None, [], 10_000, 0, Decision([], None, False, False)),
        (1000, None, [], 500, 0, Decision([], None, False, False)),
        (300, None, [], 500, 0, Decision([1, 2], 20, False, False)),  # 200 is exactly the window's begin
        (299, None, [], 500, 0, Decision([1, 2], 20, False, False)),
        (0, None, [], 9999, 0, Decision([1, 2, 3, 4], 40, False, False)),  # the newest stays
        (None, 5000, [], 0, 0, Decision([], None, False, False)),
        (None, 4999, [], 0, 0, Decision([1], 10, False, False)),
        (None, 3000, [], 0, 0, Decision([1, 2], 20, False, False)),
        (None, 3000, [], 0, 1, Decision([1, 2, 3], 30, False, False)),  # the index counts too
        (None, 0, [], 0, 0, Decision([1, 2, 3, 4], 40, False, False)),
        (1000, 4000, [], 500, 0, Decision([1], 10, True, False)),  # size bites first: a short window
        (300, 1500, [], 500, 0, Decision([1, 2, 3, 4], 40, True, False)),
        (300, 4000, [], 500, 0, Decision([1, 2], 20, False, False)),  # age bites first
        (300, None, [15], 500, 0, Decision([1], 10, False, True)),
        (300, None, [10], 500, 0, Decision([1], 10, False, True)),  # the pinned point itself stays
        (300, None, [9], 500, 0, Decision([], None, False, True)),
        (None, 0, [25, 45], 0, 0, Decision([1, 2], 20, False, True)),
        (300, None, [40], 500, 0, Decision([1, 2], 20, False, False)),  # nothing that it holds would go
    ],
)
def test_decide(
    window_ns: int | None, window_bytes: int | None, pins: list[int], now_ns: int, other: int, expected: Decision
) -> None:
    assert decide(SEGMENTS, window_ns, window_bytes, pins, now_ns, other) == expected


def test_nothing_to_decide_about() -> None:
    assert decide([], 0, 0, [], 0) == Decision([], None, False, False)
    assert decide(SEGMENTS[:1], 0, 0, [], 10**9) == Decision([], None, False, False)
