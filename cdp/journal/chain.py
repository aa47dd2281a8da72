"""What every consumer of a journal runs over the batches that it reads (promise 4): exactly once, one history."""

from __future__ import annotations

from collections.abc import Iterable

from cdp.errors import FencedError, ForkedError, HoleError
from cdp.journal.batch import Batch


class Chain:
    """A consumer's place in one history.

    `incarnations` are the (epoch, incarnation id) pairs of the batches that were applied: only a batch of one of
    them can be a duplicate. `check` adds to it; `epoch` is the highest one seen.
    """

    def __init__(
        self,
        group_id: bytes,
        seq: int = 0,
        crc: int = 0,
        epoch: int = 0,
        incarnations: Iterable[tuple[int, bytes]] = (),
    ) -> None:
        """`crc` is the checksum of the batch that ends at `seq`; `group_id` b"" takes that of the first batch."""
        self.group_id = bytes(group_id)
        self.seq = seq
        self.crc = crc
        self.epoch = epoch
        self.incarnations = {(number, bytes(name)) for number, name in incarnations}

    def check(self, batch: Batch) -> bool:
        """True: it is the next one, and the chain moves to its end. False: a duplicate to drop.

        Raises HoleError, FencedError, ForkedError; the chain then stays where it was.
        """
        self._check_group(batch)
        life = (batch.epoch, bytes(batch.incarnation))
        if batch.last_seq <= self.seq:
            return self._duplicate(batch, life)
        if batch.first_seq > self.seq + 1:
            raise HoleError(
                f"The journal jumps from seq {self.seq} to seq {batch.first_seq}.", "Resync the group's volumes."
            )
        if batch.epoch < self.epoch:
            raise FencedError(
                f"Seqs {batch.first_seq} to {batch.last_seq} come from incarnation {batch.epoch}, "
                f"but incarnation {self.epoch} has already written.",
                "Stop the older collector: two run for the same group.",
            )
        if batch.first_seq <= self.seq or batch.prev_crc != self.crc:
            raise self._forked(batch)
        if batch.epoch == self.epoch and self.seq and self.incarnations and life not in self.incarnations:
            raise self._forked(batch)  # two lives with one number
        self.group_id = bytes(batch.group_id)
        self.seq, self.crc, self.epoch = batch.last_seq, batch.crc, batch.epoch
        self.incarnations.add(life)
        return True

    def _check_group(self, batch: Batch) -> None:
        if self.group_id and batch.group_id != self.group_id:
            raise ForkedError(
                f"Seqs {batch.first_seq} to {batch.last_seq} belong to the journal {batch.group_id.hex()}, "
                f"not to {self.group_id.hex()}.",
                "Check which journal this group reads, or resync its volumes.",
            )

    def _duplicate(self, batch: Batch, life: tuple[int, bytes]) -> bool:
        same_place_other_bytes = batch.last_seq == self.seq and batch.crc != self.crc
        if life not in self.incarnations or same_place_other_bytes:
            raise self._forked(batch)
        return False

    def _forked(self, batch: Batch) -> ForkedError:
        return ForkedError(
            f"Seqs {batch.first_seq} to {batch.last_seq} of incarnation {batch.epoch} do not continue the history "
            f"that ends at seq {self.seq} of incarnation {self.epoch}.",
            "The journal was put back to an older copy or mixed up: resync the group's volumes.",
        )
