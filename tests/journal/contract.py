"""What every carrier of a journal must do for its readers: one suite, run over each of them.

A carrier's test module makes a class of `Carrier` and a subclass of `ContractSuite` with a fixture `carrier`.
"""

from __future__ import annotations

import select
from typing import Protocol

import pytest

from cdp.errors import CdpError
from cdp.journal.batch import DESCRIPTOR_BYTES, Batch
from cdp.journal.chain import Chain
from cdp.journal.reader import JournalReader
from tests.journal.support import check_batch

# Longest that a published batch may take to be announced.
WAIT_SECONDS = 10


class Carrier(Protocol):
    """One journal, its writing side at the test's command."""

    def append(self, *sizes: int) -> int:
        """One batch of records of these sizes, as `support.append` makes them, not yet readable; its last seq."""
        ...

    def publish(self) -> None:
        """Everything appended is durable and may be read."""
        ...

    def restart(self) -> None:
        """The writing side starts again, as another incarnation."""
        ...

    def forget(self, seq: int) -> int:
        """Space up to `seq` is given back as far as the carrier can; the first seq that is still there."""
        ...

    def reader(self, after_seq: int, consumer: str = "replayer") -> JournalReader: ...


def wait(reader: JournalReader) -> None:
    """Until the reader is told that there may be more."""
    assert select.select([reader], [], [], WAIT_SECONDS)[0], "never woken"
    reader.drain()


def read_to(reader: JournalReader, seq: int, max_bytes: int = 1 << 20) -> list[Batch]:
    """Reads until the batch that ends at `seq`, waiting where there is nothing."""
    batches: list[Batch] = []
    while not batches or batches[-1].last_seq < seq:
        found = reader.read(max_bytes)
        if not found:
            wait(reader)
        batches += found
    return batches


class ContractSuite:
    """The tests. `pytest` runs them in the subclasses that have a `carrier`."""

    def test_reads_what_was_appended_in_order(self, carrier: Carrier) -> None:
        last = [carrier.append(*sizes) for sizes in ((1,), (4096,) * 32, (100_000,), (5, 70_000, 0, 3))][-1]
        carrier.publish()
        reader = carrier.reader(0)
        chain = Chain(b"")
        for batch in read_to(reader, last):
            check_batch(batch)
            assert len(batch.descriptors) == batch.record_count * DESCRIPTOR_BYTES
            assert chain.check(batch)
        assert chain.seq == last
        assert reader.read(1 << 20) == []
        reader.close()

    def test_nothing_before_it_is_durable(self, carrier: Carrier) -> None:
        """Promise 4."""
        reader = carrier.reader(0)
        assert reader.read(1 << 20) == []
        first = carrier.append(10)
        assert reader.read(1 << 20) == []
        carrier.publish()
        assert read_to(reader, first)[-1].last_seq == first
        carrier.append(10)
        assert reader.read(1 << 20) == []
        assert reader.end()[0] == first
        reader.close()

    def test_a_waiting_reader_is_woken(self, carrier: Carrier) -> None:
        carrier.append(10)
        carrier.publish()
        reader = carrier.reader(0)
        reader.read(1 << 20)
        reader.drain()
        assert reader.read(1 << 20) == []
        last = carrier.append(20)
        carrier.publish()
        wait(reader)
        assert read_to(reader, last)[-1].last_seq == last
        reader.close()

    def test_max_bytes_bounds_a_read_but_one_batch_always_comes(self, carrier: Carrier) -> None:
        last = [carrier.append(10_000) for _ in range(10)][-1]
        carrier.publish()
        reader = carrier.reader(0)
        batches = read_to(reader, last, max_bytes=1)
        assert [b.last_seq for b in batches] == list(range(1, last + 1))
        reader.close()
        again = carrier.reader(0)
        assert len(read_to(again, 1, max_bytes=1)) == 1
        again.close()

    @pytest.mark.parametrize("after", [1, 3, 6])
    def test_goes_on_behind_any_batch(self, carrier: Carrier, after: int) -> None:
        last = [carrier.append(3_000) for _ in range(6)][-1]
        carrier.publish()
        reader = carrier.reader(after)
        if after == last:
            assert reader.read(1 << 20) == []
        else:
            assert read_to(reader, last)[0].first_seq == after + 1
        reader.close()

    def test_order_time_never_goes_back(self, carrier: Carrier) -> None:
        for _ in range(3):
            for _ in range(5):
                last = carrier.append(1, 2, 3)
            carrier.publish()
            carrier.restart()
        carrier.publish()
        reader = carrier.reader(0)
        times = [record.time_ns for batch in read_to(reader, last) for record in batch.records()]
        assert times == sorted(set(times))
        assert reader.end() == (last, times[-1])
        reader.close()

    def test_history_goes_on_over_restarts(self, carrier: Carrier) -> None:
        """Promise 4: one history, chained over incarnations that grow."""
        for _ in range(4):
            carrier.append(5_000, 1)
            last = carrier.append(7)
            carrier.publish()
            carrier.restart()
        carrier.publish()
        reader = carrier.reader(0)
        chain = Chain(b"")
        batches = read_to(reader, last)
        assert all(chain.check(batch) for batch in batches)
        assert chain.seq == last and len(chain.incarnations) == 4
        assert not chain.check(batches[0])
        reader.close()

    def test_what_is_gone_is_a_hole(self, carrier: Carrier) -> None:
        """Promise 4: a hole is a clear state, never skipped."""
        for _ in range(40):
            last = carrier.append(9_000)
        carrier.publish()
        first = carrier.forget(last)
        assert first > 1
        reader = carrier.reader(0, "latecomer")
        with pytest.raises(CdpError) as error:
            read_to(reader, last)
        assert error.value.code == "hole" and str(first) in str(error.value)
        reader.close()

    def test_another_history_is_forked(self, carrier: Carrier) -> None:
        """Promise 4: a reader ahead of the journal, or inside a batch, belongs to another history."""
        carrier.append(1)
        last = carrier.append(1, 1, 1)
        carrier.publish()
        inside = carrier.reader(2, "inside")
        with pytest.raises(CdpError) as error:
            read_to(inside, last)
        assert error.value.code == "forked"
        inside.close()
        ahead = carrier.reader(last + 100, "ahead")
        assert ahead.read(1 << 20) == []
        carrier.append(1)
        carrier.publish()
        wait(ahead)
        with pytest.raises(CdpError) as error:
            ahead.read(1 << 20)
        assert error.value.code == "forked"
        ahead.close()
