"""A file system's life: an ext4 image changed in steps through the volume, every step ended by a FLUSH.

At every barrier the opened point must be a clean file system with that step's files. No mount is needed: mke2fs and
debugfs change an image, the blocks that differ are written to the volume in a shuffled order.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.peers.conftest import VOLUMES, Program
from tests.support.nbd import NbdClient
from tests.support.running import Appliance, wait_for

pytestmark = pytest.mark.xdist_group("peers")

VOLUME = "root"
STEPS = 6
BLOCK = 4096


def write_difference(client: NbdClient, before: bytes, after: bytes, seed: int) -> None:
    """The blocks that differ, in an order of their own, then a FLUSH: what a guest's file system does."""
    blocks = [at for at in range(0, len(after), BLOCK) if before[at : at + BLOCK] != after[at : at + BLOCK]]
    random.Random(seed).shuffle(blocks)
    for at in blocks:
        client.write(at, after[at : at + BLOCK])
    client.flush()


def newest_barrier(appliance: Appliance, after: int) -> int:
    """The newest barrier beyond `after`, once the replayer offers it."""

    def found() -> int | None:
        barriers = appliance.json("points", VOLUME)["barriers"]
        return max((b["seq"] for b in barriers if b["seq"] > after), default=None)

    seq = wait_for(found, f"a barrier of {VOLUME} beyond seq {after}")
    assert isinstance(seq, int)
    return seq


def test_every_barrier_is_a_clean_file_system(appliance: Appliance, program: Program, tmp_path: Path) -> None:
    """Promise 3: what was flushed is whole at its barrier, step by step, and stays so (promise 6)."""
    rng, image, files = random.Random(7), tmp_path / "image", tmp_path / "files"
    files.mkdir()
    contents = {f"first-{i}": os.urandom(rng.randrange(1, 60_000)) for i in range(8)}
    for name, content in contents.items():
        (files / name).write_bytes(content)
    program("mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-d", str(files), str(image),
            f"{VOLUMES[VOLUME] // 1024}k")  # fmt: skip
    steps: list[tuple[int, dict[str, bytes]]] = []
    barrier, before = 0, bytes(VOLUMES[VOLUME])
    with NbdClient(appliance.socket("collector"), VOLUME) as client:
        for step in range(STEPS):
            if step:
                contents = change_files(program, image, tmp_path, dict(contents), step, rng)
            after = image.read_bytes()
            write_difference(client, before, after, step)
            barrier, before = newest_barrier(appliance, barrier), after
            steps.append((barrier, contents))
    # Backwards too: reading a point must not disturb another one.
    for seq, expected in [*steps, *reversed(steps)]:
        check_point(appliance, program, seq, expected, tmp_path)


def change_files(
    program: Program, image: Path, folder: Path, contents: dict[str, bytes], step: int, rng: random.Random
) -> dict[str, bytes]:
    """Removes a file, replaces one, adds one; the new contents."""
    gone, replaced = rng.sample(sorted(contents), 2)
    del contents[gone]
    contents[replaced] = os.urandom(rng.randrange(1, 90_000))
    contents[f"step-{step}"] = os.urandom(rng.randrange(1, 90_000))
    commands = [f"rm {gone}", f"rm {replaced}"]
    for name in (replaced, f"step-{step}"):
        source = folder / f"new-{name}"
        source.write_bytes(contents[name])
        commands.append(f"write {source} {name}")
    script = folder / "commands"
    script.write_text("\n".join(commands) + "\n")
    program("debugfs", "-w", "-f", str(script), str(image))
    return contents


def check_point(
    appliance: Appliance, program: Program, seq: int, expected: dict[str, bytes], folder: Path
) -> None:
    copy, out = folder / "point", folder / f"out-{seq}"
    out.mkdir(exist_ok=True)
    program("nbdcopy", appliance.past(VOLUME, f"seq:{seq}"), str(copy))
    program("e2fsck", "-fn", str(copy))
    program("debugfs", "-R", f"rdump / {out}", str(copy))
    found = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    assert found == expected, f"the files at seq {seq} are not that step's"
