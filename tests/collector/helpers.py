"""A collector that can be killed, and what its journal says about the volumes."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cdp.errors import CdpError, from_dict
from cdp.journal import batch
from cdp.journal.batch import Record
from cdp.journal.chain import Chain
from cdp.journal.reader import EmbeddedReader

ROOT = Path(__file__).parent.parent.parent
MIB = 1 << 20
# A start waits at most 10 s for locks; everything else here takes milliseconds.
LIMIT_SECONDS = 20.0


class Runner:
    """One collector process. `start` returns when it is ready, or raises the CdpError that it ended with."""

    def __init__(
        self, folder: Path, volumes: list[tuple[str, str, int]], *, group: str = "shop",
        segment_bytes: int = 8 * MIB, max_bytes: int = 256 * MIB, **more: Any,
    ) -> None:  # fmt: skip
        self.folder, self.group = folder, group
        self.socket = str(folder / "nbd.sock")
        self.journal = str(folder / "collector/groups" / group / "journal")
        self.config = {
            "state": str(folder), "listen": f"unix:{self.socket}", "segment_bytes": segment_bytes,
            "max_bytes": max_bytes, "groups": [{"name": group, "volumes": volumes}], **more,
        }  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Runner:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.collector.runner", json.dumps(self.config)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT,
        )  # fmt: skip
        self._buffer = b""
        self._answer()
        return self

    def __enter__(self) -> Runner:
        return self if self.process is not None else self.start()

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.stop()

    def uri(self, volume: str = "db") -> str:
        return f"nbd+unix:///{volume}?socket={self.socket}"

    def _answer(self) -> Any:
        assert self.process is not None and self.process.stdout is not None
        end = time.monotonic() + LIMIT_SECONDS
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self.process.stdout], [], [], end - time.monotonic())
            received = os.read(self.process.stdout.fileno(), 1 << 16) if ready else b""
            if not received:
                raise AssertionError(f"the collector says nothing (exit code {self.process.poll()})")
            self._buffer += received
        line, _, self._buffer = self._buffer.partition(b"\n")
        found = json.loads(line)
        if "error" in found:
            if self.process.poll() is not None:
                self.process.wait()
            raise from_dict(found["error"], found["exit_code"])
        return found["result"]

    def command(self, name: str, /, **arguments: Any) -> Any:
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write(json.dumps({"command": name, "arguments": arguments}).encode() + b"\n")
        self.process.stdin.flush()
        return self._answer()

    def figures(self) -> Any:
        return self.command("figures")["groups"][self.group]

    def wait_for(self, what: str, condition: Any) -> Any:
        """The first figures that `condition` holds for."""
        end = time.monotonic() + LIMIT_SECONDS
        while time.monotonic() < end:
            figures = self.figures()
            if condition(figures):
                return figures
            select.select([], [], [], 0.02)
        raise AssertionError(f"{what}: {figures}")

    def kill(self) -> None:
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self._reap()

    def stop(self) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGTERM)
        return self._reap()

    def _reap(self) -> int:
        assert self.process is not None and self.process.stdin and self.process.stdout
        code = self.process.wait(LIMIT_SECONDS)
        self.process.stdin.close()
        self.process.stdout.close()
        self.process = None
        return code


def refusal(call: Any) -> CdpError:
    """The CdpError that `call` raises."""
    try:
        call()
    except CdpError as e:
        return e
    raise AssertionError("was not refused")


class Journal:
    """Everything that readers may see, applied to plain bytearrays."""

    def __init__(self, folder: str, sizes: dict[int, int]) -> None:
        self.records: list[Record] = []
        self.images = {volume: bytearray(size) for volume, size in sizes.items()}
        chain = Chain(b"")
        reader = EmbeddedReader(folder, "replayer", 0)
        try:
            while batches := reader.read(8 * MIB):
                for found in batches:
                    assert chain.check(found)
                    for record in found.records():
                        self.records.append(record._replace(data=memoryview(bytes(record.data))))
                        self._apply(record)
        finally:
            reader.close()

    def _apply(self, record: Record) -> None:
        if record.kind not in (batch.WRITE, batch.ZERO, batch.SYNC):
            return
        end = record.offset + record.length
        content = bytes(record.data) or bytes(record.length)
        assert len(content) == record.length
        self.images[record.volume][record.offset : end] = content

    def of(self, *kinds: int) -> list[Record]:
        return [r for r in self.records if r.kind in kinds]

    def gaps(self, volume: int = 0) -> list[tuple[int, int | None]]:
        """(from_seq, to_seq) of each gap of a volume, as readers have to understand them."""
        found: list[tuple[int, int | None]] = []
        for r in self.of(batch.GAP):
            if r.volume != volume:
                continue
            if r.flags & batch.OPEN:
                if not found or found[-1][1] is not None:
                    found.append((r.offset or r.seq, None))
            elif found and found[-1][1] is None:
                found[-1] = (min(found[-1][0], r.offset or r.seq), r.seq)
            else:
                found.append((r.offset, r.seq))
        return found


def qemu_io(runner: Runner, *commands: str, volume: str = "db") -> subprocess.CompletedProcess[str]:
    arguments = [piece for command in commands for piece in ("-c", command)]
    command = ["qemu-io", "-t", "writeback", "-f", "raw", *arguments, runner.uri(volume)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def fio(runner: Runner, *arguments: str, volume: str = "db") -> Any:
    """fio's own figures of one job against a volume."""
    done = subprocess.run(
        ["fio", "--name=x", "--ioengine=nbd", f"--uri={runner.uri(volume)}", "--output-format=json", *arguments],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
