"""The stateful test: random requests and commands, done to a rig and to the model; then every point is compared."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.model.rig import Rig
from tests.support.book import Book, check_between, check_marks
from tests.support.nbd import FUA, NO_HOLE, NbdClient

# Sizes that end within a block and within a page; the largest takes requests above 1 MiB, which are split.
VOLUMES = {"small": 64 << 10, "odd": (200 << 10) + 512, "large": (3 << 20) + 1024}
# Mostly some blocks with odd ends, sometimes a request that becomes several records.
LENGTH_MAX = 70_000
SPLIT_LENGTH = (1 << 20) + 5000
# The smallest segments, of which only whole ones are dropped.
BRIEF = {"window": "300ms", "segment_size": "1MiB"}
# Every seq between two marks is opened: this bounds the time of an example, not what it may do.
SEQS_BETWEEN_MAX = 300

volumes = st.sampled_from(sorted(VOLUMES))
# Few distinct places: writes must meet.
places = st.tuples(st.floats(0, 1), st.integers(0, 4095), st.integers(1, LENGTH_MAX))


class Machine(RuleBasedStateMachine):
    """`make_rig` is set by the test of each profile."""

    make_rig: Callable[..., Rig]

    @initialize(brief=st.booleans())
    def start(self, brief: bool) -> None:
        """`brief`: a window so short that retention drops most of what the example does."""
        self.brief = brief
        self.folder = Path(tempfile.mkdtemp(prefix="cdp-model-"))  # short: it holds unix sockets
        self.rig: Rig | None = None
        self.clients: dict[str, NbdClient] = {}
        self.rig = type(self).make_rig(self.folder, VOLUMES, **(BRIEF if brief else {}))
        self.book = Book({name: bytearray(size) for name, size in VOLUMES.items()})
        self.mark()

    def mark(self) -> None:
        """A bookmark: from here on a seq of which the state is known."""
        assert self.rig is not None
        name = f"mark-{len(self.book.marks)}"
        self.book.mark(self.rig.bookmark(name), name)

    def client(self, volume: str) -> NbdClient:
        assert self.rig is not None
        if volume not in self.clients:
            self.clients[volume] = self.rig.client(volume)
        return self.clients[volume]

    def forget_clients(self) -> None:
        for client in self.clients.values():
            client.close()
        self.clients.clear()

    @staticmethod
    def range_of(volume: str, place: tuple[float, int, int]) -> tuple[int, int]:
        """A range inside the volume; fractions near 1 end exactly at its end."""
        fraction, shift, length = place
        size = VOLUMES[volume]
        offset = min(int(fraction * (size // 4096)) * 4096 + shift, size - 1)
        return offset, min(length, size - offset)

    @rule(volume=volumes, place=places, seed=st.integers(0, 2**32), fua=st.booleans())
    def write(self, volume: str, place: tuple[float, int, int], seed: int, fua: bool) -> None:
        offset, length = self.range_of(volume, place)
        # Every other content is compressible, so that undo is stored in both ways.
        data = random.Random(seed).randbytes(length) if seed & 1 else bytes([seed % 255 + 1]) * length
        self.client(volume).write(offset, data, FUA if fua else 0)
        self.book.write(volume, offset, data)

    @rule(seed=st.integers(0, 2**32), offset=st.integers(0, VOLUMES["large"] - SPLIT_LENGTH))
    def write_split(self, seed: int, offset: int) -> None:
        data = random.Random(seed).randbytes(SPLIT_LENGTH)
        self.client("large").write(offset, data)
        self.book.write("large", offset, data, split=True)

    @rule(volume=volumes, place=places, hole=st.booleans())
    def zero(self, volume: str, place: tuple[float, int, int], hole: bool) -> None:
        offset, length = self.range_of(volume, place)
        self.client(volume).zero(offset, length, 0 if hole else NO_HOLE)
        self.book.write(volume, offset, bytes(length))

    @rule(volume=volumes, place=places, whole=st.booleans())
    def trim(self, volume: str, place: tuple[float, int, int], whole: bool) -> None:
        offset, length = (0, VOLUMES[volume]) if whole else self.range_of(volume, place)
        self.client(volume).trim(offset, length)
        self.book.write(volume, offset, bytes(length))

    @rule(volume=volumes)
    def flush(self, volume: str) -> None:
        self.client(volume).flush()

    @rule(volume=volumes)
    def primary_reads_the_newest(self, volume: str) -> None:
        assert self.client(volume).read_all() == self.book.now[volume]

    @rule()
    def bookmark(self) -> None:
        self.mark()

    @rule(volume=volumes)
    def reconnect(self, volume: str) -> None:
        if (client := self.clients.pop(volume, None)) is not None:
            client.close()

    @rule(side=st.sampled_from(["collector", "replayer"]))
    def restart(self, side: str) -> None:
        assert self.rig is not None
        if side == "collector":
            self.forget_clients()
        self.rig.restart(side)

    # With a brief window the target may be gone before the rollback begins.
    @precondition(lambda self: len(self.book.marks) > 1 and not self.brief)
    @rule(data=st.data(), group=st.booleans(), volume=volumes)
    def rollback(self, data: st.DataObject, group: bool, volume: str) -> None:
        """Onto a mark, of one volume or the whole group; what it replaced stays reachable."""
        assert self.rig is not None
        mark = data.draw(st.sampled_from(self.book.marks))
        if mark.seq < self.rig.oldest():
            return
        names = sorted(VOLUMES) if group else [volume]
        self.forget_clients()
        begin, end = self.rig.rollback(names, mark.seq)
        self.book.mark(begin, f"rollback-{begin}")
        self.book.become({name: self.book.state(mark)[name] for name in names})
        self.book.mark(end, f"end of rollback-{begin}", frozenset(names))

    @rule(volume=volumes)
    def verify(self, volume: str) -> None:
        assert self.rig is not None
        assert self.rig.equal(volume), f"primary and replica of {volume} differ"

    def teardown(self) -> None:
        rig = getattr(self, "rig", None)
        if rig is None:
            return
        try:
            self.compare_everything(rig)
        finally:
            self.forget_clients()
            rig.close()
            shutil.rmtree(self.folder, ignore_errors=True)

    def compare_everything(self, rig: Rig) -> None:
        self.mark()
        for volume, content in self.book.now.items():
            assert self.client(volume).read_all() == content, f"the primary of {volume} is not the newest state"
        equal = check_marks(self.book, rig.read, rig.oldest)
        assert equal >= len(VOLUMES), "not even the last mark could be compared"
        opened, oldest = 0, rig.oldest()
        for first, last in zip(self.book.marks, self.book.marks[1:], strict=False):
            opened += last.seq - first.seq
            if first.seq >= oldest and opened <= SEQS_BETWEEN_MAX:
                check_between(self.book, first, last, rig.read, rig.oldest)
