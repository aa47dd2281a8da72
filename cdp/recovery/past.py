"""The past as NBD exports: `db` and `db@POINT` of every replicated volume.

A name's point is resolved once, when the export is opened, and stays that point for the connection's life. Writes go
to a private overlay that goes with the connection, so an export does not advertise MULTI_CONN. Open points keep their
history from retention up to a limit; beyond it a point that leaves the window answers EIO, never other bytes.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Protocol

from cdp import storage
from cdp.errors import CdpError, NotFoundError, RefusedError
from cdp.nbd import wire
from cdp.nbd.contract import Export, Request
from cdp.recovery.overlay import BaseView, Overlay, OverlayBudget
from cdp.recovery.points import GapLike, PointLike, Resolved, TimelineLike, resolve

if TYPE_CHECKING:
    from cdp.nbd.connection import Connection

log = logging.getLogger(__name__)

CHANGED = "cdp:changed"
# A LIST reply for a person or a menu: beyond some hundred names it is `cdp points` that helps.
MAX_LISTED = 1000


class ViewLike(BaseView, Protocol):
    """A volume at a point (`cdp.history.view.View`)."""

    def changed(self, offset: int, length: int, /) -> Sequence[tuple[int, int]]: ...
    def close(self) -> None: ...


class PinLike(Protocol):
    """Holds the history of a seq."""

    def release(self) -> None: ...


class PastTimeline(TimelineLike, Protocol):
    """A timeline that can also be listed."""

    def bookmarks(self) -> Sequence[tuple[str, PointLike]]: ...
    def volumes(self) -> dict[str, int]: ...


class Source(Protocol):
    """The replayer of one volume's group."""

    @property
    def timeline(self) -> PastTimeline: ...
    def open_view(self, volume: str, seq: int, /) -> ViewLike: ...
    def pin(self, seq: int, /) -> PinLike: ...


@dataclass(frozen=True)
class PastLimits:
    """Bounds of the process that serves the past."""

    # Each pinned point may hold a window's worth of disk for as long as its client stays: some dozen VMs and tools,
    # and fewer than a group has pins, so that rollbacks find one.
    pinned_points: int = 48


class Past:
    """The replayer's `Exports`."""

    def __init__(
        self,
        sources: dict[str, Source],
        scratch_folder: str,
        limits: PastLimits | None = None,
        overlays: OverlayBudget | None = None,
        now_ns: Callable[[], int] = storage.wall_ns,
    ) -> None:
        self._sources = sources
        self._scratch_folder = scratch_folder
        self._pins_left = (limits or PastLimits()).pinned_points
        self._overlays = overlays or OverlayBudget()
        self._now_ns = now_ns

    def names(self) -> Iterable[tuple[str, str]]:
        """The volumes, then their bookmarks, newest first, as far as MAX_LISTED reaches."""
        listed = [(name, "newest replayed state") for name in sorted(self._sources)]
        for volume in sorted(self._sources):
            with contextlib.suppress(CdpError):  # a group whose history is not open still has its name
                listed += self._bookmarks(volume, MAX_LISTED - len(listed))
        return listed

    def _bookmarks(self, volume: str, limit: int) -> list[tuple[str, str]]:
        timeline = self._sources[volume].timeline
        number = timeline.volumes().get(volume)
        if number is None:
            return []
        gaps = list(timeline.gaps(number))
        newest_first = reversed(timeline.bookmarks())
        offered = ((name, point.seq) for name, point in newest_first if not _withheld(point.seq, gaps))
        return [(f"{volume}@{name}", f"bookmark at seq {seq}") for name, seq in islice(offered, max(limit, 0))]

    def open(self, name: str, peer: str) -> PastExport:
        """The volume at the point that the name says now. Raises CdpError with the reason for the client."""
        volume, at, text = name.partition("@")
        source = self._sources.get(volume)
        if source is None:
            raise NotFoundError(f"There is no volume {volume!r} here.", "NBD LIST names those there are.")
        point = self.resolve(volume, text if at else "now")
        size = source.timeline.size_at(source.timeline.volumes()[volume], point.seq)
        if size is None:
            raise RefusedError(f"The volume {volume!r} did not exist at seq {point.seq}.", code="outside_window")
        return PastExport(self, source, volume, point, size)

    def resolve(self, volume: str, text: str) -> Resolved:
        """The point that an export's name means now: a time in it must carry its zone."""
        timeline = self._sources[volume].timeline
        number = timeline.volumes().get(volume)
        if number is None:
            raise RefusedError(f"Nothing of volume {volume!r} has been replayed yet.", "Try again in a moment.",
                               code="outside_window")  # fmt: skip
        return resolve(text, timeline, number, self._now_ns(), None)

    def pin(self, source: Source, seq: int) -> PinLike | None:
        """Keeps the point's history while a pin is left."""
        if self._pins_left < 1:
            return None
        try:
            pin = source.pin(seq)
        except RefusedError:  # others hold them all
            return None
        self._pins_left -= 1
        return pin

    def unpin(self, pin: PinLike) -> None:
        pin.release()
        self._pins_left += 1

    def overlay(self, view: ViewLike, size: int) -> Overlay:
        """Room for the private writes of one connection. Raises OSError(ENOSPC)."""
        return Overlay(view, size, self._scratch_folder, self._overlays)


