"""Readers of points while replay and retention go on under them."""

from __future__ import annotations

import errno
import os
import random
import threading
from pathlib import Path

import pytest

from cdp.errors import RefusedError
from cdp.replica import apply, bundle
from tests.replica.helpers import WAIT_SECONDS, Rig, rig

BLOCK = 4096
SIZE = 96 * BLOCK + 1000
BATCHES = 400


class Reader(threading.Thread):
    """Opens random points, keeps some for a while, and compares everything they say with the model."""

    def __init__(self, made: Rig, seed: int) -> None:
        super().__init__(daemon=True)
        self.rig, self.rng = made, random.Random(seed)
        self.over = threading.Event()
        self.failure: BaseException | None = None
        self.read = self.left = 0

    def run(self) -> None:
        try:
            while not self.over.is_set():
                self._point()
        except BaseException as e:
            self.failure = e

    def _point(self) -> None:
        replayer, rng = self.rig.replayer, self.rng
        newest, oldest = replayer.applied.seq, replayer.history.oldest_seq
        seq = newest if rng.random() < 0.3 else rng.randint(max(1, oldest), max(1, newest))
        try:
            view = replayer.open_view("db", seq)
        except RefusedError:
            return
        content = self.rig.feed.model[seq][1]
        for _ in range(rng.randrange(1, 30)):
            offset = rng.randrange(SIZE)
            target = bytearray(min(rng.choice((1, BLOCK, 10_000, SIZE)), SIZE - offset))
            try:
                view.read_into(offset, memoryview(target))
                assert target == content[offset : offset + len(target)], (seq, offset, len(target))
                self._allocation(view.allocation(offset, len(target)), offset, content)
                self.read += 1
            except OSError as e:
                assert e.errno == errno.EIO and seq < replayer.history.oldest_seq, (seq, e)
                self.left += 1
                break
        view.close()

    @staticmethod
    def _allocation(found: list[tuple[int, int]], offset: int, content: bytes) -> None:
        for length, flags in found:
            if flags:
                assert not any(content[offset : offset + length])
            offset += length


@pytest.mark.parametrize("divided", [False, True])
def test_points_stay_true_while_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, divided: bool
) -> None:
    """Promise 6: the same bytes whenever they are read, or EIO once the point has left the window."""
    if divided:
        monkeypatch.setattr(bundle, "BUNDLE_BLOCKS", 8)
    monkeypatch.setattr(apply, "TICK_SECONDS", 0.05)  # retention all the time
    with rig(tmp_path, {"db": SIZE}, window_bytes=3 << 20, segment_bytes=256 << 10) as made:
        rng = random.Random(divided)
        made.caught_up()
        readers = [Reader(made, seed) for seed in range(3)]
        for reader in readers:
            reader.start()
        for _ in range(BATCHES):
            for _ in range(rng.randrange(1, 4)):
                offset = rng.randrange(SIZE)
                length = min(rng.choice((BLOCK, 300, 70_000)), SIZE - offset)
                if rng.random() < 0.3:
                    made.feed.zero(1, offset, length)
                else:
                    made.feed.write(1, offset, os.urandom(length))
            made.feed.flush()
        assert made.replayer.wait_applied(made.feed.writer.last_seq, WAIT_SECONDS)
        for reader in readers:
            reader.over.set()
            reader.join(WAIT_SECONDS)
            assert reader.failure is None, reader.failure
        assert sum(reader.read for reader in readers) > 50
        assert made.replayer.history.oldest_seq > 1
