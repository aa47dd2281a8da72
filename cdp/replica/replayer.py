"""The replayer of one group, as the rest of the process sees it: start, stop, figures, views, pins, waits.

The work is done by its apply thread (`apply.py`). Everything here may be called from any other thread.
"""

from __future__ import annotations

from typing import Any

from cdp.errors import NotFoundError, RefusedError
from cdp.history.history import History
from cdp.history.view import View
from cdp.replica import position as position_file
from cdp.replica import restart
from cdp.replica.apply import ApplyThread, ReaderOf, Settings
from cdp.replica.course import Reason, worst
from cdp.replica.pins import Pin, Pins
from cdp.replica.pipeline import Applied

__all__ = ["Pin", "Replayer"]


class Replayer:
    """See the module."""

    def __init__(
        self,
        folder: str,
        group: str,
        reader_of: ReaderOf,
        *,
        window_ns: int | None,
        window_bytes: int | None,
        segment_bytes: int,
        volumes: list[str],
        compress: bool = True,
    ) -> None:
        """`reader_of(after_seq)` opens the journal; `volumes` are the configured names. Nothing is touched yet."""
        self.folder, self.group, self.volumes = folder, group, list(volumes)
        self._settings = Settings(folder, group, reader_of, window_ns, window_bytes, segment_bytes, compress)
        self.pins = Pins()
        self._work = ApplyThread(self._settings, self.pins)
        self._running = False

    def start(self) -> None:
        """Puts the replica back to its committed seq and starts following. What goes wrong is in `state`."""
        if self._work.failed is not None:
            self._work = ApplyThread(self._settings, self.pins)
        self._running = True
        self._work.start()

    def stop(self) -> None:
        """Applies what was read, commits, and lets go of everything; after a failure it only lets go. Views must be
        closed before. Idempotent."""
        if self._running:
            self._running = False
            self._work.stop()

    def reset_history(self, after_seq: int = 0) -> None:
        """The way out of `forked`, of a hole and of damage: a new, empty history that begins behind `after_seq` of
        whatever journal `reader_of` opens now; the replica files stay as they are. Each volume is `resyncing`, and
        offers no point, until a gap of it ends in that journal. Raises CdpError, OSError; running again when it
        returns.
        """
        self.stop()
        self.pins = Pins()  # those of the old history hold nothing any more
        old = restart.position_before_reset(self.folder, self.volumes)
        position_file.store(self.folder, restart.position_after_reset(old, after_seq))
        self.start()

    @property
    def applied(self) -> Applied:
        """The newest record that can be served."""
        return self._work.applied

    @property
    def history(self) -> History:
        """Raises RefusedError (`stopped`) while it is not open."""
        history = self._work.history
        if history is None:
            _, why = self.status()
            raise RefusedError(f"The history of {self.group} is not open.", (why or {}).get("text", ""), code="stopped")
        return history

    # --- states

    @property
    def state(self) -> str:
        return self.status()[0]

    @property
    def reason(self) -> Reason | None:
        return self.status()[1]

    def status(self) -> tuple[str, Reason | None]:
        """The group's state, the worst of its volumes', and why."""
        return worst([self._volume_status(name) for name in self.volumes])

    def _volume_status(self, name: str) -> tuple[str, Reason | None]:
        work = self._work
        if work.failed is not None:
            return work.failed
        if work.stalled is not None:
            return "stopped", work.stalled
        state, why = work.course.of(name)
        unequal = work.verifier.reason_of(work.course.names.get(name, -1))
        return ("stopped", unequal) if state == "protected" and unequal is not None else (state, why)

    def wait_applied(self, seq: int, timeout_seconds: float) -> bool:
        """Whether `seq` is applied within the time. Raises RefusedError (`stopped`) when replay has ended before."""
        work = self._work
        with work.condition:
            work.condition.wait_for(lambda: work.applied.seq >= seq or work.failed is not None, timeout_seconds)
        if work.applied.seq < seq and work.failed is not None:
            text = f"Seq {seq} of {self.group} is not applied: replay has ended."
            raise RefusedError(text, work.failed[1]["text"], code="stopped")
        return work.applied.seq >= seq

    def verify_result(self, volume: str, first_seq: int, last_seq: int) -> list[tuple[int, int]]:
        """(offset, length) of each region whose VERIFY record in that range of applied seqs did not match."""
        return self._work.verifier.result(self.volume_id(volume), first_seq, last_seq)

    # --- points

    def volume_id(self, volume: str) -> int:
        """Raises NotFoundError."""
        number = self._work.course.names.get(volume)
        if number is None:
            raise NotFoundError(f"Volume {volume} is not in the journal of {self.group} (yet).")
        return number

    def open_view(self, volume: str, seq: int) -> View:
        """The volume as it was at `seq`. Raises NotFoundError, and RefusedError for what is not offered here."""
        work, number, history = self._work, self.volume_id(volume), self.history
        replica = work.replica
        assert replica is not None  # opened with the history
        applied_seq = work.applied.seq
        if seq > applied_seq:
            raise RefusedError(f"Seq {seq} is beyond the newest point, {applied_seq}.", code="beyond_newest")
        if seq < history.oldest_seq:
            raise RefusedError(f"Seq {seq} is before the window, which begins at {history.oldest_seq}.", code="expired")
        if volume in work.course.awaited:
            raise RefusedError(f"{volume} is being resynced: points are offered from its end.", code="in_gap")
        if seq < (whole_from := work.course.whole_from.get(volume, 0)):
            text = f"{volume} was being resynced at seq {seq}: its points begin at {whole_from}."
            raise RefusedError(text, "Choose a younger point.", code="in_gap")
        size = history.timeline.size_at(number, seq)
        if size is None:
            raise RefusedError(f"Volume {volume} did not exist yet at seq {seq}.", code="outside_window")
        return history.view(replica.files[number].fd, number, seq, size, applied_seq)

    def pin(self, seq: int, name: str = "pin") -> Pin:
        """Keeps `seq` inside the window until it is released. Raises RefusedError: `busy` when there are too many,
        `expired` when it has left the window already, `stopped`."""
        pin = self.pins.add(seq, name)
        try:
            oldest_seq = self.history.oldest_seq
            if seq < oldest_seq:
                text = f"Seq {seq} has left the window, which begins at {oldest_seq}."
                raise RefusedError(text, "Choose a younger point.", code="expired")
        except RefusedError:
            pin.release()
            raise
        return pin

    # --- figures

    def figures(self) -> dict[str, Any]:
        """See Control in the contracts. Times in ns."""
        work = self._work
        state, why = self.status()
        applied, committer = work.applied, work.committer
        return {
            "state": state,
            "reason": why,
            "applied_seq": applied.seq,
            "applied_time_ns": applied.time_ns,
            "committed_seq": committer.position.seq if committer is not None else 0,
            "lag_bytes": work.lag.lag_bytes,
            "next_time_ns": self._next_time_ns(applied),
            "window_short": work.window_short,
            **_history_figures(work.history, {number: name for name, number in work.course.names.items()}),
            "volumes": {name: self._volume_figures(name) for name in self.volumes},
        }

    def _next_time_ns(self, applied: Applied) -> int | None:
        """Of the first record that is not applied: exactly when it was read, else no later than it can be."""
        pipeline = self._work.pipeline
        if pipeline is None:
            return None
        known = pipeline.next_time_ns()
        if known is None and self._work.lag.end_seq > applied.seq:
            return applied.time_ns + 1
        return known

    def _volume_figures(self, name: str) -> dict[str, Any]:
        state, why = self._volume_status(name)
        replica, number = self._work.replica, self._work.course.names.get(name, -1)
        file = replica.files.get(number) if replica is not None else None
        path = file.path if file is not None else f"{self.folder}/{restart.REPLICA_FOLDER}/{name}.raw"
        return {"replica": path, "state": state, "reason": why}


def _history_figures(history: History | None, names: dict[int, str]) -> dict[str, Any]:
    if history is None:
        return {"oldest": None, "newest": None, "gaps": [], "history_bytes": 0}
    timeline = history.timeline

    def point(seq: int | None) -> dict[str, int] | None:
        return None if seq is None else {"seq": seq, "time_ns": timeline.time_of(seq)}

    gaps = [
        {
            "volume": names.get(g.volume), "from": point(g.from_seq), "to": point(g.to_seq),
            "reason": {"code": g.code, "text": g.text},
        }
        for g in timeline.gaps(None)
    ]  # fmt: skip
    oldest, newest = timeline.oldest(), timeline.newest()
    return {
        "oldest": point(oldest.seq if oldest else None),
        "newest": point(newest.seq if newest else None),
        "gaps": gaps,
        "history_bytes": history.bytes,
    }
