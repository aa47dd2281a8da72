"""The index on a disk that fills up: an OSError that can be waited for, and nothing lost behind it."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdp.history.index_map import RocksMap
from tests.support.disk import small_disk
from tests.support.running import wait_for

DISK_BYTES = 24 << 20
# RocksDB looks for space again every few seconds.
RECOVERY_SECONDS = 60.0


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", DISK_BYTES) as folder:
        yield folder


@pytest.mark.slow
def test_a_full_disk_is_an_oserror_and_passes(full_disk: Path) -> None:
    entries = RocksMap(str(full_disk / "index"))
    entries.write([(b"%08d" % i, os.urandom(60)) for i in range(20_000)])
    filler = full_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(1 << 16)):
            pass
    for call in (entries.flush, lambda: entries.write([(b"refused", b"")])):
        with pytest.raises(OSError) as refusal:
            call()
        assert refusal.value.errno == errno.ENOSPC
    filler.unlink()

    def goes_on() -> bool:
        with contextlib.suppress(OSError):
            entries.write([(b"taken", b"1")])
            return True
        return False

    wait_for(goes_on, "the index takes writes again", RECOVERY_SECONDS)
    entries.close()
    again = RocksMap(str(full_disk / "index"))
    assert again.get(b"00000007") and again.get(b"taken") == b"1"
    again.close()
