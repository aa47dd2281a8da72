"""The index on a disk that fills up: an OSError that can be waited for, and nothing lost behind it."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdp.history.index_map import RocksMap
from tests.support.running import wait_for

DISK_BYTES = 24 << 20
# RocksDB looks for space again every few seconds.
RECOVERY_SECONDS = 60.0


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A folder with a tmpfs in it; needs the right to mount."""
    folder = Path(tempfile.mkdtemp(prefix="cdp-index-"))
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        shutil.rmtree(folder)
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        shutil.rmtree(folder)


@pytest.mark.slow
def test_a_full_disk_is_an_oserror_and_passes(small_disk: Path) -> None:
    entries = RocksMap(str(small_disk / "index"))
    entries.write([(b"%08d" % i, os.urandom(60)) for i in range(20_000)])
    filler = small_disk / "filler"
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
    again = RocksMap(str(small_disk / "index"))
    assert again.get(b"00000007") and again.get(b"taken") == b"1"
    again.close()
