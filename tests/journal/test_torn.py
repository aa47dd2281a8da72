"""Torn and corrupt journals: what follows is a cut above what was durable, and a clear error at or below it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdp.errors import CdpError, CorruptionError, ForkedError
from cdp.journal import consumers
from cdp.journal.batch import HEADER_BYTES
from cdp.journal.reader import EmbeddedReader
from cdp.journal.segment import FRAME, FRAME_BYTES, HEADER_PAGE_BYTES
from cdp.journal.writer import JournalWriter
from tests.journal import support

DURABLE_SEQ = 4  # of the journal that `made` makes; records 5 to 7 are one batch that is not durable


class Made:
    """A journal of three durable batches and one that is not, as a killed writer left it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        writer = support.open_writer(folder, 1)
        self.ends = [HEADER_PAGE_BYTES]
        for sizes in ((100,), (30, 200), (10,)):
            support.append(writer, *sizes)
            self.ends.append(writer._current.end)
            support.sync(writer)
        support.append(writer, 150, 0, 70)
        self.ends.append(writer._current.end)
        self.last_crc = writer.last_crc
        writer.close()
        (self.segment,) = support.segments(folder)

    def copy(self, name: str) -> Path:
        target = self.folder.parent / name
        shutil.rmtree(target, ignore_errors=True)
        return support.copy(self.folder, target)


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Made]:
    """In memory where there is such a file system: hundreds of starts with their syncs."""
    memory = Path("/dev/shm")
    if not memory.is_dir():
        yield Made(tmp_path / "made")
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Made(Path(folder) / "made")


def reopen(folder: Path, known_durable_seq: int = 0) -> JournalWriter:
    """The next life, which appends one more batch and reads everything back."""
    writer = support.open_writer(folder, 2, known_durable_seq)
    found = writer.last_seq
    support.append(writer, 99)
    support.sync(writer)
    assert support.read_all(folder).seq == found + 1
    writer.close()
    return writer


@pytest.mark.parametrize("zeroed", [False, True], ids=["shorter", "zeroed"])
def test_cut_at_every_byte_of_the_last_batch(made: Made, zeroed: bool) -> None:
    """Promise 4: only a whole batch counts; promise 3: a durable one that is cut is corruption."""
    start, end = made.ends[-2:]
    for cut in range(start, end):
        folder = made.copy("cut")
        segment = support.segments(folder)[0]
        if zeroed:
            support.change(segment, cut, bytes(end - cut))
        else:
            with open(segment, "r+b") as f:
                f.truncate(cut)
        with pytest.raises(CorruptionError, match="seq 7 was durable"):
            support.open_writer(folder, 2, known_durable_seq=7)
        writer = support.open_writer(folder, 2)
        assert writer.last_seq == DURABLE_SEQ
        writer.close()


def test_whole_tail_is_kept(made: Made) -> None:
    assert reopen(made.copy("whole")).last_seq == 8
    assert reopen(made.copy("known"), known_durable_seq=7).last_seq == 8


def test_flip_every_byte_of_the_undurable_batch_cuts_it(made: Made) -> None:
    for offset in range(*made.ends[-2:]):
        folder = made.copy("flip")
        support.flip(support.segments(folder)[0], offset)
        writer = support.open_writer(folder, 2)
        assert writer.last_seq == DURABLE_SEQ
        support.append(writer, 99)
        support.sync(writer)
        assert support.read_all(folder).seq == DURABLE_SEQ + 1
        writer.close()


def test_flip_every_byte_of_durable_batches_is_corruption(made: Made) -> None:
    """Promise 4: at or below what is known to be durable a bad checksum stops with an error, in writer and reader."""
    folder = made.copy("flip")
    segment = support.segments(folder)[0]
    for offset in range(HEADER_PAGE_BYTES, made.ends[-2]):
        support.flip(segment, offset)
        with pytest.raises(CorruptionError) as error:
            support.open_writer(folder, 2)
        assert segment.name in str(error.value) and f"seq {DURABLE_SEQ}" in str(error.value)
        with pytest.raises(CorruptionError, match=rf"{segment.name} at offset \d+.* to {DURABLE_SEQ} of the journal"):
            support.read_all(folder)
        support.flip(segment, offset)
    assert reopen(folder).last_seq == 8


