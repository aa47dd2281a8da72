"""Promise 4, the consumer's side: n+1 after n, duplicates of a known life only, every other case a clear state."""

from __future__ import annotations

import pytest

from cdp.errors import FencedError, ForkedError, HoleError
from cdp.journal.batch import DESCRIPTOR, HEARTBEAT, Batch, Identity, decode, encode
from cdp.journal.chain import Chain
from tests.journal.support import GROUP, identity


def batch(who: Identity, first_seq: int, count: int, prev_crc: int, salt: int = 0) -> Batch:
    descriptors = DESCRIPTOR.pack(HEARTBEAT, 0, 0xFFFF, 0, salt, 0) * count
    head, _ = encode(who, first_seq, 0, 0, first_seq, prev_crc, descriptors, [], 0)
    return decode(head)


FIRST = batch(identity(1), 1, 2, 0)
SECOND = batch(identity(1), 3, 2, FIRST.crc)
THIRD = batch(identity(2), 5, 1, SECOND.crc)


def chain_at_third() -> Chain:
    chain = Chain(GROUP)
    assert all(chain.check(b) for b in (FIRST, SECOND, THIRD))
    return chain


def test_goes_on_over_incarnations_and_drops_duplicates() -> None:
    chain = chain_at_third()
    assert (chain.seq, chain.crc, chain.epoch) == (5, THIRD.crc, 2)
    assert chain.incarnations == {(1, identity(1).incarnation), (2, identity(2).incarnation)}
    assert [chain.check(b) for b in (FIRST, SECOND, THIRD)] == [False] * 3


def test_goes_on_from_what_a_consumer_kept() -> None:
    chain = Chain(GROUP, 4, SECOND.crc, 1, [(1, identity(1).incarnation)])
    assert not chain.check(SECOND)
    assert chain.check(THIRD)


CASES = [
    ("hole", batch(identity(2), 7, 1, THIRD.crc), HoleError),
    ("older incarnation", batch(identity(1), 6, 1, THIRD.crc), FencedError),
    ("other predecessor", batch(identity(2), 6, 1, THIRD.crc ^ 1), ForkedError),
    ("newer incarnation, other predecessor", batch(identity(3), 6, 1, THIRD.crc ^ 1), ForkedError),
    ("overlaps", batch(identity(2), 5, 2, SECOND.crc), ForkedError),
    ("duplicate of an unknown life", batch(identity(3), 5, 1, SECOND.crc), ForkedError),
    ("duplicate with other bytes", batch(identity(2), 5, 1, SECOND.crc, salt=1), ForkedError),
    ("two lives with one number", batch(Identity(GROUP, 2, b"x" * 16), 6, 1, THIRD.crc), ForkedError),
    ("another group", batch(identity(2, b"z" * 16), 6, 1, THIRD.crc), ForkedError),
]


@pytest.mark.parametrize(("stranger", "error"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_stranger_stops_the_group_and_changes_nothing(stranger: Batch, error: type[Exception]) -> None:
    chain = chain_at_third()
    before = (chain.seq, chain.crc, chain.epoch, set(chain.incarnations))
    with pytest.raises(error):
        chain.check(stranger)
    assert (chain.seq, chain.crc, chain.epoch, chain.incarnations) == before
