"""A sync that another than `sync` made, and that failed: its error goes in with `end_sync`."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tests.journal import support


def test_its_failure_is_the_writers(tmp_path: Path) -> None:
    """Promise 3: nothing of the file counts as durable, and it goes on in a new segment."""
    folder = tmp_path / "j"
    writer = support.open_writer(folder, 1)
    support.append(writer, 5_000)
    support.sync(writer)
    last = support.append(writer, 5_000)
    token = writer.begin_sync()
    assert token is not None and token.only_fd is not None
    with pytest.raises(OSError, match="takes nothing more"):
        writer.end_sync(token, OSError(errno.EIO, "Input/output error"))
    assert writer.durable_seq == last - 1
    writer.reopen_after_failure()
    assert writer.durable_seq == last


def test_a_new_name_needs_the_whole_sync(tmp_path: Path) -> None:
    writer = support.open_writer(tmp_path / "j", 1)
    support.append(writer, 40_000)
    support.append(writer, 40_000)  # in a second segment
    token = writer.begin_sync()
    assert token is not None and token.only_fd is None
