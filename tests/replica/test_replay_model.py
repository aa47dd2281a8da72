"""Model test: wherever the replayer is killed, every kept point equals a history of bytearrays."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cdp.errors import RefusedError
from cdp.journal import batch as fmt
from cdp.replica import restart
from tests.replica.faults import killed_at
from tests.replica.helpers import SEGMENT_BYTES, WAIT_SECONDS, Feed, Rig

SIZES = {1: 24 * 4096, 2: 17 * 4096 + 513}
NAMES = {1: "db", 2: "log"}


class Replay(RuleBasedStateMachine):
    """Two volumes, batches of any records, clean restarts, kills at any file operation, `check` in between."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="replay-"))
        self.feed = Feed(self.folder / "journal")
        for volume, size in SIZES.items():
            self.feed.volume(volume, NAMES[volume], size)
        self.feed.flush()
        self.rig = Rig(self.folder / "replayer", self.feed, list(NAMES.values()), segment_bytes=SEGMENT_BYTES)
        self.rig.start()

    @rule(
        volume=st.sampled_from((1, 2)), at=st.integers(0, 1 << 20), length=st.integers(1, 20000),
        fill=st.integers(0, 255), aligned=st.booleans(), flags=st.sampled_from((0, fmt.FUA)),
    )  # fmt: skip
    def write(self, volume: int, at: int, length: int, fill: int, aligned: bool, flags: int) -> None:
        offset = at % SIZES[volume]
        if aligned:
            offset, length = offset & ~4095, 4096
        length = min(length, SIZES[volume] - offset)
        self.feed.write(volume, offset, bytes([fill, 255 - fill]) * (length // 2) + b"z" * (length % 2), flags)

    @rule(volume=st.sampled_from((1, 2)), at=st.integers(0, 1 << 20), length=st.integers(1, 1 << 17))
    def trim(self, volume: int, at: int, length: int) -> None:
        offset = at % SIZES[volume]
        self.feed.zero(volume, offset, min(length, SIZES[volume] - offset))

    @rule(volume=st.sampled_from((1, 2)), at=st.integers(0, 1 << 20), length=st.integers(1, 1 << 16))
    def verify(self, volume: int, at: int, length: int) -> None:
        offset = at % SIZES[volume]
        self.feed.verify(volume, offset, min(length, SIZES[volume] - offset))

    @rule(volume=st.sampled_from((1, 2)))
    def barrier(self, volume: int) -> None:
        self.feed.record(fmt.BARRIER, volume)

    @rule()
    def append(self) -> None:
        self.feed.flush()

    @rule()
    def compare(self) -> None:
        self.rig.caught_up().verify_result("db", 0, 1 << 60)
        self.rig.check_every_point()

    @rule()
    def stop_and_start(self) -> None:
        """A clean stop leaves a replica that is usable by itself, at the newest record."""
        self.rig.caught_up()
        self.rig.replayer.stop()
        self.check_files(self.feed.writer.last_seq)
        self.rig.start()

    def check_files(self, seq: int) -> None:
        for volume, name in NAMES.items():
            assert self.rig.replica(name) == self.feed.model[seq][volume]

    @rule(step=st.integers(1, 40), half_done=st.booleans(), check=st.booleans())
    def kill(self, step: int, half_done: bool, check: bool) -> None:
        """Promise 5: killed anywhere, the replica is put back to its committed seq, and replay goes on from there."""
        last = self.feed.flush()
        with killed_at(step, half_done):
            with suppress(RefusedError):  # killed before it came so far
                self.rig.replayer.wait_applied(last, WAIT_SECONDS)
            self.rig.replayer.stop()
        if check:
            found = restart.check_group(self.rig.folder, SEGMENT_BYTES)
            committed = found["committed_seq"]
            assert isinstance(committed, int)
            if committed:
                self.check_files(committed)
        self.rig.start()

    @invariant()
    def alive(self) -> None:
        if hasattr(self, "rig"):
            replayer = self.rig.replayer
            assert replayer.state == "protected" or not replayer.applied.seq, replayer.status()

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            self.compare()
            for name in NAMES.values():
                assert self.rig.replayer.verify_result(name, 0, 1 << 60) == []
            self.rig.replayer.stop()
            self.check_files(self.feed.writer.last_seq)
            self.feed.close()
            shutil.rmtree(self.folder)


class TestReplay(Replay.TestCase):
    settings = settings(max_examples=15, stateful_step_count=25, deadline=None)


@pytest.mark.slow
class TestReplayLong(Replay.TestCase):
    settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
