"""The way out of doubt: somebody says which side is right, the primary or the journal.

`journal`: what the journal has since the checkpoint is written onto the primary, as at any start. `primary`: what
is there stays. Either way the whole volume is compared afterwards, so primary, replica and every later point agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from cdp import storage
from cdp.collector import tail
from cdp.collector.state import load_checkpoint
from cdp.collector.volume import Volume
from cdp.errors import CdpError, RefusedError, StorageError, UsageError
from cdp.journal.batch import Batch

if TYPE_CHECKING:
    from cdp.collector.group import Group

# Between batches the loop serves the group's other volumes.
_PAUSE_SECONDS = 0.001


class Trust:
    """One decision. Owned by the loop's thread."""

    def __init__(
        self,
        group: Group,
        volume: Volume,
        side: str,
        worker: storage.Worker,
        done: Callable[[dict[str, Any] | None, CdpError | None], None],
    ) -> None:
        """Raises UsageError, RefusedError."""
        if side not in ("primary", "journal"):
            raise UsageError(f"{side!r} is no side.", "Say primary or journal.")
        if volume.doubt is None or volume.reason is None:
            raise RefusedError(f"Nothing is in doubt about {volume.name}.", code="unsupported")
        if volume.reason["code"] == "deciding":
            raise RefusedError(f"{volume.name} is being put right already.", code="busy")
        if side == "journal" and volume.doubt["code"] == "other_primary":
            raise RefusedError(
                f"The primary of {volume.name} is another one: the journal's end alone cannot make it right.",
                "Trust the primary, then roll back to the newest point before.", code="unsupported",
            )  # fmt: skip
        if group.refuse:
            raise RefusedError(f"The group {group.name} is stopped.", "Give it space first.", code="stopped")
        self._group, self._volume, self._side, self._worker, self._done = group, volume, side, worker, done
        self._doubt = volume.doubt
        self._batches: Iterator[Batch] = iter(())

    def start(self) -> None:
        volume, group = self._volume, self._group
        if self._side == "journal":
            checkpoint = load_checkpoint(f"{group.folder}/checkpoint")
            after_seq = checkpoint["seq"] if checkpoint else 0
            self._batches = group.journal.batches_after(after_seq)
        volume.reason = {"code": "deciding", "text": f"The {self._side} is right; {volume.name} is being put right."}
        self._writer = tail.TailWriter({volume.id: volume}, group.refused)
        self._step()

    def _step(self) -> None:
        try:
            found = next(self._batches, None)
            if found is not None:
                self._writer.apply(found)
        except (StorageError, OSError) as e:
            self._volume.reason = self._doubt
            return self._done(None, StorageError(f"{self._volume.name} could not be put right: {e}."))
        if found is not None:
            self._worker.submit(lambda _, error: self._step(), storage.pause, _PAUSE_SECONDS)
            return
        self._decided()

    def _decided(self) -> None:
        volume, group = self._volume, self._group
        group.settle()
        text = f"The {self._side} was said to be right; the whole volume is compared."
        if not group.start_resync(volume, {"code": "trusted", "text": text}, group.journal.last_seq):
            volume.reason = self._doubt
            return self._done(None, StorageError(f"The group {group.name} is stopped."))
        volume.refuse, volume.reason, volume.doubt = 0, None, None
        group.hold_checkpoint = any(v.doubt for v in group.volumes)
        group.save_state()
        self._done({"volume": volume.name, "side": self._side}, None)
