"""Bytes that were durable and are not what was written are never served, and never make a point up."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from cdp import storage
from cdp.errors import CorruptionError, StorageError
from cdp.history.undo_format import PAGE_BYTES
from tests.history.support import BLOCK, Group, write

BLOCKS = 64


def filled(folder: Path, segment_bytes: int = 1 << 20) -> Group:
    """Single blocks and runs, raw and compressed, over three states."""
    group = Group(folder, BLOCKS, segment_bytes=segment_bytes)
    for i in range(4):
        fill = os.urandom(BLOCK) if i % 2 else bytes([i + 1]) * 1000 + os.urandom(96) + bytes(3000)
        group.bundle([write(0, fill * 48)], [write(50 + i, fill), write(50, fill)])
    return group


def segments(group: Group) -> list[Path]:
    return sorted((group.folder / "history" / "undo").glob("undo-*"))


def read_or_refusal(group: Group, seq: int) -> bytes | None:
    try:
        return group.read(seq)
    except OSError as e:
        assert e.errno == errno.EIO
        return None


def test_flipped_bytes_are_never_served(tmp_path: Path) -> None:
    """Promise 6: every byte of the log flipped in turn (a sample of them), while it is open."""
    group = filled(tmp_path)
    (path,) = segments(group)
    size, refused = group.history.log.newest.end, 0  # type: ignore[union-attr]
    fd = os.open(path, os.O_RDWR)
    for at in range(0, size, 211):
        good = os.pread(fd, 1, at)
        os.pwrite(fd, bytes([good[0] ^ 0x40]), at)
        for seq in (0, 4, 7):
            got = read_or_refusal(group, seq)
            assert got is None or got == group.versions[seq]
            refused += got is None
        os.pwrite(fd, good, at)
    assert refused > 100
    assert all(group.read(seq) == version for seq, version in group.versions.items())
    os.close(fd)
    group.close()


def test_damage_below_the_committed_seq_is_an_error_at_start(tmp_path: Path) -> None:
    """Promise 4: a bad checksum of what was known to be durable is not a torn tail."""
    group = filled(tmp_path)
    newest = group.history.applied_seq
    group.history.close()
    (path,) = segments(group)
    saved = path.read_bytes()
    for at in range(PAGE_BYTES, len(saved), 997):
        damaged = bytearray(saved)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        try:
            group.history = group.open()
        except StorageError:
            continue
        try:
            group.history.cut(newest)
        except CorruptionError:
            pass
        else:
            group.history.applied_seq = newest
            for seq in (0, 5, newest):
                got = read_or_refusal(group, seq)
                assert got is None or got == group.versions[seq]
        group.history.close()
    os.close(group.fd)


def test_a_missing_segment_is_an_error(tmp_path: Path) -> None:
    group = filled(tmp_path, 1 << 16)
    newest = group.history.applied_seq
    group.history.close()
    paths = segments(group)
    assert len(paths) >= 3
    for path in paths:
        away = path.with_name("away")
        path.rename(away)
        with pytest.raises(CorruptionError):
            group.open().cut(newest)
        away.rename(path)
    os.close(group.fd)


def test_index_is_made_again_from_segments_alone(tmp_path: Path) -> None:
    group = filled(tmp_path, 1 << 17)
    newest = group.history.applied_seq
    points = group.history.timeline.oldest(), group.history.timeline.newest()
    group.history.close()
    shutil.rmtree(tmp_path / "history" / "index")
    group.history = group.open()
    group.history.cut(newest)
    assert (group.history.timeline.oldest(), group.history.timeline.newest()) == points
    assert all(group.read(seq) == version for seq, version in group.versions.items())
    group.close()


@pytest.mark.parametrize("blocks", [1, 8])
def test_a_damaged_index_is_not_an_empty_one(tmp_path: Path, blocks: int) -> None:
    """Promise 6: what the index cannot say is EIO; the replica's newer bytes must not stand in for it."""
    count = 100
    group = Group(tmp_path, count)
    for i in range(3):
        group.bundle([write(block, bytes([i + 1]) * BLOCK) for block in range(count)])
    seq, newest = count, group.history.applied_seq
    group.history.close()
    for path in (tmp_path / "history" / "index").glob("*.sst"):
        damaged = bytearray(path.read_bytes())
        for at in range(500, len(damaged) // 2, 1000):
            damaged[at] ^= 0xFF
        path.write_bytes(damaged)
    group.history = group.open()
    group.history.applied_seq = newest
    refused = 0
    for block in range(count - blocks):
        view, target = group.history.view(group.fd, 0, seq, count * BLOCK, newest), bytearray(blocks * BLOCK)
        try:
            view.read_into(block * BLOCK, memoryview(target))
            assert target == group.versions[seq][block * BLOCK : (block + blocks) * BLOCK]
        except OSError as e:
            assert e.errno == errno.EIO
            refused += 1
    assert refused > 10
    group.close()


def test_an_index_that_cannot_be_opened_says_what_to_do(tmp_path: Path) -> None:
    group = filled(tmp_path)
    newest = group.history.applied_seq
    group.history.close()
    index = tmp_path / "history" / "index"
    for path in index.glob("MANIFEST-*"):
        path.write_bytes(path.read_bytes()[:60] + os.urandom(50))
    with pytest.raises(CorruptionError, match="remove that folder") as error:
        group.open()
    assert str(index) in str(error.value)
    shutil.rmtree(index)
    group.history = group.open()
    group.history.cut(newest)
    assert all(group.read(seq) == version for seq, version in group.versions.items())
    group.close()


def test_an_index_that_cannot_be_written_down_does_not_keep_its_history_open(tmp_path: Path) -> None:
    """A reset is the way out of damage, and begins with letting go of what is damaged."""
    group = filled(tmp_path)
    committed = group.history.applied_seq
    shutil.rmtree(tmp_path / "history" / "index")
    group.history.close()
    group.history = group.open()
    group.put_back(committed)
    assert all(group.read(seq) == version for seq, version in group.versions.items())
    group.close()


def test_recycled_file_cannot_pass_for_history(tmp_path: Path) -> None:
    """Promise 6: a reader that holds on to a dropped segment gets EIO, whatever stands in its file by then."""
    group = filled(tmp_path, 1 << 16)
    view = group.history.view(group.fd, 0, 1, BLOCKS * BLOCK, group.history.applied_seq)
    target = memoryview(bytearray(BLOCKS * BLOCK))
    view.read_into(0, target)
    assert group.history.retain(None, 0, [], 0).dropped
    for i in range(6):
        group.bundle([write(0, os.urandom(BLOCK) * 40)])
        with pytest.raises(OSError, match="left the window") as refusal:
            view.read_into(0, target)
        assert refusal.value.errno == errno.EIO, i
        for call in (view.allocation, view.changed):
            with pytest.raises(OSError, match="left the window"):
                call(0, BLOCK)
    oldest = group.history.oldest_seq
    assert all(group.read(seq) == v for seq, v in group.versions.items() if seq >= oldest)
    group.close()


def test_damage_in_what_leaves_the_window_does_not_keep_it_there(tmp_path: Path) -> None:
    """Promise 9: a history that cannot drop its oldest part would stop replay and grow."""
    group = filled(tmp_path, 1 << 16)
    first = segments(group)[0]
    first.write_bytes(first.read_bytes()[:PAGE_BYTES] + os.urandom(first.stat().st_size - PAGE_BYTES))
    kept = group.history.retain(None, 0, [], 0)
    assert kept.dropped and group.history.oldest_seq == kept.oldest_seq > 0
    group.bundle([write(0, os.urandom(BLOCK))])
    assert all(group.read(seq) == v for seq, v in group.versions.items() if seq >= kept.oldest_seq)
    group.close()


def test_a_failed_sync_ends_the_log(tmp_path: Path) -> None:
    """Promise 3: after a sync that failed nothing more is taken, and nothing of it was published."""
    group = filled(tmp_path)
    batch = group.stream.batch([write(0, bytes(BLOCK))])
    pending = group.history.append([batch], group.plan(batch), False)
    with pytest.raises(StorageError, match="before it was synced"):
        group.history.publish(pending)
    spare, pending.written.files = pending.written.files, [_Closed()]  # type: ignore[list-item]
    with pytest.raises(OSError, match="Bad file"):
        group.history.sync(pending)
    with pytest.raises(StorageError, match="cannot be trusted"):
        group.history.append([batch], [], False)
    assert spare
    group.close()


def test_a_power_cut_where_a_segment_begins_takes_only_what_was_not_synced(tmp_path: Path) -> None:
    """Promise 5: two bundles are under way, the second begins a segment, and only that one's pages reach the disk."""
    group = Group(tmp_path, BLOCKS, segment_bytes=1 << 16)
    log, pending = group.history.log, []
    while len(log.segments) < 2:
        end = log.newest.end if log.newest else PAGE_BYTES
        batch = group.stream.batch([write(len(pending) % 8, os.urandom(BLOCK))])
        pending.append((batch, group.history.append([batch], group.plan(batch), False), end))
        if len(pending) > 2:
            synced, bundle, _ = pending[-3]
            group.history.sync(bundle)
            group.history.publish(bundle)
            group.apply([synced])
    committed = group.history.applied_seq
    group.history.close()
    first = segments(group)[0]
    with first.open("r+b") as file:
        file.truncate(pending[-2][2])
    group.history = group.open()
    group.put_back(committed)
    assert group.read(committed) == group.versions[committed]
    group.bundle([write(3, os.urandom(BLOCK))])
    assert all(group.read(seq) == version for seq, version in group.versions.items())
    group.close()


class _Closed:
    """A file whose sync fails."""

    fd = 1 << 20


class PowerCut(RuntimeError):
    """Ends what was under way."""


def test_a_power_cut_while_the_log_is_cut_keeps_what_was_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 5: a divided record began in the bundle of the committed one; the new segment that keeps that one's part
    reaches the disk with its first page alone."""
    group = Group(tmp_path, BLOCKS)
    first = group.bundle([write(0, b"a" * BLOCK)])
    whole = group.stream.batch([write(1, b"b" * BLOCK)])
    extents = group.plan(whole)
    later = group.plan(group.stream.batch([write(2, b"c" * BLOCK), write(3, b"d" * BLOCK)]))
    pending = group.history.append([whole], [*extents, later[0]], False)
    group.history.sync(pending)
    group.history.publish(pending)
    group.apply([whole])
    group.history.close()
    group.history = group.open()
    assert list(group.history.recover(whole.last_seq))

    def cut_power(fd: int) -> None:
        with open(f"/proc/self/fd/{fd}", "r+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(PAGE_BYTES)
            file.write(bytes(size - PAGE_BYTES))
        raise PowerCut

    with monkeypatch.context() as patched:
        patched.setattr(storage, "fdatasync", cut_power)
        with pytest.raises(PowerCut):
            group.history.cut(whole.last_seq)
    group.history.close()
    group.history = group.open()
    group.put_back(whole.last_seq)
    assert all(group.read(seq) == group.versions[seq] for seq in (first, whole.last_seq))
    group.close()
