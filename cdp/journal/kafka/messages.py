"""What stands in a topic: messages of whole batches, and claims. FORMAT.md has it for other readers.

A message's key is the id of the relay that sent it. Its value is batches back to back, or one claim::

    0   magic          4s   b"CDPR"
    4   version        u32  1
    8   epoch          u64  of the newest incarnation in the journal that the relay follows
    16  after_seq      u64  the topic has everything up to here without a hole
    24  crc            u32  checksum of the batch that ends there, 0 if after_seq is 0
    28  reserved       u32  0
    32  offset         u64  what follows after_seq is at this offset of the topic or behind it
    40  group_id       16s
    56  crc            u32  CRC-32C of bytes 0 … 55

Whoever reads in order knows from the claims alone whose messages count: those of the relay that claimed last, unless
a claim of a higher epoch came before. So a relay that was fenced cannot be believed by anyone, whatever it still sends.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from crc32c import crc32c

from cdp.errors import CorruptionError, ForkedError
from cdp.journal.batch import Batch, decode

RELAY_ID_BYTES = 16
CLAIM_MAGIC = b"CDPR"
_CLAIM = struct.Struct("<4sIQQIIQ16s")
_CRC = struct.Struct("<I")
# Relays that a reader remembers to have met; of one that it forgot, it looks for the claim once more.
MAX_KNOWN = 64
# Small batches that wait are sent together up to this size; Kafka is at its best with messages of some 100 kB.
JOIN_BYTES = 900_000


class Claim(NamedTuple):
    """A relay's word that the topic is its own from here on."""

    epoch: int
    after_seq: int
    crc: int
    offset: int
    group_id: bytes

    def encode(self) -> bytes:
        head = _CLAIM.pack(CLAIM_MAGIC, 1, self.epoch, self.after_seq, self.crc, 0, self.offset, self.group_id)
        return head + _CRC.pack(crc32c(head))


def decode_claim(value: bytes, where: str) -> Claim | None:
    """None if the message is none. Raises CorruptionError."""
    if value[:4] != CLAIM_MAGIC:
        return None
    whole = len(value) == _CLAIM.size + _CRC.size
    if not whole or _CRC.unpack_from(value, _CLAIM.size)[0] != crc32c(value[: _CLAIM.size]):
        raise CorruptionError(f"{where}: the claim is not what was sent.", "Delete the topic and resync the volumes.")
    _, _, epoch, after_seq, crc, _, offset, group_id = _CLAIM.unpack_from(value)
    return Claim(epoch, after_seq, crc, offset, group_id)


def join(batches: Iterable[Batch]) -> Iterator[list[Batch]]:
    """Neighbours that go into one message together; a batch is never divided."""
    gathered: list[Batch] = []
    size = 0
    for found in batches:
        if gathered and size + found.batch_bytes > JOIN_BYTES:
            yield gathered
            gathered, size = [], 0
        gathered.append(found)
        size += found.batch_bytes
    if gathered:
        yield gathered


def split(value: bytes, where: str) -> Iterator[Batch]:
    """The batches of a message. Raises CorruptionError, StorageError for what is from the future."""
    rest = memoryview(value)
    while rest:
        found = decode(rest, where)
        yield found
        rest = rest[found.batch_bytes :]


class Follower:
    """Reads a topic in order: whose messages count, and which batches go on behind `seq`.

    A batch that jumps is passed over and noted in `jumped_to`: a relay whose send failed says it again, behind what is
    missing. Duplicates are handed on, for the reader's chain to know them.
    """

    def __init__(self, seq: int, holder: bytes = b"", epoch: int = 0) -> None:
        """`holder` b"": not known; the first message's sender counts until somebody claims."""
        self.seq, self.holder, self.epoch = seq, holder, epoch
        self.claim: Claim | None = None  # the newest that counts
        self.jumped_to = 0  # first seq behind what is missing; 0: nothing is
        self.jumped_bytes = 0  # passed over since
        self.stranger = b""  # sent a message, and its claim was not met: it may stand before where the reader began
        self._known = deque([holder], MAX_KNOWN)

    def take(self, key: bytes | None, value: bytes, where: str) -> list[Batch]:
        """The batches to hand on. Raises CorruptionError, ForkedError."""
        sender = bytes(key or b"")
        claim = decode_claim(value, where)
        if claim is not None:
            self.meet(sender)
            if claim.epoch >= self.epoch:
                self.holder, self.epoch, self.claim = sender, claim.epoch, claim
            return []
        if self.holder and sender != self.holder:
            if sender not in self._known:
                self.stranger = sender
            return []  # of a relay that has lost the topic
        return [found for found in split(value, where) if self._goes_on(found, where)]

    def meet(self, sender: bytes) -> None:
        """Whoever is known is no stranger: its claim was met, or looked for."""
        self.stranger = b""
        if sender not in self._known:
            self._known.append(sender)

    def _goes_on(self, found: Batch, where: str) -> bool:
        if found.first_seq > self.seq + 1:
            self.jumped_to = self.jumped_to or found.first_seq
            self.jumped_bytes += found.batch_bytes
            return False
        if found.first_seq == self.seq + 1:
            self.seq, self.jumped_to, self.jumped_bytes = found.last_seq, 0, 0
        elif found.last_seq > self.seq:
            raise ForkedError(
                f"{where}: seqs {found.first_seq} to {found.last_seq} are one batch, but the reader ended at "
                f"{self.seq}: it is another history.",
                "The journal was put back to an older copy or mixed up: resync the group's volumes.",
            )
        return True
