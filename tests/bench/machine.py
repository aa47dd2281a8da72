"""What the machine says while something is measured: CPU, memory, page cache, disk; and processes of our own."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
_libc = ctypes.CDLL(None, use_errno=True)


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()


def family(pids: Iterable[int]) -> list[int]:
    """These processes and everything below them."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, IndexError):
                children.setdefault(int(_stat(int(entry))[1]), []).append(int(entry))
    found, todo = [], list(pids)
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo += children.get(pid, [])
    return found


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of these processes, of their living children and of those they waited for."""
    total = 0
    for pid in family(pids):
        with contextlib.suppress(OSError):
            total += sum(int(x) for x in _stat(pid)[11:15])
    return total / TICK


def pss_bytes(pids: Iterable[int]) -> int:
    """Proportional set size of these processes and everything below them."""
    total = 0
    for pid in family(pids):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) << 10
    return total


@dataclass
class Peaks:
    """The highest PSS seen of each named set of processes, sampled by a thread until `stop`."""

    sets: dict[str, list[int]] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    _end: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    # Reading smaps_rollup walks page tables: twice a second does not disturb what is measured.
    interval_seconds: float = 0.5

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._end.wait(self.interval_seconds):
            for name, pids in list(self.sets.items()):
                self.bytes[name] = max(self.bytes.get(name, 0), pss_bytes(pids))

    def stop(self) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()


@dataclass
class Counters:
    """Busy and stolen CPU seconds of the whole machine, pages written back, KiB read from disks."""

    busy: float
    steal: float
    written_pages: int
    read_kib: int

    @classmethod
    def now(cls) -> Counters:
        with open("/proc/stat") as f:
            ticks = [int(x) for x in f.readline().split()[1:9]]
        with open("/proc/vmstat") as f:
            vm = dict(line.split() for line in f)
        busy = (ticks[0] + ticks[1] + ticks[2] + ticks[5] + ticks[6]) / TICK
        return cls(busy, ticks[7] / TICK, int(vm["nr_written"]), int(vm["pgpgin"]))


def sync_file_system(folder: Path) -> None:
    """syncfs, not fdatasync: only the flusher resets an inode's "dirty since", else it is written back in a cell."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        _libc.syncfs(fd)
    finally:
        os.close(fd)


def fill(path: Path, size: int, data: bytes = b"") -> None:
    """A file fully written in 4 KiB writes.

    Where the file system has large folios, big writes leave big folios in the page cache, and a 4 KiB write into
    one costs some 30 µs instead of 2: that would hide every server behind the page cache.
    """
    block = data or os.urandom(8 << 20)
    views = [memoryview(block)[at : at + 4096] for at in range(0, len(block), 4096)]
    with open(path, "wb", buffering=0) as f:
        for i in range(size // 4096):
            f.write(views[i % 1021 % len(views)])
        os.fdatasync(f.fileno())


def page_in(path: Path, span: int) -> None:
    """Reads the span, so that no page reclaimed meanwhile is missing. RANDOM keeps readahead's big folios out."""
    buffer = bytearray(1 << 20)
    with open(path, "rb", buffering=0) as f:
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for at in range(0, span, len(buffer)):
            os.preadv(f.fileno(), [buffer], at)


def page_out(path: Path) -> None:
    """Drops a file from the page cache (synced first: dirty pages cannot be dropped)."""
    with open(path, "rb", buffering=0) as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def pin(pids: Iterable[int], cores: set[int]) -> None:
    """These processes, everything below them, and every thread of theirs, on these cores (as `taskset -a`)."""
    for pid in family(pids):
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(int(thread), cores)


@contextlib.contextmanager
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    """A list whose processes are ended, newest first, on the way out."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        yield started
    finally:
        for process in reversed(started):
            if process.poll() is None:
                process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _first_line(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0]
    except OSError:
        return f"no {command[0]}"


def description() -> list[str]:
    """The machine and the versions, for the head of every report."""
    with open("/proc/cpuinfo") as f:
        model = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), "unknown CPU")
    with open("/proc/meminfo") as f:
        memory_gib = int(f.readline().split()[1]) / (1 << 20)
    return [
        f"{os.cpu_count()} × {model}, {memory_gib:.0f} GiB, Linux {platform.release()}",
        f"Python {sys.version.split()[0]}, rocksdict {version('rocksdict')}, zstandard {version('zstandard')}, "
        f"crc32c {version('crc32c')}",
        ", ".join((_first_line("qemu-nbd", "--version"), _first_line("nbdkit", "--version"),
                   _first_line("fio", "--version"))),
    ]  # fmt: skip
