"""The process of one rollback job (`python -m appliance.rollback_child`), under the replayer's parent.

It talks NBD to both servers and HTTP to both parents; its file says how far it came, so it can be killed anywhere.
"""

from __future__ import annotations

import dataclasses
import logging
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from appliance import paths
from appliance.client import Client
from appliance.control import Channel
from appliance.reaching import Reach
from cdp.errors import CdpError, StorageError
from cdp.recovery.job import ABANDON, UNDO, Job
from cdp.recovery.rollback import Progress, Rollback, Stopped

STOPPED = 75  # sysexits.h EX_TEMPFAIL: it goes on in the next process
# The process before this one may be about to end.
LOCK_SECONDS = 10.0
# People look at progress; the copy must not wait for their screens.
PROGRESS_SECONDS = 0.1


def run(settings: dict[str, Any], progress: Callable[[Progress], None], on_made: Callable[[Rollback], None]) -> Job:
    """Goes on with the job at `settings["path"]`, in its direction or the one asked for. Raises CdpError, Stopped."""
    reach = Reach(**settings["reach"])
    rollback = Rollback(
        settings["path"], None, Client(reach), reach.nbd(paths.COLLECTOR), reach.nbd(paths.REPLAYER), progress,
        lock_seconds=LOCK_SECONDS,
    )  # fmt: skip
    on_made(rollback)
    try:
        act = {UNDO: rollback.undo, ABANDON: rollback.abandon}.get(settings["direction"], rollback.run)
        return act()
    finally:
        rollback.close()


def main() -> int:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = Channel.from_environment()
    try:
        run(channel.settings(), _reporter(channel), _stop_on_sigterm)
    except Stopped:
        return STOPPED
    except CdpError as e:
        channel.fatal(e)
        return e.exit_code
    except Exception as e:  # a bug: it must not be tried for ever
        logging.getLogger("cdp").error("%s", traceback.format_exc())
        channel.fatal(StorageError(f"The rollback ended by an unexpected error: {e!r}.", "See the replayer's log."))
        return StorageError.exit_code
    finally:
        channel.close()
    return 0


def _stop_on_sigterm(rollback: Rollback) -> None:
    signal.signal(signal.SIGTERM, lambda *_: rollback.stop())


def _reporter(channel: Channel) -> Callable[[Progress], None]:
    last_at, last_step = 0.0, ""

    def report(progress: Progress) -> None:
        nonlocal last_at, last_step
        now = time.monotonic()
        if now - last_at >= PROGRESS_SECONDS or progress.step != last_step:
            last_at, last_step = now, progress.step
            channel.send({"progress": dataclasses.asdict(progress)})

    return report


if __name__ == "__main__":
    sys.exit(main())
