"""The histories that a reset left behind, removed in the background: unlinking hundreds of GiB takes minutes, and
those who read the past must not wait for it. What is not removed when the process ends is removed by the next start.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading

from cdp import storage

log = logging.getLogger(__name__)


class Leftovers:
    """One pass over `folders`. Nothing that is needed is ever named like them again."""

    def __init__(self, folders: list[str]) -> None:
        self._folders = folders
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="leftovers", daemon=True)
        if folders:
            self._thread.start()

    def close(self) -> None:
        """Ends after the file that it is at."""
        self._ending.set()
        if self._folders:
            self._thread.join()

    def _run(self) -> None:
        try:
            for folder in self._folders:
                self._remove(folder)
        except OSError as e:
            log.warning("An old history could not be removed; the next start tries again: %s", e)

    def _remove(self, folder: str) -> None:
        for path, _, names in os.walk(folder):
            for name in names:
                if self._ending.is_set():
                    return
                storage.unlink(f"{path}/{name}")
        shutil.rmtree(folder)
