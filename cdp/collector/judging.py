"""Whether a primary is the one that was left, and nobody wrote it since; and what must be compared after a power cut.

After a clean stop its mtime is the recorded one, after a kill it is at most 2 s past the last batch's wall time.
"""

from __future__ import annotations

import errno
import logging
from dataclasses import dataclass, field

from cdp import storage
from cdp.collector.group import Group
from cdp.collector.resync import UNCLEAN_RESTART
from cdp.collector.state import Checkpoint, boot_id
from cdp.collector.volume import Reason, Volume
from cdp.journal import batch

log = logging.getLogger(__name__)

# A write reaches the primary at most this long after its batch: file systems stamp coarsely, disks stall.
MTIME_TOLERANCE_NS = 2_000_000_000
# After a kill a device may have taken what the journal says once in the life before, once by the start, which may
# itself have been killed, and once when it was healed; more than that, and this little, was written by somebody else.
REWRITTEN, UNTOLD_BYTES, SECTOR_BYTES = 4, 1 << 20, 512


@dataclass
class Tail:
    """The journal since the checkpoint: wall time of its last batch, pages that each volume's writes lie in."""

    written_ns: int
    pages: dict[int, int] = field(default_factory=dict)


def survey(group: Group, checkpoint: Checkpoint) -> Tail:
    """What the journal says of the time since the checkpoint. Lengths are only asked for after a kill, of devices."""
    found = Tail(checkpoint["wall_ns"])
    devices = not checkpoint["clean"] and any("written_sectors" in v.primary.identity() for v in group.volumes)
    for one in group.journal.batches_after(checkpoint["seq"], header_only=not devices):
        found.written_ns = one.wall_ns
        for record in one.records() if devices else ():
            if record.kind in (batch.WRITE, batch.ZERO, batch.SYNC):
                pages = -(-(record.offset + record.length) // storage.PAGE_BYTES) - record.offset // storage.PAGE_BYTES
                found.pages[record.volume] = found.pages.get(record.volume, 0) + pages
    return found


def set_doubt(volume: Volume, doubt: Reason | None) -> None:
    volume.doubt = volume.reason = doubt
    volume.refuse = 0 if doubt is None else errno.EIO


def judge(volume: Volume, checkpoint: Checkpoint, tail_: Tail, tracked: bool) -> None:
    """Stops the volume when its primary may not be what was left; asks for a comparison after a power cut. `tracked`:
    writes went by the journal, so nothing says when the last one was."""
    left = checkpoint["primaries"].get(volume.name)
    if left is None:
        return  # it is new
    doubt = None if volume.doubt else _doubt(volume, left, checkpoint, tail_, tracked)
    if doubt is not None:
        log.error("volume %s stopped (%s): %s", volume.name, doubt["code"], doubt["text"])
        set_doubt(volume, doubt)
    elif not checkpoint["clean"] and checkpoint["boot_id"] != boot_id() and volume.primary.readable:
        volume.sync = volume.sync or _unclean(volume)


def _unclean(volume: Volume) -> Reason | None:
    """Why a primary is compared after the machine went down; None where nothing was written for long."""
    assert volume.intent is not None  # it can be read
    touched = sum(length for _, length in volume.intent.touched())
    if not touched and volume.intent.known:
        return None
    text = f"The machine went down while it was written; {touched} of its {volume.size} bytes are compared."
    return {"code": UNCLEAN_RESTART, "text": text}


def _doubt(
    volume: Volume, left: dict[str, object], checkpoint: Checkpoint, tail_: Tail, tracked: bool
) -> Reason | None:
    there = volume.primary.identity()
    same_boot = checkpoint["boot_id"] == boot_id()
    advice = f"Say which side is right: `cdp trust {volume.name} primary` or `cdp trust {volume.name} journal`."
    grown = left.get("size") != there.get("size") and volume.size == there.get("size")
    # Device numbers may change with a start of the machine; the size when the volume was made larger.
    skipped = {"mtime_ns", "written_sectors"} | (set() if same_boot else {"dev"}) | ({"size"} if grown else set())
    if {k: v for k, v in left.items() if k not in skipped} != {k: v for k, v in there.items() if k not in skipped}:
        return {"code": "other_primary", "text": f"The primary of {volume.name} is not the one it was. {advice}"}
    if grown or tracked:
        return None  # it is compared
    pages = tail_.pages.get(volume.id, 0)
    if _changed(left, there, checkpoint["clean"], same_boot, tail_.written_ns, pages):
        text = f"The primary of {volume.name} was written while the collector was away. {advice}"
        return {"code": "primary_changed", "text": text}
    return None


def _changed(
    left: dict[str, object], there: dict[str, int | str], clean: bool, same_boot: bool, written_ns: int, pages: int
) -> bool:
    """Whether somebody else wrote the primary, as far as that can be seen."""
    mtime_ns = there.get("mtime_ns")
    if isinstance(mtime_ns, int):
        return mtime_ns != left.get("mtime_ns") if clean else mtime_ns > written_ns + MTIME_TOLERANCE_NS
    before, now = left.get("written_sectors"), there.get("written_sectors")
    if not same_boot or not isinstance(before, int) or not isinstance(now, int) or min(before, now) < 0:
        return False
    if clean:
        return now != before
    return (now - before) * SECTOR_BYTES > pages * storage.PAGE_BYTES * REWRITTEN + UNTOLD_BYTES
