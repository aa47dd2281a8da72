"""Records whose undo is spread over several bundles, under kills at any file operation and retention."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from cdp.errors import RefusedError
from cdp.journal import batch as fmt
from cdp.replica import bundle
from tests.replica.faults import killed_at
from tests.replica.helpers import Feed, Rig

BLOCK = 4096
FIRST_SIZE = 48 * BLOCK + 100
WAIT_SECONDS = 5.0
SHORT = [pytest.param(seed, 12, id=f"{seed}") for seed in range(3)]
LONG = [pytest.param(seed, 60, id=f"{seed}-long", marks=pytest.mark.slow) for seed in range(10, 14)]


class Writer:
    """Random batches for two volumes, of which one grows by odd sizes now and then."""

    def __init__(self, feed: Feed, rng: random.Random) -> None:
        self.feed, self.rng = feed, rng
        self.sizes = {1: FIRST_SIZE, 2: 8 * BLOCK}
        self.names: dict[str, int] = {}
        for volume, name in ((1, "db"), (2, "log")):
            feed.volume(volume, name, self.sizes[volume])
        feed.flush()

    def batch(self) -> int:
        rng, feed = self.rng, self.feed
        for _ in range(rng.randrange(1, 12)):
            volume = rng.choice((1, 1, 1, 2))
            size = self.sizes[volume]
            offset = rng.randrange(size)
            length = min(rng.choice((BLOCK, BLOCK, 100, 20_000, 200_000)), size - offset)
            if length == BLOCK:
                offset &= ~(BLOCK - 1)
            if rng.random() < 0.25:
                feed.zero(volume, offset, length)
            else:
                feed.write(volume, offset, os.urandom(length))
        if rng.random() < 0.2:
            name = f"b{feed.next_seq}"
            self.names[name] = feed.bookmark(name)
        if rng.random() < 0.1 and self.sizes[1] < 2 * FIRST_SIZE:
            self.sizes[1] += rng.choice((1, 1000, BLOCK, 3 * BLOCK + 7))
            feed.volume(1, "db", self.sizes[1])
        if rng.random() < 0.2:
            feed.verify(1, 0, self.sizes[1])
        if rng.random() < 0.1:
            feed.record(fmt.BARRIER, 2)
        return feed.flush()


def check_points(rig: Rig, step: int) -> None:
    """Again when a point left the window meanwhile."""
    while True:
        oldest = rig.replayer.history.oldest_seq
        try:
            rig.check_every_point(step)
            return
        except OSError as e:
            if e.errno != errno.EIO or rig.replayer.history.oldest_seq == oldest:
                raise


def check(rig: Rig, writer: Writer, step: int) -> None:
    """Points, bookmarks and sizes are those of the model, and nothing is unequal."""
    replayer = rig.caught_up()
    check_points(rig, step)
    assert replayer.state == "protected", replayer.reason
    oldest, timeline = replayer.history.oldest_seq, replayer.history.timeline
    for name, seq in writer.names.items():
        point = timeline.bookmark(name)
        assert (point is None and seq < oldest and timeline.was_bookmark(name)) or (point and point.seq == seq), name
    for name, content in (("db", writer.feed.now[1]), ("log", writer.feed.now[2])):
        assert rig.replica(name) == content


@pytest.mark.parametrize("window_bytes", [None, 1 << 20])
@pytest.mark.parametrize(("seed", "steps"), SHORT + LONG)
def test_kills_with_divided_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, steps: int, window_bytes: int | None
) -> None:
    """Promises 5 and 6: whatever part of a record was durable or applied, the replica goes back to a whole one."""
    rng = random.Random(seed)
    monkeypatch.setattr(bundle, "BUNDLE_BLOCKS", rng.choice((4, 7, 16)))
    feed = Feed(tmp_path / "journal")
    writer = Writer(feed, rng)
    rig = Rig(tmp_path / "r", feed, ["db", "log"], window_bytes=window_bytes, segment_bytes=1 << 17)
    rig.start()
    for step in range(1, steps + 1):
        for _ in range(rng.randrange(1, 6)):
            last = writer.batch()
        with killed_at(rng.randrange(1, 40), rng.random() < 0.5):
            try:
                rig.replayer.wait_applied(last, WAIT_SECONDS)
            except RefusedError:
                pass  # it was killed before
            rig.replayer.stop()
        rig.start()
        if step % 6 == 0:
            check(rig, writer, 7)
    check(rig, writer, 1)
    rig.replayer.stop()
    feed.close()
