"""The carriers' contract over segment files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cdp.journal import consumers
from cdp.journal.reader import EmbeddedReader, JournalReader
from tests.journal import support
from tests.journal.contract import Carrier, ContractSuite


class EmbeddedCarrier:
    """A journal folder with segments of 256 KiB, so that some tests cross several."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._epoch = 1
        self.writer = support.open_writer(folder, 1, segment_bytes=256 << 10)

    def append(self, *sizes: int) -> int:
        support.prepare(self.writer)
        return support.append(self.writer, *sizes)

    def publish(self) -> None:
        support.sync(self.writer)

    def restart(self) -> None:
        self.writer.close()
        self._epoch += 1
        self.writer = support.open_writer(self._folder, self._epoch, segment_bytes=256 << 10)

    def forget(self, seq: int) -> int:
        for name in consumers.names(str(self._folder)):
            consumers.acknowledge(str(self._folder), name, seq)
        self.writer.release()
        support.prepare(self.writer)
        return self.writer.first_seq

    def reader(self, after_seq: int, consumer: str = "replayer") -> JournalReader:
        return EmbeddedReader(str(self._folder), consumer, after_seq)


@pytest.fixture
def carrier(tmp_path: Path) -> Iterator[Carrier]:
    embedded = EmbeddedCarrier(tmp_path / "journal")
    yield embedded
    embedded.writer.close()


class TestEmbedded(ContractSuite):
    pass
