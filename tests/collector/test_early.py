"""Small flushes set the disk to work before their syncs begin; large ones, and those of a slow disk, never do."""

from __future__ import annotations

import time
from pathlib import Path

from cdp.collector.flusher import EARLY_BYTES
from tests.collector.helpers import LIMIT_SECONDS, MIB, Runner
from tests.support.nbd import NbdClient

BLOCK = 4096


def started(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def flush_one(client: NbdClient, number: int) -> None:
    client.write(number % 64 * BLOCK, bytes([number % 255 + 1]) * BLOCK)
    client.flush()


def until_early(client: NbdClient, log: Path) -> int:
    """Small flushes until one of them found the disk quiet; how many the file was given to the disk by then."""
    end, number = time.monotonic() + LIMIT_SECONDS, 0
    before = started(log).count("db.raw")
    while started(log).count("db.raw") == before:
        assert time.monotonic() < end, "no round of this disk was short"
        flush_one(client, number)
        number += 1
    return started(log).count("db.raw")


def test_small_flushes_begin_early_and_large_ones_do_not(tmp_path: Path) -> None:
    log = tmp_path / "writing"
    with (
        Runner(tmp_path, [("db", f"file:{tmp_path}/db.raw", 16 * MIB)], watch_writing=str(log),
               early_round_ns=10**10) as runner,  # fmt: skip  # any disk counts as quiet
        NbdClient(runner.socket, "db") as client,
    ):
        until_early(client, log)
        assert any(name.startswith("segment-") for name in started(log)), "the journal goes with it"
        count = started(log).count("db.raw")
        for offset in range(0, 2 * EARLY_BYTES, BLOCK):
            client.write(offset, b"x" * BLOCK)
        client.flush()
        assert started(log).count("db.raw") == count, "more is unsynced than the loop may wait for"
        until_early(client, log)  # once that is synced


def test_a_slow_disk_is_never_written_by_the_loop(tmp_path: Path) -> None:
    log = tmp_path / "writing"
    slow = {"suffix": "db.raw", "seconds": 0.01}
    with (
        Runner(tmp_path, [("db", f"file:{tmp_path}/db.raw", 16 * MIB)], watch_writing=str(log),
               slow_sync=slow) as runner,  # fmt: skip
        NbdClient(runner.socket, "db") as client,
    ):
        for number in range(30):
            flush_one(client, number)
    assert started(log) == []