def test_flip_every_byte_of_the_segment_header_is_corruption(made: Made) -> None:
    folder = made.copy("flip")
    segment = support.segments(folder)[0]
    for offset in (*range(140), *range(140, 4092, 97), *range(4092, 4096)):
        support.flip(segment, offset)
        for attempt in (lambda: support.open_writer(folder, 2), lambda: support.read_all(folder)):
            with pytest.raises(CorruptionError):
                attempt()
        support.flip(segment, offset)


def test_flip_every_byte_of_the_durable_position_costs_nothing(made: Made) -> None:
    """It has two slots, and the segments' own evidence."""
    for offset in (*range(100), *range(512, 608)):  # what the slots use
        folder = made.copy("flip")
        support.flip(folder / "durable", offset)
        writer = support.open_writer(folder, 2)
        assert writer.last_seq == 7
        writer.publish(writer.last_seq)
        assert support.read_all(folder).seq == 7
        writer.close()


def test_later_batch_is_evidence_of_corruption(tmp_path: Path) -> None:
    """An intact batch behind a bad one is not taken, but what it says was durable is believed."""
    writer = support.open_writer(tmp_path / "j", 1)
    support.append(writer, 500)
    support.sync(writer)
    start = writer._current.end
    support.append(writer, 500)
    support.sync(writer)
    support.append(writer, 500)  # says that seq 2 was durable
    writer.close()
    (tmp_path / "j" / "durable").unlink()
    (segment,) = support.segments(tmp_path / "j")
    for offset in (start + FRAME_BYTES + HEADER_BYTES + 30, start + 1, start + FRAME_BYTES + 9, start + 5):
        support.flip(segment, offset)
        with pytest.raises(CorruptionError, match="seq 2 was durable"):
            support.open_writer(tmp_path / "j", 2)
        support.flip(segment, offset)


def test_intact_batch_behind_a_torn_one_is_never_taken(tmp_path: Path) -> None:
    """A power cut may keep a later page and lose an earlier one: the journal ends before the torn batch."""
    folder = tmp_path / "j"
    writer = support.open_writer(folder, 1)
    support.append(writer, 500)
    support.sync(writer)
    torn = writer._current.end
    for _ in range(3):
        support.append(writer, 5000)
    writer.close()
    support.flip(support.segments(folder)[0], torn + 2000)
    assert reopen(folder).last_seq == 2


def test_segment_behind_a_torn_one_is_never_taken(tmp_path: Path) -> None:
    folder = tmp_path / "j"
    writer = support.open_writer(folder, 1)
    support.append(writer, 500)
    support.sync(writer)
    torn = writer._current.end
    while len(support.segments(folder)) < 4:
        support.append(writer, 20_000)
    writer.close()
    support.flip(support.segments(folder)[0], torn + 2000)
    assert reopen(folder).last_seq == 2
    assert [path.name for path in support.segments(folder)] == [f"segment-{n:020d}" for n in (1, 2)]


def test_junk_behind_a_cut_stays_ignored(tmp_path: Path) -> None:
    """The next segment's header says where the one before ended, whatever comes to stand behind that."""
    folder = tmp_path / "j"
    writer = support.open_writer(folder, 1)
    support.append(writer, 500)
    support.sync(writer)
    end = writer._current.end
    support.append(writer, 600)
    writer.close()
    (segment,) = support.segments(folder)
    whole = segment.read_bytes()
    support.flip(segment, end + 300)
    assert reopen(folder).last_seq == 2
    segment.write_bytes(whole)  # the torn batch is whole again
    again = support.open_writer(folder, 3)
    assert again.last_seq == 2
    again.publish(2)
    assert support.read_all(folder).seq == 2
    again.close()


def test_recycled_content_is_never_taken(tmp_path: Path) -> None:
    """Every end inside a recycled segment is followed by batches of its earlier life; their salt is another."""
    folder = tmp_path / "j"
    consumers.register(str(folder), "replayer")
    for epoch in range(1, 12):
        writer = support.open_writer(folder, epoch, max_bytes=4 * support.SEGMENT_BYTES)
        seq = writer.last_seq
        writer.publish(seq)
        for _ in range(10 + epoch):
            support.append(writer, 4096 - FRAME_BYTES - HEADER_BYTES - 24)  # frames lie where frames lay
            support.sync(writer)
            consumers.acknowledge(str(folder), "replayer", writer.last_seq)
            writer.release()
            support.prepare(writer)
        assert writer.last_seq == seq + 10 + epoch
        writer.close()
        (folder / "durable").unlink()  # as a power cut may leave it


