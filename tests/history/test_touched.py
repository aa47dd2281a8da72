"""A block without an entry after the point is read without the index, and no entry is ever missed for it."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cdp.history.history import History
from cdp.history.index_map import Cursor, RocksMap
from cdp.history.touched import Touched
from cdp.history.undo_format import RUN_BIT, VOLUME_SHIFT
from tests.history.support import BLOCK, Group, write

BLOCKS = 96


class WatchedMap(RocksMap):
    """Counts cursors, and looks at every entry when it is written: the table must know it by then."""

    history: History | None = None
    cursors = 0

    def cursor(self) -> Cursor:
        self.cursors += 1
        return super().cursor()

    def write(self, puts: Iterable[tuple[bytes, bytes]], deletes: Iterable[bytes] = ()) -> None:
        rows = list(puts)
        for key, _ in rows:
            if key[:1] == b"B" and self.history is not None:
                code, seq = int.from_bytes(key[1:9], "big"), int.from_bytes(key[9:], "big")
                assert self.history.touched.may_follow(code, seq - 1), "a reader between here and there misses it"
        super().write(rows, deletes)


class Watched(Group):
    """A group whose index is watched."""

    def open(self) -> History:
        self.map = WatchedMap(str(self.folder / "index"))
        history = History(str(self.folder / "history"), segment_bytes=1 << 18, compress=True, entries=self.map)
        self.map.history = history
        return history

    def cursors_of(self, seq: int, block: int) -> int:
        """How many cursors a read of one block took; the block must be the version's."""
        view = self.history.view(self.fd, 0, seq, self.blocks * BLOCK, self.history.applied_seq)
        target, before = bytearray(BLOCK), self.map.cursors
        view.read_into(block * BLOCK, memoryview(target))
        assert target == self.versions[seq][block * BLOCK : (block + 1) * BLOCK], f"block {block} at seq {seq}"
        return self.map.cursors - before


def test_only_what_changed_after_the_point_asks_the_index(tmp_path: Path) -> None:
    group = Watched(tmp_path, BLOCKS)
    group.bundle([write(block, os.urandom(BLOCK)) for block in range(BLOCKS)])
    point = group.bundle([write(3, os.urandom(BLOCK))])
    group.bundle([write(7, os.urandom(BLOCK))], [write(32, os.urandom(16 * BLOCK))])
    asked = {block for block in range(BLOCKS) if group.cursors_of(point, block)}
    changed = {7, *range(32, 48)}
    assert changed <= asked
    assert len(asked - changed) < BLOCKS // 4, "hashes may meet, but not often"
    group.close()


def test_every_block_of_every_point_reads_alone_as_it_was(tmp_path: Path) -> None:
    """Blocks and runs over one another, also after a start that knows nothing of what came before."""
    chance, group = random.Random(11), Watched(tmp_path, BLOCKS)

    def life() -> None:
        for _ in range(6):
            pieces = []
            for _ in range(chance.randint(1, 4)):
                count = chance.choice([1, 1, 3, 16, 40])
                block = chance.randrange(BLOCKS - count + 1)
                pieces.append(write(block, chance.randbytes(BLOCK) * count))
            group.bundle(pieces)

    life()
    committed = group.batches[-1].last_seq
    life()
    group.history.close()
    group.history = group.open()
    group.put_back(committed)
    life()  # seqs above `committed` for a second time
    for seq in group.versions:
        for block in range(BLOCKS):
            group.cursors_of(seq, block)
    group.close()


def test_what_was_indexed_before_the_start_is_asked_for(tmp_path: Path) -> None:
    group = Watched(tmp_path, BLOCKS)
    point = group.bundle([write(1, os.urandom(BLOCK))])
    last = group.bundle([write(2, os.urandom(BLOCK))])
    group.history.close()
    group.history = group.open()
    group.put_back(last)
    assert group.cursors_of(point, 2)
    group.bundle([write(3, os.urandom(BLOCK))])
    assert group.cursors_of(last, 3) and not group.cursors_of(last, 2)
    group.close()


def test_the_table_never_denies_what_it_was_told() -> None:
    chance, touched = random.Random(5), Touched(0)
    told = {chance.randrange(3) << VOLUME_SHIFT | chance.choice([0, RUN_BIT]) | chance.randrange(1 << 30): seq
            for seq in range(1, 200_000)}  # fmt: skip
    codes, seqs = list(told), list(told.values())
    newest = max(seqs)
    for at in range(0, len(codes), 5000):
        touched.note(np.array(codes[at : at + 5000], np.uint64), max(seqs[at : at + 5000]))
    assert all(touched.may_follow(code, seq - 1) for code, seq in told.items())
    assert not any(touched.may_follow(code, newest) for code in codes)
    unknown = sum(touched.may_follow(1 << 40 | i, 0) for i in range(10_000))
    assert unknown < 3000, "a fifth of the slots is taken"
