"""`barrier:` means what a guest said; the flushes of a rollback's copying are not a guest's."""

from __future__ import annotations

from datetime import UTC

import pytest

from cdp.errors import RefusedError
from cdp.recovery.points import resolve
from tests.recovery.plain_timeline import Gap, PlainTimeline

COPYING = Gap(1, 31, 35, "rollback", "copying")


@pytest.mark.parametrize(("asked", "found"), [("now", 20), ("seq:40", 20), ("seq:33", 20), ("seq:19", 10)])
def test_a_rollbacks_own_flushes_are_no_barriers(asked: str, found: int) -> None:
    barriers = [(1, seq) for seq in (10, 20, 33, 34)]
    timeline = PlainTimeline(range(1000, 1050), barriers=barriers, gaps=[COPYING])
    assert resolve(f"barrier:{asked}", timeline, 1, 2000, UTC).seq == found


def test_a_barrier_in_a_gap_is_refused() -> None:
    timeline = PlainTimeline(range(1000, 1050), barriers=[(1, 10), (1, 33)], gaps=[Gap(1, 31, 35, "resync", "resync")])
    with pytest.raises(RefusedError) as refused:
        resolve("barrier:now", timeline, 1, 2000, UTC)
    assert refused.value.code == "in_gap"
