"""Registering a consumer from several places at once, as collector and replayer do at their first start."""

from __future__ import annotations

import threading
from pathlib import Path

from cdp.journal import consumers

ROUNDS, THREADS = 40, 4


def test_one_of_many_registers(tmp_path: Path) -> None:
    """Exactly one makes the file; the others find it, and nobody fails."""
    for number in range(ROUNDS):
        folder, start = str(tmp_path / str(number)), threading.Barrier(THREADS)
        made: list[bool | BaseException] = []

        def register(folder: str = folder, start: threading.Barrier = start, made: list = made) -> None:
            start.wait()
            try:
                made.append(consumers.register(folder, "replayer", 7))
            except BaseException as e:
                made.append(e)

        threads = [threading.Thread(target=register) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(map(repr, made)) == ["False"] * (THREADS - 1) + ["True"]
        assert consumers.names(folder) == ["replayer"]