def test_whole_batch_in_guest_data_is_never_taken(tmp_path: Path) -> None:
    """A guest that writes a journal's own bytes: with its frame and salt, placed exactly where the tail ends."""
    folder = tmp_path / "j"
    writer = support.open_writer(folder, 1)
    for _ in range(3):
        support.append(writer, 300)
    support.sync(writer)
    end = writer._current.end
    writer.close()
    (segment,) = support.segments(folder)
    raw = segment.read_bytes()
    frame_bytes = FRAME_BYTES + FRAME.unpack_from(raw, HEADER_PAGE_BYTES)[0]
    copies = [raw[at : at + frame_bytes] for at in range(HEADER_PAGE_BYTES, end, frame_bytes)]
    assert len(copies) == 3
    for behind in copies:
        support.change(segment, end, behind, 0)
        again = support.copy(folder, tmp_path / "again")
        writer = support.open_writer(again, 2)
        assert writer.last_seq == 3
        writer.close()
        shutil.rmtree(again)


def test_next_batch_of_another_life_is_never_taken(tmp_path: Path) -> None:
    """The very batch that would come next, valid in every byte, from a copy of the folder that went on: other salt."""
    folder = tmp_path / "j"
    writer = support.open_writer(folder, 1)
    support.append(writer, 300)
    support.sync(writer)
    writer.close()
    other = support.copy(folder, tmp_path / "other")
    going_on = support.open_writer(other, 2)
    support.append(going_on, 300)
    support.sync(going_on)
    going_on.close()
    batch = support.segments(other)[1].read_bytes()[HEADER_PAGE_BYTES:]
    here = support.open_writer(folder, 2)
    end = here._current.end
    here.close()
    support.change(support.segments(folder)[1], end, batch, 0)
    again = support.open_writer(folder, 3)
    assert again.last_seq == 1
    again.close()


def test_older_copy_of_the_segments_is_forked(tmp_path: Path) -> None:
    """Promise 4: the consumers know more than the journal."""
    folder = tmp_path / "j"
    writer = support.open_writer(folder, 1)
    consumers.register(str(folder), "replayer")
    support.append(writer, 300)
    support.sync(writer)
    old = support.copy(folder, tmp_path / "old")
    support.append(writer, 300)
    support.sync(writer)
    consumers.acknowledge(str(folder), "replayer", 2)
    writer.close()
    shutil.rmtree(old / "consumers")
    shutil.copytree(folder / "consumers", old / "consumers")
    with pytest.raises(ForkedError, match="replayer is at seq 2"):
        support.open_writer(old, 2)


def test_older_copy_of_the_whole_state_is_forked_at_the_reader(tmp_path: Path) -> None:
    """Promise 4: the journal cannot know, its consumer does: when the journal goes on below it, and above it."""
    folder = tmp_path / "j"
    writer = support.open_writer(folder, 1)
    support.append(writer, 300)
    support.sync(writer)
    old = support.copy(folder, tmp_path / "old")
    support.append(writer, 300)
    support.append(writer, 300)
    support.sync(writer)
    writer.close()
    chain = support.read_all(folder)
    writer = support.open_writer(old, 2)
    reader = EmbeddedReader(str(old), "replayer", chain.seq)
    assert reader.read(1 << 20) == []
    writer.publish(writer.last_seq)
    with pytest.raises(ForkedError):
        reader.read(1 << 20)
    reader.close()
    for _ in range(5):
        support.append(writer, 300)
    support.sync(writer)
    reader = EmbeddedReader(str(old), "replayer", chain.seq)
    with pytest.raises(ForkedError):
        for batch in reader.read(1 << 20):
            chain.check(batch)
    reader.close()
    writer.close()


def test_foreign_group_is_forked(made: Made) -> None:
    with pytest.raises(CdpError) as error:
        JournalWriter(
            str(made.folder), support.identity(2, b"another group..."),
            segment_bytes=support.SEGMENT_BYTES, max_bytes=support.MAX_BYTES,
        )  # fmt: skip
    assert error.value.code == "forked"


def test_older_incarnation_is_fenced(made: Made) -> None:
    with pytest.raises(CdpError) as error:
        support.open_writer(made.folder, 1)
    assert error.value.code == "fenced"
