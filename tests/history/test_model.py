"""Whatever is done to a history, every kept point equals a plain list of versions (promises 5 and 6)."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cdp.history.undo_format import PAGE_BYTES
from cdp.journal import batch as journal
from tests.history.support import BLOCK, Group, Piece, write

BLOCKS = 80
COPY_TRIES = 50  # a compaction ends soon: nothing is written meanwhile
FILLS = [b"\0", b"a", b"zstd likes this", None]


def content(fill: bytes | None, count: int, salt: int) -> bytes:
    """Blocks of zeros, of what shrinks, or of what does not."""
    if fill is None:
        return b"".join((salt * 7919 + i).to_bytes(8, "little") * 8 + os.urandom(BLOCK - 64) for i in range(count))
    return (fill * BLOCK)[: BLOCK] * count


writes = st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, 40), st.sampled_from(FILLS), st.integers(0, 1 << 20))
batches = st.lists(st.lists(writes, min_size=1, max_size=4), min_size=1, max_size=4)


def pieces(chosen: list[tuple[int, int, bytes | None, int]]) -> list[Piece]:
    made = []
    for block, count, fill, salt in chosen:
        count = min(count, BLOCKS - block)
        if fill == b"\0" and salt % 2:
            made.append((journal.ZERO, 0, 0, block * BLOCK, count * BLOCK, b""))
        else:
            made.append(write(block, content(fill, count, salt)))
    return made


class Life(RuleBasedStateMachine):
    """Bundles, crashes at any committed batch, a lagging or lost index, a lost tail, retention."""

    folder: Path

    @initialize(compress=st.booleans(), segment_bytes=st.sampled_from([1 << 16, 1 << 18, 1 << 22]))
    def begin(self, compress: bool, segment_bytes: int) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.group = Group(self.folder, BLOCKS, segment_bytes=segment_bytes, compress=compress)
        self.committed = 0

    @rule(chosen=batches, fast=st.booleans())
    def bundle(self, chosen: list[list[tuple[int, int, bytes | None, int]]], fast: bool) -> None:
        self.group.bundle(*(pieces(one) for one in chosen), fast=fast)

    @rule(first=st.lists(writes, min_size=2, max_size=4))
    def spread(self, first: list[tuple[int, int, bytes | None, int]]) -> None:
        """The extents of one batch in two bundles; the second carries it."""
        group = self.group
        batch = group.stream.batch(pieces(first))
        extents = group.plan(batch)
        for part, carried in ((extents[:1], []), (extents[1:], [batch])):
            pending = group.history.append(carried, part, False)
            group.history.sync(pending)
            group.history.publish(pending)
        group.apply([batch])

    @rule(chosen=batches, data=st.data())
    def crash(self, chosen: list[list[tuple[int, int, bytes | None, int]]], data: st.DataObject) -> None:
        """The index loses what it had not flushed, or all of it; a bundle that was never synced is torn."""
        group, history = self.group, self.group.history
        ends = [b.last_seq for b in group.batches if b.last_seq >= history.oldest_seq]
        committed = data.draw(st.sampled_from(ends)) if ends else history.oldest_seq
        synced_ends = {s.path: s.end for s in history.log.segments.values()}
        made = [group.stream.batch(pieces(one)) for one in chosen]
        state, versions = bytes(group.state), dict(group.versions)
        extents = [extent for batch in made for extent in group.plan(batch)]
        group.state, group.versions = bytearray(state), versions
        history.append(made, extents, False)
        how = data.draw(st.sampled_from(["lagging", "lost", "flushed"]))
        index = self.folder / "history" / "index"
        if how == "flushed":
            history.entries.flush()
        elsewhere = self.folder / "copy"
        self._copy_still(index, elsewhere)  # what a power cut leaves: the flushed files, not the memory
        history.close()
        shutil.rmtree(index)
        if how != "lost":
            shutil.copytree(elsewhere, index)
        self._tear(synced_ends, data)
        group.history = group.open()
        group.put_back(committed)
        assert os.pread(group.fd, BLOCKS * BLOCK, 0) == group.versions[committed]

    @staticmethod
    def _copy_still(source: Path, target: Path) -> None:
        """A copy of a folder whose owner may remove files of it meanwhile, as RocksDB does after compacting."""
        for _ in range(COPY_TRIES):
            shutil.rmtree(target, ignore_errors=True)
            before = sorted(source.iterdir())
            with contextlib.suppress(shutil.Error):
                shutil.copytree(source, target)
                if sorted(source.iterdir()) == before:
                    return
        raise AssertionError(f"{source} did not stand still")

    def _tear(self, synced_ends: dict[str, int], data: st.DataObject) -> None:
        """What was written after the last sync arrives in part: any of its pages may be missing."""
        for path in sorted((self.folder / "history" / "undo").glob("undo-*")):
            start = synced_ends.get(str(path))
            size = path.stat().st_size
            if start is None:
                if data.draw(st.booleans()):
                    path.unlink()
                continue
            pages = list(range(-(-start // PAGE_BYTES), -(-size // PAGE_BYTES)))
            if not pages:
                continue
            keep = data.draw(st.integers(0, len(pages)))
            with path.open("r+b") as file:
                for page in pages[keep:][:3]:
                    file.seek(page * PAGE_BYTES)
                    file.write(bytes(PAGE_BYTES))

    @rule(window_bytes=st.integers(0, 1 << 20))
    def retain(self, window_bytes: int) -> None:
        group = self.group
        before = group.history.oldest_seq
        kept = group.history.retain(None, window_bytes, [], 0)
        assert kept.oldest_seq >= before
        if kept.oldest_seq > before and before in group.versions:
            with pytest.raises(OSError, match="has left the window"):
                group.read(before)

    @rule(seq=st.integers(0, 10**6), offset=st.integers(0, BLOCKS * BLOCK - 1), length=st.integers(1, 50_000))
    def read_part(self, seq: int, offset: int, length: int) -> None:
        group = self.group
        low, high = group.history.oldest_seq, group.history.applied_seq
        seq = low + seq % (high - low + 1)
        length = min(length, BLOCKS * BLOCK - offset)
        assert group.read(seq, offset, length) == group.versions[seq][offset : offset + length]

    @rule(a=st.integers(0, 10**6), b=st.integers(0, 10**6))
    def compare(self, a: int, b: int) -> None:
        """What `changed` does not list is equal, and it lists only what was written."""
        group = self.group
        low, high = group.history.oldest_seq, group.history.applied_seq
        a, b = sorted((low + a % (high - low + 1), low + b % (high - low + 1)))
        listed = {
            block
            for offset, length in group.history.changed(0, a, b)
            for block in range(offset // BLOCK, (offset + length) // BLOCK)
        }
        written = {
            block
            for batch in group.batches
            for r in batch.records()
            if a < r.seq <= b
            for block in range(r.offset // BLOCK, (r.offset + r.length) // BLOCK)
        }
        assert listed == written

    @rule(seq=st.integers(0, 10**6))
    def allocation(self, seq: int) -> None:
        """What is said to be zeros is zeros; the stretches cover what was asked for."""
        group = self.group
        low, high = group.history.oldest_seq, group.history.applied_seq
        seq = low + seq % (high - low + 1)
        view = group.history.view(group.fd, 0, seq, BLOCKS * BLOCK, high)
        at = 0
        for length, flags in view.allocation(0, BLOCKS * BLOCK):
            if flags:
                assert not any(group.versions[seq][at : at + length])
            at += length
        assert at == BLOCKS * BLOCK

    @invariant()
    def every_end_is_true(self) -> None:
        if not hasattr(self, "group"):
            return
        group = self.group
        low, high = group.history.oldest_seq, group.history.applied_seq
        for seq in {low, (low + high) // 2, high}:
            assert group.read(seq) == group.versions[seq]

    def teardown(self) -> None:
        if hasattr(self, "group"):
            self.group.close()


def test_every_kept_point_is_true(tmp_path: Path) -> None:
    """Promise 6, and promise 5 across crashes."""
    Life.folder = tmp_path / "group"
    run = Life.TestCase
    run.settings = settings(
        max_examples=int(os.environ.get("CDP_MODEL_EXAMPLES", "25")), stateful_step_count=14, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    run().runTest()
