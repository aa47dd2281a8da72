"""Disks that fail: a failed sync, a failed write, a short write. Faults are injected at the door to files."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from cdp import storage
from cdp.errors import CorruptionError
from tests.journal import support


def fail_sync(writer: support.JournalWriter, patch: pytest.MonkeyPatch) -> None:
    """One sync round that fails as the kernel reports a lost write."""

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    token = writer.begin_sync()
    assert token is not None
    patch.setattr(storage, "fdatasync", broken)
    with pytest.raises(OSError):
        writer.sync(token)
    patch.undo()
    with pytest.raises(OSError, match="takes nothing more"):
        writer.end_sync(token)


@pytest.mark.parametrize("undurable", [1, 3, 12], ids=["same segment", "all of one", "many segments"])
@pytest.mark.parametrize("durable", [0, 1, 4])
def test_failed_sync_goes_on_in_a_new_segment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: int, undurable: int
) -> None:
    """Promise 3: the file is never trusted again; what was not durable is written once more, elsewhere."""
    folder = tmp_path / "j"
    writer = support.open_writer(folder, 1)
    for _ in range(durable):
        support.append(writer, 20_000)
    support.sync(writer)
    for _ in range(undurable):
        last = support.append(writer, 20_000)
    files = {path.stat().st_ino for path in support.segments(folder)}
    fail_sync(writer, monkeypatch)
    assert writer.durable_seq == durable
    for refused in (lambda: support.append(writer, 1), writer.begin_sync):
        with pytest.raises(OSError, match="takes nothing more"):
            refused()
    writer.reopen_after_failure()
    assert writer.durable_seq == writer.last_seq == last
    assert support.segments(folder)[-1].stat().st_ino not in files
    writer.publish(last)
    assert support.read_all(folder).seq == last
    for _ in range(5):
        support.append(writer, 20_000)
    support.sync(writer)
    assert support.read_all(folder).seq == last + 5
    writer.close()
    again = support.open_writer(folder, 2, known_durable_seq=last + 5)
    assert again.last_seq == last + 5
    again.close()


def test_appends_go_on_until_the_loop_hears_of_a_failed_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 3: between a worker's failed sync and the loop's hearing of it production appends; that is not the
    journal's death, and what was appended then is written again with the rest."""
    writer = support.open_writer(tmp_path / "j", 1)
    support.append(writer, 500)
    token = writer.begin_sync()
    assert token is not None

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(storage, "fdatasync", broken)
    with pytest.raises(OSError):
        writer.sync(token)
    monkeypatch.undo()
    support.append(writer, 700)
    with pytest.raises(OSError, match="takes nothing more"):
        writer.end_sync(token)
    assert writer.durable_seq == 0
    with pytest.raises(OSError, match="takes nothing more"):
        support.append(writer, 1)
    writer.reopen_after_failure()
    writer.publish(2)
    assert writer.durable_seq == 2 and support.read_all(tmp_path / "j").seq == 2
    writer.close()


def test_readers_that_cannot_be_told_stop_nobody(tmp_path: Path) -> None:
    """Promise 10: whatever lies in a consumer's place of call, publishing goes on."""
    writer = support.open_writer(tmp_path / "j", 1)
    stranger = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stranger.bind(str(tmp_path / "j/consumers/x.sock"))
    stranger.listen()
    (tmp_path / "j/consumers/y.sock").write_bytes(b"no socket")
    support.append(writer, 500)
    support.sync(writer)
    assert support.read_all(tmp_path / "j").seq == 1
    stranger.close()
    writer.close()


