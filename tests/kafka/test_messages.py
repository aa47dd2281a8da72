"""What stands in a topic, and whose messages count: pure."""

from __future__ import annotations

import random

import pytest

from cdp.errors import CorruptionError, ForkedError
from cdp.journal.batch import DESCRIPTOR, WRITE, Batch, Identity, decode, encode
from cdp.journal.kafka.messages import JOIN_BYTES, Claim, Follower, decode_claim, join, split
from tests.journal.support import GROUP

OURS, THEIRS = b"o" * 16, b"t" * 16


def batch(first: int, records: int = 1, epoch: int = 1, size: int = 10) -> Batch:
    descriptors = b"".join(DESCRIPTOR.pack(WRITE, 0, 1, size, i * size, size) for i in range(records))
    data = [bytes(size)] * records
    identity = Identity(GROUP, epoch, b"i" * 16)
    head, _ = encode(identity, first, first - 1, 1, first, 0, descriptors, data, records * size)
    return decode(head + b"".join(data))


def claim(epoch: int, after_seq: int = 0) -> bytes:
    return Claim(epoch, after_seq, 0, 0, GROUP).encode()


def take(follower: Follower, sender: bytes, *batches: Batch) -> list[int]:
    found = follower.take(sender, b"".join(bytes(b.raw) for b in batches), "here")
    return [b.first_seq for b in found]


def test_a_claim_survives_and_its_damage_is_seen() -> None:
    made = Claim(7, 123, 456, 789, GROUP)
    assert decode_claim(made.encode(), "here") == made
    assert decode_claim(bytes(batch(1).raw), "here") is None
    for at in range(4, len(made.encode())):
        damaged = bytearray(made.encode())
        damaged[at] ^= 0x10
        with pytest.raises(CorruptionError):
            decode_claim(bytes(damaged), "here")
    with pytest.raises(CorruptionError):
        decode_claim(made.encode()[:-1], "here")


def test_messages_join_and_split() -> None:
    rng = random.Random(1)
    batches, seq = [], 1
    for _ in range(200):
        batches.append(batch(seq, 1, size=rng.choice((1, 4096, 500_000, 1 << 20))))
        seq += 1
    messages = list(join(batches))
    assert [b for m in messages for b in m] == batches
    assert all(len(m) == 1 or sum(b.batch_bytes for b in m) <= JOIN_BYTES for m in messages)
    for message in messages:
        value = b"".join(bytes(b.raw) for b in message)
        assert [b.first_seq for b in split(value, "here")] == [b.first_seq for b in message]


def test_what_is_missing_comes_behind_a_jump() -> None:
    """Promise 4: 1, 3, then the relay says 2 and 3 again: each once, in order."""
    follower = Follower(0)
    assert take(follower, OURS, batch(1)) == [1]
    assert take(follower, OURS, batch(3)) == [] and follower.jumped_to == 3 and follower.jumped_bytes
    assert take(follower, OURS, batch(2)) == [2] and follower.jumped_to == 0 and not follower.jumped_bytes
    assert take(follower, OURS, batch(3)) == [3]
    assert take(follower, OURS, batch(2)) == [2]  # a duplicate, for the chain to know it
    assert follower.seq == 3


def test_across_its_end_is_another_history() -> None:
    """Promise 4."""
    follower = Follower(5)
    with pytest.raises(ForkedError):
        take(follower, OURS, batch(5, records=2))


def test_whoever_claimed_last_counts() -> None:
    """Promise 4: a relay that lost the topic is not believed, whatever it still sends."""
    follower = Follower(0)
    assert follower.take(OURS, claim(1), "here") == []
    assert take(follower, OURS, batch(1)) == [1]
    assert follower.take(THEIRS, claim(1), "here") == []
    assert take(follower, OURS, batch(2)) == []
    assert take(follower, THEIRS, batch(2)) == [2]
    assert (follower.holder, follower.seq) == (THEIRS, 2)


def test_a_claim_of_an_older_incarnation_does_not_count() -> None:
    """Promise 4: a zombie cannot take the topic back."""
    follower = Follower(0)
    follower.take(OURS, claim(5), "here")
    follower.take(THEIRS, claim(4), "here")
    assert take(follower, THEIRS, batch(1, epoch=4)) == []
    assert take(follower, OURS, batch(1, epoch=5)) == [1]


def test_a_sender_without_a_claim_is_a_stranger_once() -> None:
    """Its claim may stand before where the reader began: it is looked for, once."""
    follower = Follower(0, OURS, 1)
    assert take(follower, OURS, batch(1)) == [1] and not follower.stranger
    assert take(follower, THEIRS, batch(2)) == [] and follower.stranger == THEIRS
    follower.meet(THEIRS)
    assert take(follower, THEIRS, batch(2)) == [] and not follower.stranger
    assert follower.take(b"z" * 16, claim(0), "here") == [] and take(follower, b"z" * 16, batch(2)) == []
    assert not follower.stranger, "its claim was met, and does not count"


def test_garbage_is_damage_and_nothing_else() -> None:
    rng = random.Random(2)
    good = bytes(batch(1, 3).raw)
    for _ in range(300):
        damaged = bytearray(good)
        damaged[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        with pytest.raises(Exception) as error:
            Follower(0).take(OURS, bytes(damaged), "here")
        assert error.value.code in ("corrupt", "storage")  # type: ignore[attr-defined]
    with pytest.raises(CorruptionError):
        Follower(0).take(OURS, good + b"x", "here")
