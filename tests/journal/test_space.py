"""Retention by consumers, recycling, a full journal and a full disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cdp import storage
from cdp.errors import CorruptionError, JournalFullError, NotFoundError, StorageError, UsageError
from cdp.journal import consumers
from cdp.journal.batch import MAX_DATA_BYTES
from cdp.journal.spares import KEEP_SHARE, READY, Spares
from tests.journal import support
from tests.support.disk import small_disk

SIZE = support.SEGMENT_BYTES


def fill(writer: support.JournalWriter, count: int) -> None:
    """`count` segments' worth of batches."""
    for _ in range(count * 6):
        support.append(writer, 10_000)
    support.sync(writer)


def test_segments_go_when_every_consumer_is_past_them(tmp_path: Path) -> None:
    folder = str(tmp_path / "j")
    writer = support.open_writer(folder, 1)
    for name in ("primary", "replayer", "relay"):
        assert consumers.register(folder, name)
    fill(writer, 5)
    consumers.acknowledge(folder, "primary", writer.last_seq)
    consumers.acknowledge(folder, "relay", writer.last_seq)
    writer.release()
    assert writer.first_seq == 1
    consumers.acknowledge(folder, "replayer", 13)
    writer.release()
    assert 1 < writer.first_seq <= 14
    assert support.read_all(folder, 13).seq == writer.last_seq
    consumers.remove(folder, "test_reader")
    consumers.remove(folder, "test_probe")
    consumers.remove(folder, "replayer")
    writer.release()
    assert writer.first_seq > 14
    writer.close()


def test_freed_segments_are_recycled_and_spares_are_bounded(tmp_path: Path) -> None:
    folder = tmp_path / "j"
    writer = support.open_writer(folder, 1, max_bytes=20 * SIZE)
    fill(writer, 12)
    inodes = {path.stat().st_ino for path in support.segments(folder)}
    writer.release()  # there are no consumers
    support.prepare(writer)
    assert len(list(folder.glob("spare-*"))) <= 6
    size = writer.bytes
    fill(writer, 4)
    assert {path.stat().st_ino for path in support.segments(folder)} & inodes
    assert writer.bytes == size == sum(p.stat().st_size for p in folder.glob("s*-*"))
    writer.close()


def test_full_journal_refuses_and_goes_on(tmp_path: Path) -> None:
    """Promise 10: nothing half-appended, and it goes on by itself when there is room."""
    folder = str(tmp_path / "j")
    writer = support.open_writer(folder, 1, max_bytes=3 * SIZE)
    consumers.register(folder, "replayer")
    with pytest.raises(JournalFullError):
        while True:
            support.append(writer, 9_000)
    last = writer.last_seq
    for _ in range(3):
        with pytest.raises(JournalFullError):
            support.append(writer, 9_000)
        assert writer.prepare() is None
    support.append(writer, 1)  # a small one still fits
    support.sync(writer)
    consumers.acknowledge(folder, "replayer", last)
    writer.release()
    support.append(writer, 9_000)
    support.sync(writer)
    assert writer.last_seq == last + 2
    assert support.read_all(folder, last).seq == last + 2
    writer.close()


def test_batch_larger_than_a_segment_gets_one_of_its_own_size(tmp_path: Path) -> None:
    writer = support.open_writer(tmp_path / "j", 1, max_bytes=20 * SIZE)
    with pytest.raises(StorageError, match="does not fit"):
        support.append(writer, 10 * SIZE)
    support.append(writer, 5)
    support.append(writer, 3 * SIZE)
    support.append(writer, 5)
    support.append(writer, 2 * SIZE)
    support.sync(writer)
    assert support.read_all(tmp_path / "j").seq == 4
    held = sum(f.stat().st_size for f in (tmp_path / "j").glob("s*-*"))
    assert writer.bytes == held
    writer.close()
    again = support.open_writer(tmp_path / "j", 2, max_bytes=20 * SIZE)
    assert again.last_seq == 4
    support.append(again, 3 * SIZE)
    support.sync(again)
    assert support.read_all(tmp_path / "j").seq == 5
    again.close()


def test_largest_batch_fits_a_production_segment(tmp_path: Path) -> None:
    writer = support.open_writer(tmp_path / "j", 1, segment_bytes=64 << 20, max_bytes=1 << 30)
    support.append(writer, 5)
    support.append(writer, MAX_DATA_BYTES)
    support.append(writer, MAX_DATA_BYTES)
    support.sync(writer)
    assert support.read_all(tmp_path / "j").seq == 3
    assert len(support.segments(tmp_path / "j")) == 2
    writer.close()


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 1 << 20) as folder:
        yield folder


def test_full_disk_refuses_and_goes_on(full_disk: Path) -> None:
    """Promise 10, on a real file system without space."""
    folder = full_disk / "j"
    writer = support.open_writer(folder, 1)
    consumers.register(str(folder), "replayer")
    with pytest.raises(JournalFullError):
        while True:
            support.append(writer, 9_000)
    support.sync(writer)
    last = writer.last_seq
    assert support.read_all(folder).seq == last
    consumers.acknowledge(str(folder), "test_reader", last)
    consumers.acknowledge(str(folder), "replayer", last)
    writer.release()
    support.prepare(writer)
    support.append(writer, 9_000)
    support.sync(writer)
    assert support.read_all(folder, last).seq == last + 1
    writer.close()