def test_what_the_page_cache_lost_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 3: no rewriting of what cannot be proved to be what was appended."""
    writer = support.open_writer(tmp_path / "j", 1)
    support.append(writer, 500)
    end = writer._current.end
    support.append(writer, 500)
    fail_sync(writer, monkeypatch)
    support.flip(support.segments(tmp_path / "j")[0], end - 10)
    with pytest.raises(CorruptionError):
        writer.reopen_after_failure()
    with pytest.raises(OSError):
        support.append(writer, 1)
    writer.close()


def test_failed_write_goes_on_in_a_new_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = support.open_writer(tmp_path / "j", 1)
    support.append(writer, 500)

    def broken(fd: int, pieces: list[bytes], offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(storage, "pwritev", broken)
    with pytest.raises(OSError):
        support.append(writer, 500)
    monkeypatch.undo()
    writer.reopen_after_failure()
    assert support.append(writer, 700) == 2
    support.sync(writer)
    assert support.read_all(tmp_path / "j").seq == 2
    writer.close()


def test_a_sync_counts_that_ends_well_after_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 3: the sync under way has made durable what it covers, and its end lets the rewriting begin."""
    writer = support.open_writer(tmp_path / "j", 1)
    support.append(writer, 500)
    token = writer.begin_sync()
    assert token is not None and writer.syncing
    support.append(writer, 600)

    def broken(fd: int, pieces: list[bytes], offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(storage, "pwritev", broken)
    with pytest.raises(OSError):
        support.append(writer, 500)
    monkeypatch.undo()
    writer.sync(token)
    assert writer.end_sync(token) == 1 and not writer.syncing
    with pytest.raises(OSError, match="takes nothing more"):
        support.append(writer, 1)
    rewritten = writer.rewrite()
    assert rewritten.segment.first_seq == 2
    writer.adopt(rewritten)
    writer.publish(2)
    assert writer.durable_seq == 2 and support.read_all(tmp_path / "j").seq == 2
    writer.close()


def test_short_writes_are_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        storage, "pwritev", lambda fd, pieces, offset: os.pwrite(fd, b"".join(pieces)[:777], offset)
    )
    monkeypatch.setattr(storage, "pwrite", lambda fd, data, offset: os.pwrite(fd, bytes(data)[:1500], offset))
    writer = support.open_writer(tmp_path / "j", 1)
    for _ in range(10):
        support.append(writer, 20_000, 3, 900)
    support.sync(writer)
    assert support.read_all(tmp_path / "j").seq == 30
    writer.close()


def test_pieces_beyond_what_one_call_takes(tmp_path: Path) -> None:
    writer = support.open_writer(tmp_path / "j", 1, segment_bytes=64 << 20, max_bytes=256 << 20)
    support.append(writer, *([7] * 5000))
    support.append(writer, *([20_000] * 1500))
    support.append(writer, *([20_000] * 60))
    support.append(writer, 0, 0)
    support.sync(writer)
    assert support.read_all(tmp_path / "j").seq == writer.last_seq == 6562
    writer.close()


def test_order_time_survives_a_clock_that_goes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Order time is the greater of wall time and the previous plus the monotonic clock's advance."""
    clock = {"wall": 10**18, "monotonic": 5 * 10**9}
    monkeypatch.setattr(storage, "wall_ns", lambda: clock["wall"])
    monkeypatch.setattr(storage, "monotonic_ns", lambda: clock["monotonic"])
    writer = support.open_writer(tmp_path / "j", 1)
    support.append(writer, 1, 1, 1)
    assert writer.order_ns == 10**18 + 2
    support.append(writer, 1)  # no time has passed: behind the last record
    assert writer.order_ns == 10**18 + 3
    clock["wall"] -= 10**12
    clock["monotonic"] += 1000
    support.append(writer, 1)
    assert writer.order_ns == 10**18 + 1003
    clock["wall"] += 10**13
    support.append(writer, 1)
    assert writer.order_ns == clock["wall"]
    writer.close()
    clock["wall"] = 10**18
    clock["monotonic"] = 0
    writer = support.open_writer(tmp_path / "j", 2)
    clock["monotonic"] = 5
    support.append(writer, 1)
    assert writer.order_ns == 10**18 + 9 * 10**12 + 5
    writer.close()
