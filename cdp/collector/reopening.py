"""A journal that failed goes on in a new segment, to which what is not durable is written again (promise 3)."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

from cdp import storage
from cdp.errors import StorageError

if TYPE_CHECKING:
    from cdp.collector.group import Group

log = logging.getLogger(__name__)


class Reopening:
    """Of one group. Owned by the loop's thread; `under_way`: a thread is writing the new segment."""

    def __init__(self, group: Group, worker: storage.Worker) -> None:
        self._group, self._worker = group, worker
        self.under_way = False

    def after_failed_sync(self, token: Any, error: BaseException) -> bool:
        """At once, because flushes wait for it; blocks. True: all that was appended is durable."""
        group = self._group
        with contextlib.suppress(OSError):
            group.journal.end_sync(token, error)
        try:
            group.journal.reopen_after_failure()
        except (OSError, StorageError) as e:
            group.journal_died(e)
            return False
        log.error("group %s: a sync of the journal failed (%s); it goes on in a new segment", group.name, error)
        group.journal_dead = False
        return True

    def attempt(self) -> None:
        """One attempt, written by a thread: a disk that fails may take long over it. Then the group goes on."""
        group = self._group
        if self.under_way or group.journal.syncing:
            return
        self.under_way = True

        def rewritten(result: Any, error: BaseException | None) -> None:
            self.under_way = False
            try:
                if error is not None:
                    raise error
                group.journal.adopt(result)
            except (OSError, StorageError) as e:
                return group.journal_died(e)
            log.error("group %s: the journal goes on in a new segment", group.name)
            group.journal_dead = False
            group.append_again()

        self._worker.submit(rewritten, group.journal.rewrite)
