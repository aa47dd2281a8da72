"""A reader process follows a writer process; either is killed at any moment. Promise 4."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdp.journal import consumers
from cdp.journal.position import read_durable
from tests.journal import support

ROOT = Path(__file__).parents[2]
# Longest that a process may take for one line.
LIMIT_SECONDS = 30


class Process:
    """One of the two programs, its lines read as they come."""

    def __init__(self, module: str, *arguments: str) -> None:
        command = [sys.executable, "-m", f"tests.journal.{module}", *arguments]
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    def line(self) -> list[str]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"ended with {self._process.wait()}"
        return line.split()

    def reach(self, seq: int) -> list[str]:
        end = time.monotonic() + LIMIT_SECONDS
        while int((line := self.line())[0]) < seq:
            assert time.monotonic() < end, f"at {line}, not {seq}"
        return line

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


@pytest.fixture
def started() -> Iterator[list[Process]]:
    processes: list[Process] = []
    yield processes
    for process in processes:
        process.kill()


def follow(tmp_path: Path, started: list[Process], rounds: int, seed: int) -> None:
    """Starts, kills and starts again; the follower checks every record, so reaching the end is the proof."""
    choice = random.Random(seed)
    folder, place = str(tmp_path / "j"), str(tmp_path / "place")
    consumers.register(folder, "replayer")
    epoch = seq = 0
    writer = reader = None
    for _ in range(rounds):
        if writer is None:
            epoch += 1
            writer = Process("writing", folder, str(epoch))
            started.append(writer)
        if reader is None:
            reader = Process("following", folder, place)
            started.append(reader)
        for _ in range(choice.randrange(1, 6)):
            seq = max(seq, int(writer.line()[0]))
        reader.reach(seq)
        victim = choice.choice(("writer", "reader", "both"))
        if victim != "reader":
            writer.kill()
            writer = None
        if victim != "writer":
            reader.kill()
            reader = None
    for process in (writer, reader):
        if process is not None:
            process.kill()
    last = support.open_writer(folder, epoch + 1, segment_bytes=256 << 10)
    assert last.last_seq >= seq
    last.publish(last.last_seq)
    at_end = Process("following", folder, place)
    started.append(at_end)
    if consumers.positions(folder)["replayer"] < last.last_seq:
        at_end.reach(last.last_seq)
    last.close()


def test_reader_follows_writer_over_kills(tmp_path: Path, started: list[Process]) -> None:
    follow(tmp_path, started, rounds=5, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_reader_follows_writer_over_many_kills(tmp_path: Path, started: list[Process], seed: int) -> None:
    follow(tmp_path, started, rounds=25, seed=seed)


def test_waiting_reader_uses_no_cpu_and_wakes_at_once(tmp_path: Path, started: list[Process]) -> None:
    folder = tmp_path / "j"
    writer = support.open_writer(folder, 1)
    support.append(writer, 10)
    support.sync(writer)
    reader = Process("following", str(folder), str(tmp_path / "place"))
    started.append(reader)
    cpu_before = float(reader.reach(1)[1])
    delays = []
    for _ in range(50):
        begin = time.monotonic()
        seq = support.append(writer, 10)
        support.sync(writer)
        cpu = float(reader.reach(seq)[1])
        delays.append(time.monotonic() - begin)
    assert cpu - cpu_before < 0.2
    assert sorted(delays)[25] < 0.5
    durable = read_durable(str(folder))
    assert durable is not None and durable.seq == 51
    writer.close()
