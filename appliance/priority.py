"""Production first: what is behind the journal gets its turn after the collector."""

from __future__ import annotations

import ctypes
import logging
import os
import platform

# Above the default of 0, so the collector gets its turn first; not 19: a replayer that starves only falls behind.
NICE = 5
# ioprio_set(2): best effort, the lowest level in it (idle would never get a turn on a busy disk).
_IOPRIO_WHO_PROCESS, _IOPRIO_BEST_EFFORT_LOWEST = 1, (2 << 13) | 7
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}.get(platform.machine())


def lower_priority() -> None:
    """Of this whole process, before it has threads; a system that refuses is left as it is."""
    try:
        os.nice(NICE)
    except OSError as e:
        logging.getLogger("cdp").warning("the CPU priority stays as it is: %s", e)
    if _IOPRIO_SET is not None:
        ctypes.CDLL(None).syscall(_IOPRIO_SET, _IOPRIO_WHO_PROCESS, 0, _IOPRIO_BEST_EFFORT_LOWEST)
