"""A group's journal made with the real writer, and replayers over it in this process.

`Feed` appends records as the collector does and keeps a model: the bytes of every volume after every seq. `Rig` runs
replayers over it, one life after another.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cdp.journal import batch as fmt
from cdp.journal import consumers
from cdp.journal.batch import DESCRIPTOR, NO_VOLUME, Identity
from cdp.journal.reader import EmbeddedReader
from cdp.journal.writer import JournalWriter
from cdp.replica.replayer import Replayer

CONSUMER = "replayer"
SEGMENT_BYTES = 4 << 20
WAIT_SECONDS = 30.0


class Feed:
    """A collector's side: gather records with `write` and the like, `flush` makes them one durable, visible batch."""

    def __init__(
        self, folder: Path, *, group_id: bytes = b"G" * 16, epoch: int = 1, modelled: bool = True,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:  # fmt: skip
        self.folder = str(folder)
        os.makedirs(self.folder, exist_ok=True)
        consumers.register(self.folder, CONSUMER, 0)
        identity = Identity(group_id, epoch, os.urandom(16))
        self.writer = JournalWriter(self.folder, identity, segment_bytes=segment_bytes, max_bytes=1 << 40)
        self.now: dict[int, bytearray] = {}
        self.model: dict[int, dict[int, bytes]] = {}  # seq -> volume -> bytes
        self._modelled = modelled
        self._descriptors: list[bytes] = []
        self._data: list[bytes] = []

    @property
    def next_seq(self) -> int:
        return self.writer.last_seq + 1 + len(self._descriptors)

    def record(
        self, kind: int, volume: int = NO_VOLUME, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0
    ) -> int:
        """Adds one record to the batch being gathered; its seq."""
        seq = self.next_seq
        self._descriptors.append(DESCRIPTOR.pack(kind, flags, volume, len(data), offset, length))
        self._data.append(data)
        if self._modelled:
            self.model[seq] = {v: bytes(content) for v, content in self.now.items()}
        return seq

    def _set(self, seq: int, volume: int, offset: int, data: bytes) -> None:
        if self._modelled:
            self.now[volume][offset : offset + len(data)] = data
            self.model[seq][volume] = bytes(self.now[volume])

    def volume(self, volume: int, name: str, size: int) -> int:
        """Declares a volume (RESIZE)."""
        if self._modelled:
            content = self.now.setdefault(volume, bytearray())
            del content[size:]
            content.extend(bytes(size - len(content)))
        return self.record(fmt.RESIZE, volume, 0, size, name.encode())

    def write(self, volume: int, offset: int, data: bytes, flags: int = 0) -> int:
        seq = self.record(fmt.WRITE, volume, offset, len(data), data, flags)
        self._set(seq, volume, offset, data)
        return seq

    def zero(self, volume: int, offset: int, length: int, flags: int = fmt.PUNCH) -> int:
        seq = self.record(fmt.ZERO, volume, offset, length, b"", flags)
        self._set(seq, volume, offset, bytes(length) if self._modelled else b"")
        return seq

    def bookmark(self, name: str) -> int:
        return self.record(fmt.BOOKMARK, data=name.encode())

    def verify(self, volume: int, offset: int, length: int, content: bytes | None = None) -> int:
        """The digest of the model's region, or of `content` in its place."""
        found = bytes(self.now[volume][offset : offset + length]) if content is None else content
        return self.record(fmt.VERIFY, volume, offset, length, hashlib.sha256(found).digest())

    def gap(self, volume: int, opens: bool, code: str = "resync", from_seq: int = 0) -> int:
        data = json.dumps({"code": code, "text": code}).encode()
        return self.record(fmt.GAP, volume, from_seq, 0, data, fmt.OPEN if opens else 0)

    def flush(self) -> int:
        """Appends what was gathered as one batch, durably, and lets readers see it. Its last seq."""
        if self._descriptors:
            descriptors, data = b"".join(self._descriptors), self._data
            self._descriptors, self._data = [], []
            self.writer.append(descriptors, data, sum(map(len, data)))
            self.publish()
        return self.writer.last_seq

    def append(self, descriptors: bytes, data: list[bytes], data_bytes: int) -> None:
        """A ready batch, not visible yet: for benchmarks."""
        self.writer.append(descriptors, data, data_bytes)

    def publish(self) -> None:
        token = self.writer.begin_sync()
        if token is not None:
            self.writer.sync(token)
            self.writer.end_sync(token)
        self.writer.publish(self.writer.last_seq)
        if (work := self.writer.prepare()) is not None:
            work()
        self.writer.release()

    def close(self) -> None:
        self.writer.close()


class Rig:
    """The replayer's folder beside a feed's journal."""

    def __init__(self, folder: Path, feed: Feed, volumes: list[str], **settings: Any) -> None:
        self.folder = str(folder)
        self.feed = feed
        self.volumes = volumes
        self.settings = {"window_ns": None, "window_bytes": None, "segment_bytes": SEGMENT_BYTES} | settings
        self.replayer = self._new()

    def _new(self) -> Replayer:
        return Replayer(
            self.folder,
            "group",
            lambda after_seq: EmbeddedReader(self.feed.folder, CONSUMER, after_seq),
            volumes=self.volumes,
            **self.settings,
        )

    def start(self) -> Replayer:
        """A new life."""
        self.replayer = self._new()
        self.replayer.start()
        return self.replayer

    def caught_up(self) -> Replayer:
        """When everything that was flushed is applied."""
        assert self.replayer.wait_applied(self.feed.flush(), WAIT_SECONDS), self.replayer.status()
        return self.replayer

    def replica(self, volume: str) -> bytes:
        return Path(self.replayer.figures()["volumes"][volume]["replica"]).read_bytes()

    def read(self, volume: str, seq: int, offset: int = 0, length: int | None = None) -> bytes:
        """A volume's bytes at a point; without `length` up to its end."""
        view = self.replayer.open_view(volume, seq)
        try:
            if length is None:
                size = self.replayer.history.timeline.size_at(self.replayer.volume_id(volume), seq)
                assert size is not None
                length = size - offset
            target = bytearray(length)
            view.read_into(offset, memoryview(target))
            return bytes(target)
        finally:
            view.close()

    def check_every_point(self, step: int = 1) -> int:
        """Every kept point of every volume equals the model; how many were compared."""
        newest = self.replayer.applied.seq
        compared = 0
        for seq in range(max(1, self.replayer.history.oldest_seq), newest + 1, step):
            for name in self.volumes:
                number = self.replayer.volume_id(name)
                if number in self.feed.model[seq]:
                    assert self.read(name, seq) == self.feed.model[seq][number], (name, seq)
                    compared += 1
        return compared


@contextmanager
def rig(folder: Path, volumes: dict[str, int], **settings: Any) -> Iterator[Rig]:
    """A feed that has declared `volumes` (name -> size) as 1, 2, …, and a running replayer that follows it."""
    feed = Feed(folder / "journal")
    for number, (name, size) in enumerate(volumes.items(), 1):
        feed.volume(number, name, size)
    feed.flush()
    made = Rig(folder / "replayer", feed, list(volumes), **settings)
    made.start()
    try:
        yield made
    finally:
        made.replayer.stop()
        feed.close()