def test_start_on_a_full_disk_recycles_what_everybody_has_read(full_disk: Path) -> None:
    """Promise 10: nobody frees segments while there is no writer, so a start must, or it never finds the space."""
    folder = full_disk / "j"
    writer = support.open_writer(folder, 1)
    consumers.register(str(folder), "replayer")
    for _ in range(30):
        last = support.append(writer, 9_000)
    support.sync(writer)
    writer.close()
    for path in folder.glob("spare-*"):
        path.unlink()
    consumers.acknowledge(str(folder), "replayer", last)
    with pytest.raises(OSError), open(full_disk / "filler", "wb", buffering=0) as f:
        while f.write(bytes(4096)):
            pass
    (folder / "durable").unlink()  # as a power cut may leave it
    (full_disk / "filler").open("r+b").truncate((full_disk / "filler").stat().st_size - 8192)
    again = support.open_writer(folder, 2, known_durable_seq=last)
    assert again.last_seq == last
    support.append(again, 9_000)
    support.sync(again)
    assert support.read_all(folder, last).seq == last + 1
    again.close()


def test_append_torn_by_a_full_disk_leaves_no_junk(full_disk: Path) -> None:
    """The segment's own blocks are missing (punched out, as a file system without fallocate has it): the write fails in
    the middle, and the next, smaller one goes to the same place."""
    folder = full_disk / "j"
    writer = support.open_writer(folder, 1)
    support.append(writer, 3_000)
    fd = writer._current.fd
    storage.punch_hole(fd, 8192, SIZE - 8192)
    filler = full_disk / "filler"
    with pytest.raises(OSError), open(filler, "wb", buffering=0) as f:
        while f.write(bytes(4096)):
            pass
    filler.open("r+b").truncate(filler.stat().st_size - 8 * 4096)
    with pytest.raises(JournalFullError):
        support.append(writer, 50_000)
    assert writer.last_seq == 1
    support.append(writer, 9_000)
    support.sync(writer)
    filler.unlink()
    assert support.read_all(folder).seq == 2
    writer.close()
    again = support.open_writer(folder, 2)
    assert again.last_seq == 2
    again.close()


def test_consumers_are_a_persistent_list(tmp_path: Path) -> None:
    folder = str(tmp_path / "j")
    assert consumers.names(folder) == []
    assert consumers.register(folder, "replayer", 7)
    assert not consumers.register(folder, "replayer", 99)
    consumers.acknowledge(folder, "replayer", 50)
    consumers.acknowledge(folder, "replayer", 20)  # never back
    assert consumers.positions(folder) == {"replayer": 50} == consumers.highest_positions(folder)
    for name in ("", "../x", "a.sock", "a b", "9a", "x" * 65):
        with pytest.raises(UsageError):
            consumers.register(folder, name)
    with pytest.raises(NotFoundError, match="Registered: replayer"):
        consumers.remove(folder, "relay")
    consumers.remove(folder, "replayer")
    with pytest.raises(NotFoundError):
        consumers.acknowledge(folder, "replayer", 60)
    assert consumers.names(folder) == []


def test_position_that_a_power_cut_may_take_back_frees_nothing(tmp_path: Path) -> None:
    """Only the confirmed slot, written after the sync, counts; a torn slot is the older one, two are an error."""
    folder = str(tmp_path / "j")
    consumers.register(folder, "replayer", 5)
    path = tmp_path / "j" / "consumers" / "replayer"
    before = path.read_bytes()
    consumers.acknowledge(folder, "replayer", 50)
    after = path.read_bytes()
    path.write_bytes(after[:512] + before[512:])  # between the two writes
    assert consumers.positions(folder) == {"replayer": 5}
    assert consumers.highest_positions(folder) == {"replayer": 50}
    path.write_bytes(bytes(512) + before[512:])
    assert consumers.positions(folder) == {"replayer": 5}
    path.write_bytes(bytes(1024))
    with pytest.raises(CorruptionError):
        consumers.positions(folder)


def test_a_file_made_in_quiet_times_has_written_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only then does a sync of what is written into it need no commit of the file system's own journal."""
    written: list[int] = []
    real = storage.pwrite
    monkeypatch.setattr(storage, "pwrite", lambda fd, data, at: written.append(len(data)) or real(fd, data, at))
    spares = Spares(str(tmp_path), support.SEGMENT_BYTES, support.MAX_BYTES)
    for quiet in (False, True):
        monkeypatch.setattr("cdp.journal.spares.QUIET_NS", 0 if quiet else 1 << 62)
        written.clear()
        job = spares.job(0)
        assert job is not None
        job()
        assert (sum(written) >= support.SEGMENT_BYTES) == quiet
        storage.close(spares.take(0).fd)
    spares.close()


def test_what_a_burst_used_is_kept_for_the_next_up_to_a_share_of_the_journal(tmp_path: Path) -> None:
    spares = Spares(str(tmp_path), support.SEGMENT_BYTES, 80 * support.SEGMENT_BYTES)
    for number in range(30):
        path = tmp_path / f"segment-{number}"
        path.write_bytes(bytes(support.SEGMENT_BYTES))
        spares.give(str(path))
    job = spares.job(0)
    assert job is not None
    job()
    assert len(list(tmp_path.glob("spare-*"))) == 80 // KEEP_SHARE + READY
    spares.close()
