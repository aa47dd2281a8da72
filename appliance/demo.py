"""The tour: protect, break, look into the past, roll back, go forward again; each step with its time and its proof.

It runs the real processes and the real commands in a temporary folder, over unix sockets, and ends them at the end.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from appliance.demo_data import IMAGE_BYTES, Data
from cdp.errors import CdpError, StorageError
from cdp.nbd.client import Client

# A cold start of two processes on a busy machine.
READY_SECONDS = 30.0
COMMAND_SECONDS = 60.0
STOP_SECONDS = 40.0
CHUNK_BYTES = 1 << 20
# What the "upgrade" writes over: from the superblock into the data of the files.
DAMAGE_OFFSET, DAMAGE_BYTES = 1024, 12 << 20

CONFIG = """[appliance]
state_dir = "state"
[collector]
listen = ["unix:c.sock"]
[replayer]
listen = ["unix:r.sock"]
[journal]
segment_size = "16MiB"
max_size = "1GiB"
[[group]]
name = "shop"
window = "1h"
[[group.volume]]
name = "db"
primary = "file:db.raw"
size = "64MiB"
"""


class Demo:
    """One run of the tour."""

    def __init__(self, keep: bool = False) -> None:
        self._keep = keep
        self._folder = Path(tempfile.mkdtemp(prefix="cdp-demo-"))
        self._console = Console(highlight=False, soft_wrap=True)
        self._rows: list[tuple[str, float, str]] = []
        self._up: subprocess.Popen[str] | None = None

    def run(self) -> int:
        """Exit code 0 when every step proved what it should. Raises CdpError for the one that did not."""
        started = time.monotonic()
        try:
            self._tour()
        except CdpError:
            self._show_log()
            raise
        finally:
            self._end()
        table = Table(title="What was done, and what it proved", title_justify="left", box=None, pad_edge=False)
        for column, style in (("step", "bold"), ("time", "cyan"), ("proved", "")):
            table.add_column(column, style=style, overflow="fold")
        for title, seconds, proof in self._rows:
            table.add_row(title, f"{seconds:.2f} s", proof)
        self._console.print("\n", table, f"\nAll of it took {time.monotonic() - started:.1f} s.", sep="")
        return 0

    def _tour(self) -> None:
        self._step("Start the appliance", self._start)
        data = self._step("Put data on the volume, over NBD", self._fill)
        self._step("Bookmark this moment", self._bookmark)
        broken = self._step("An upgrade goes wrong", lambda: self._break(data))
        self._step("Open the volume from before it", lambda: self._look_back(data))
        bookmark = self._step("Roll back", lambda: self._roll_back(data))
        self._step("Go forward to before the rollback", lambda: self._go_forward(bookmark, broken))
        self._step("Verify the replica, in-band", self._verify)

    def _step(self, title: str, call: Callable[[], tuple[str, Any]]) -> Any:
        self._console.print(f"[bold]{title}[/] …")
        began = time.monotonic()
        proof, result = call()
        seconds = time.monotonic() - began
        self._rows.append((title, seconds, proof))
        self._console.print(f"  [green]✓[/] {proof} [dim]({seconds:.2f} s)[/]")
        return result

    # --- the steps: what each proved, and what later ones need

    def _start(self) -> tuple[str, None]:
        (self._folder / "cdp.toml").write_text(CONFIG)
        log = open(self._folder / "up.log", "w")
        with log:
            self._up = subprocess.Popen(
                [sys.executable, "-m", "appliance.cli.main", "--config", str(self._folder / "cdp.toml"), "up"],
                stdout=subprocess.PIPE, stderr=log, text=True, env=_environment(),
            )  # fmt: skip
        assert self._up.stdout is not None
        for line in self._up.stdout:
            if line.strip() == "ready":
                break
        else:
            raise StorageError("The appliance did not start.", "Its log is above.")
        self._wait_protected()
        return "collector and replayer answer; the volume is protected", None

    def _wait_protected(self) -> None:
        end = time.monotonic() + READY_SECONDS
        while (state := self._status()["groups"][0]["state"]) != "protected":
            if time.monotonic() > end:
                raise StorageError(f"The volume is {state} after {READY_SECONDS:.0f} s.", "Its log is above.")

    def _fill(self) -> tuple[str, Data]:
        data = Data(self._folder)
        with self._open("c.sock", "db") as volume:
            for offset in range(0, IMAGE_BYTES, CHUNK_BYTES):
                chunk = data.image[offset : offset + CHUNK_BYTES]
                if chunk.count(0) != len(chunk):
                    volume.write(offset, chunk)
            volume.flush()
        self._expect("c.sock", "db", data.image, "the volume is what was written to it")
        return f"{data.what()} reads back byte for byte", data

    def _bookmark(self) -> tuple[str, None]:
        made = self._cdp("bookmark", "shop", "before-upgrade", "--wait", "--json")
        return f"`before-upgrade` is seq {made['seq']}, {made['time']}", None

    def _break(self, data: Data) -> tuple[str, bytes]:
        with self._open("c.sock", "db") as volume:
            for offset in range(DAMAGE_OFFSET, DAMAGE_OFFSET + DAMAGE_BYTES, CHUNK_BYTES):
                volume.write(offset, os.urandom(min(CHUNK_BYTES, DAMAGE_OFFSET + DAMAGE_BYTES - offset)))
            volume.flush()
        broken = self._read("c.sock", "db")
        if data.is_clean(broken):
            raise StorageError("The damage did no damage.")
        what = "e2fsck finds the file system destroyed" if data.has_file_system else "the data is not the same any more"
        return f"{DAMAGE_BYTES >> 20} MiB overwritten; {what}", broken

    def _look_back(self, data: Data) -> tuple[str, None]:
        past = self._read("r.sock", "db@before-upgrade")
        if past != data.image or not data.is_clean(past):
            raise StorageError("The past is not what it was.")
        if not data.has_file_system:
            return "db@before-upgrade is the original, byte for byte", None
        whole = data.whole_files(past)
        if whole != len(data.files):
            raise StorageError(f"Only {whole} of {len(data.files)} files are whole in the past.")
        return f"db@before-upgrade: e2fsck is clean, {whole} of {whole} files are whole", None

    def _roll_back(self, data: Data) -> tuple[str, str]:
        done = self._cdp("rollback", "db", "--to", "before-upgrade", "--yes", "--json")
        self._expect("c.sock", "db", data.image, "the volume is as it was before the upgrade")
        return f"the primary is the original byte for byte; {done['bytes'] or 0:,} bytes were copied", done["bookmark"]

    def _go_forward(self, bookmark: str, broken: bytes) -> tuple[str, None]:
        self._cdp("rollback", "db", "--to", bookmark, "--yes", "--json")
        self._expect("c.sock", "db", broken, "the volume is as it was before the rollback")
        return f"`{bookmark}` brought the newest state back byte for byte: a rollback destroys nothing", None

    def _verify(self) -> tuple[str, None]:
        answer = self._cdp("verify", "db", "--json")
        if not answer["equal"]:
            raise StorageError("Primary and replica differ.")
        return f"primary and replica are equal at seq {answer['seq']}", None

    # --- hands

    def _open(self, sock: str, export: str) -> Client:
        return Client.connect(f"unix:{self._folder / sock}", export)

    def _read(self, sock: str, export: str) -> bytes:
        with self._open(sock, export) as volume:
            return b"".join(bytes(volume.read(at, CHUNK_BYTES)) for at in range(0, IMAGE_BYTES, CHUNK_BYTES))

    def _expect(self, sock: str, export: str, content: bytes, what: str) -> None:
        if self._read(sock, export) != content:
            raise StorageError(f"It is not true that {what}.")

    def _status(self) -> dict[str, Any]:
        return self._cdp("status", "--json", codes=(0, 1))

    def _cdp(self, *arguments: str, codes: tuple[int, ...] = (0,)) -> dict[str, Any]:
        if arguments[0] != "status":
            self._console.print(f"  [dim]$ cdp {' '.join(a for a in arguments if a != '--json')}[/]")
        done = subprocess.run(
            [sys.executable, "-m", "appliance.cli.main", "--config", str(self._folder / "cdp.toml"), *arguments],
            capture_output=True, text=True, check=False, timeout=COMMAND_SECONDS, env=_environment(),
        )  # fmt: skip
        if done.returncode not in codes:
            raise StorageError(f"`cdp {' '.join(arguments)}` failed: {done.stderr.strip()}")
        return dict(json.loads(done.stdout))

    def _show_log(self) -> None:
        log = self._folder / "up.log"
        if log.exists():
            self._console.print(log.read_text(errors="replace")[-4000:], markup=False, style="dim")

    def _end(self) -> None:
        if self._up is not None:
            self._up.terminate()
            try:
                self._up.communicate(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._up.kill()
                self._up.communicate()
        if self._keep:
            self._console.print(f"The folder {self._folder} was kept.")
        else:
            shutil.rmtree(self._folder, ignore_errors=True)


def _environment() -> dict[str, str]:
    root = str(Path(__file__).parents[1])
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))}
