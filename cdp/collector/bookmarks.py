"""The names of a group's bookmarks, so that none is given twice.

The file is written with the checkpoints; what came after is met again in the journal's tail at a start.
"""

from __future__ import annotations

import logging
import re

from cdp import storage
from cdp.collector.state import VERSION, Saved, Store, load
from cdp.errors import RefusedError, UsageError

log = logging.getLogger(__name__)

# As many names as expired bookmarks are remembered by the replayer; the oldest are forgotten first.
MAX_NAMES = 10_000
_SYNTAX = re.compile(r"[A-Za-z_][A-Za-z0-9._-]{0,63}")
_KEYWORDS = ("now", "seq", "barrier")
# `rollback-<seq>` is the automatic bookmark of a rollback.
_RESERVED_PREFIX = "rollback-"


class Bookmarks:
    """Names in the order they were given."""

    def __init__(self, path: str, worker: storage.Worker) -> None:
        """Raises CorruptionError."""
        found = (load(path) or {}).get("names", [])
        self._names: dict[str, None] = {str(name): None for name in found}
        self._store = Store(path, worker)
        self._changed = False

    def check(self, name: str) -> None:
        """Raises UsageError for what is no name, RefusedError (`name_taken`)."""
        if not _SYNTAX.fullmatch(name) or name in _KEYWORDS:
            raise UsageError(
                f"{name!r} is no name for a bookmark.",
                "Use a letter or _, then up to 63 letters, digits, dots, _ or -; not now, seq or barrier.",
            )
        if name.startswith(_RESERVED_PREFIX):
            raise UsageError(f"Names that begin with {_RESERVED_PREFIX} belong to rollbacks.", "Choose another.")
        if name in self._names:
            raise RefusedError(f"There is a bookmark {name} already.", "Choose another name.", code="name_taken")

    def add(self, name: str) -> None:
        """The name is in the journal now."""
        self._names[name] = None
        self._changed = True
        if len(self._names) > MAX_NAMES:
            del self._names[next(iter(self._names))]

    def save(self, done: Saved) -> None:
        """`done(error)` is called when every name that was added is durable."""
        if not self._changed:
            return done(None)
        self._changed = False

        def saved(error: BaseException | None) -> None:
            if error is not None:
                self._changed = True
                log.error("The names of bookmarks cannot be saved: %s", error)
            done(error)

        self._store.save(self.content(), saved)

    def content(self) -> dict[str, object]:
        return {"version": VERSION, "names": list(self._names)}
