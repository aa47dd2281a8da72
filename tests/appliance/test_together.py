"""What is stopped together: none waits for another, and no error is lost."""

from __future__ import annotations

import threading

import pytest

from appliance.together import together


def test_none_waits_for_another() -> None:
    """Each call ends only when the others are under way too."""
    barrier = threading.Barrier(4)
    together([lambda: barrier.wait(20) and None for _ in range(4)])
    assert not barrier.broken


def test_all_are_made_and_the_first_error_comes_out() -> None:
    made: list[int] = []

    def fail(text: str) -> None:
        made.append(1)
        raise ValueError(text)

    with pytest.raises(ValueError, match="first"):
        together([lambda: made.append(1), lambda: fail("first"), lambda: fail("second")])
    assert len(made) == 3
    together([])