def _withheld(seq: int, gaps: Sequence[GapLike]) -> bool:
    return any(gap.from_seq <= seq and (gap.to_seq is None or seq < gap.to_seq) for gap in gaps)


class PastExport(Export):
    """A volume at one point for one connection: reads from the view, writes into an overlay made at the first."""

    contexts = (wire.BASE_ALLOCATION, CHANGED)
    multi_conn = False

    def __init__(self, past: Past, source: Source, volume: str, point: Resolved, size: int) -> None:
        self.size, self.point, self.volume = size, point, volume
        self._past = past
        self._pin = past.pin(source, point.seq)
        try:
            self._view = source.open_view(volume, point.seq)
        except (CdpError, OSError):
            self._unpin()
            raise
        self._below: BaseView = self._view  # what reads see: the view, later the overlay
        self._overlay: Overlay | None = None
        self._closed = self._refused = False

    def submit(self, connection: Connection, requests: list[Request]) -> None:
        read_into = self._below.read_into
        for request in requests:
            command, _, cookie, offset, length, _ = request
            if command != wire.READ:
                self._other(connection, request)
                read_into = self._below.read_into
                continue
            slot = connection.slot(cookie, offset, length)
            try:
                read_into(offset, slot)
            except OSError as e:
                connection.unslot()
                self._refuse(connection, cookie, e)

    def _other(self, connection: Connection, request: Request) -> None:
        """Everything but a READ. FLUSH and FUA have nothing to wait for: the writes end with the connection."""
        command, _, cookie, offset, length, data = request
        try:
            if command == wire.BLOCK_STATUS:
                self._status(connection, cookie, offset, length)
                return
            if command == wire.WRITE and data is not None:
                self._writable().write(offset, data)
            elif command in (wire.WRITE_ZEROES, wire.TRIM):
                self._writable().zero(offset, length)
            connection.done(cookie)
        except OSError as e:
            self._refuse(connection, cookie, e)

    def _refuse(self, connection: Connection, cookie: bytes, error: OSError) -> None:
        """The reason goes to the client, and the first of a connection into the log."""
        text = error.strerror or str(error)
        if not self._refused:
            self._refused = True
            log.warning("%s: %s at seq %d: %s", connection.peer, self.volume, self.point.seq, text)
        connection.fail(cookie, error.errno or errno.EIO, text)

    def _writable(self) -> Overlay:
        if self._overlay is None:
            self._overlay = self._past.overlay(self._view, self.size)
            self._below = self._overlay
        return self._overlay

    def _status(self, connection: Connection, cookie: bytes, offset: int, length: int) -> None:
        """Every agreed context. `cdp:changed` speaks of the point itself, not of private writes over it."""
        answers = []
        for context in connection.contexts:
            extents = self._view.changed if context == CHANGED else self._below.allocation
            answers.append((context, list(extents(offset, length))))
        for context, found in answers:
            connection.extents(cookie, context, found)

    def opened(self, connection: Connection) -> None:
        return None

    def closed(self, connection: Connection) -> None:
        """Private writes are gone, the history may go."""
        if self._closed:
            return
        self._closed = True
        if self._overlay is not None:
            self._overlay.close()
        self._view.close()
        self._unpin()

    def _unpin(self) -> None:
        if self._pin is not None:
            self._past.unpin(self._pin)
            self._pin = None
