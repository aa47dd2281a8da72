"""Model test of the journal: whatever is appended, synced, freed, killed and cut, readers see one history.

Promises 3 and 4: what was durable stands, what a reader has seen stands, everything that stands is what was appended.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cdp.errors import JournalFullError
from cdp.journal import consumers
from cdp.journal.chain import Chain
from cdp.journal.reader import EmbeddedReader
from cdp.journal.writer import JournalWriter
from tests.journal import support
from tests.journal.disk import Disk, PowerCut

MEMORY = Path("/dev/shm")


class JournalMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self._patch = pytest.MonkeyPatch()
        self._root = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
        self.folder = self._root / "j"
        self.folder.mkdir()
        self.disk = Disk(self.folder, self._patch)
        self.ends = [0]  # seqs at which a batch ends
        self.durable = 0
        self.epoch = 0
        self.writer: JournalWriter | None = None
        self.reader: EmbeddedReader | None = None
        self.chain = Chain(support.GROUP)

    @initialize()
    def begin(self) -> None:
        consumers.register(str(self.folder), "replayer")
        self._start()

    def _start(self) -> None:
        self.epoch += 1
        self.writer = support.open_writer(self.folder, self.epoch, max_bytes=12 * support.SEGMENT_BYTES)
        assert self.writer.last_seq in self.ends and self.writer.last_seq >= self.durable
        self.ends = [end for end in self.ends if end <= self.writer.last_seq]
        self.durable = self.writer.last_seq
        tail = list(self.writer.batches_after(self.chain.seq))
        assert (tail[-1].last_seq if tail else self.chain.seq) == self.writer.last_seq
        self.writer.publish(self.writer.last_seq)

    @rule(sizes=st.lists(st.integers(0, 9000), min_size=1, max_size=6), times=st.integers(1, 6))
    def append(self, sizes: list[int], times: int) -> None:
        assert self.writer is not None
        for _ in range(times):
            try:
                self.ends.append(support.append(self.writer, *sizes))
            except JournalFullError:
                assert self.writer.bytes + support.SEGMENT_BYTES > 12 * support.SEGMENT_BYTES
                return

    @rule()
    def sync(self) -> None:
        assert self.writer is not None
        self.durable = support.sync(self.writer)

    @rule()
    def sync_without_publishing(self) -> None:
        assert self.writer is not None
        token = self.writer.begin_sync()
        if token is not None:
            self.writer.sync(token)
            self.durable = self.writer.end_sync(token)

    @rule(max_bytes=st.sampled_from((1, 30_000, 1 << 20)))
    def read(self, max_bytes: int) -> None:
        if self.reader is None:
            self.reader = EmbeddedReader(str(self.folder), "replayer", self.chain.seq)
        for batch in self.reader.read(max_bytes):
            support.check_batch(batch)
            assert self.chain.check(batch)

    @rule()
    def acknowledge_and_free(self) -> None:
        assert self.writer is not None
        consumers.acknowledge(str(self.folder), "replayer", self.chain.seq)
        self.writer.release()

    @rule()
    def prepare(self) -> None:
        assert self.writer is not None
        if (job := self.writer.prepare()) is not None:
            job()

    @rule()
    def reader_restarts(self) -> None:
        if self.reader is not None:
            self.reader.close()
            self.reader = None

    @rule()
    def killed(self) -> None:
        """A killed process loses nothing that it appended."""
        assert self.writer is not None
        self.durable = self.writer.last_seq
        self.writer.close()
        self._start()

    @rule(seed=st.integers(0, 1 << 30), again=st.lists(st.integers(0, 12), max_size=3))
    def power_cut(self, seed: int, again: list[int]) -> None:
        """Loses any pages that were not synced; and goes again at any step of the starts that follow."""
        assert self.writer is not None
        choice = random.Random(seed)
        self.writer.close()
        self.reader_restarts()
        self.disk.cut(choice)
        for steps in again:
            self.disk.countdown = steps
            try:
                self._start()
                self.writer.close()
            except PowerCut:
                pass
            self.disk.cut(choice)
        self._start()

    @precondition(lambda self: self.writer is not None)
    @invariant()
    def reader_never_passes_what_is_durable(self) -> None:
        assert self.chain.seq <= self.durable
        assert self.chain.seq in self.ends

    def teardown(self) -> None:
        if self.writer is not None:
            self.durable = support.sync(self.writer)
            while (before := self.chain.seq) < self.writer.last_seq:
                self.read(1 << 20)
                assert self.chain.seq > before, "published, and not readable"
            self.writer.close()
        self.reader_restarts()
        self.disk.close()
        self._patch.undo()
        shutil.rmtree(self._root)


TestJournal = JournalMachine.TestCase
