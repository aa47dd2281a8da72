"""Lines that come too often are counted, and the count is said."""

from __future__ import annotations

import logging

import pytest

from cdp import storage
from cdp.said import PERIOD_SECONDS, Said


def test_the_first_at_once_then_a_count(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now_ns = 0
    monkeypatch.setattr(storage, "monotonic_ns", lambda: now_ns)
    said = Said(logging.getLogger("said"), burst=2)

    def lines() -> list[str]:
        found = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return found

    for n in range(1000):
        said.add("refused", logging.WARNING, "refused %d", n)
    said.add("other", logging.WARNING, "other")
    assert lines() == ["refused 0", "refused 1", "other"]
    said.tick()
    assert lines() == []
    now_ns = int(PERIOD_SECONDS * 1e9)
    said.tick()
    assert lines() == ["refused 999 (the last of 998 more in 5 s)"]
    said.add("refused", logging.WARNING, "refused %d", 5)
    said.add("other", logging.WARNING, "other")
    assert lines() == ["other"]  # quiet for a period: a first one again; what goes on is only counted
    now_ns *= 2
    said.tick()
    assert lines() == ["refused 5 (the last of 1 more in 5 s)"]
    now_ns *= 2
    said.tick()
    said.add("refused", logging.WARNING, "refused %d", 6)
    assert lines() == ["refused 6"]
