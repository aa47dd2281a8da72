"""Real servers for the tests of this room: a replayer's past, or any exports, behind a loop in a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cdp.nbd.contract import Exports
from cdp.nbd.loop import Loop
from cdp.recovery.past import Past
from cdp.replica.replayer import Replayer
from tests.replica.helpers import Rig, rig

END_SECONDS = 10.0


class ReplayerSource:
    """A replayer as the past's exports want it."""

    def __init__(self, made: Rig) -> None:
        self._rig = made

    @property
    def _replayer(self) -> Replayer:
        return self._rig.replayer  # a later life is another object

    @property
    def timeline(self):
        return self._replayer.history.timeline

    def open_view(self, volume: str, seq: int):
        return self._replayer.open_view(volume, seq)

    def pin(self, seq: int):
        return self._replayer.pin(seq)


@contextmanager
def serving(exports: Exports, socket: Path) -> Iterator[str]:
    """The address of a running server."""
    loop = Loop(exports)
    address = loop.listen(f"unix:{socket}")
    thread = threading.Thread(target=loop.run, name=f"serve {socket.name}")
    thread.start()
    try:
        yield address
    finally:
        loop.stop()
        thread.join(END_SECONDS)
        assert not thread.is_alive()


def past_of(made: Rig, scratch: Path, **limits) -> Past:
    return Past({name: ReplayerSource(made) for name in made.volumes}, str(scratch), **limits)


@contextmanager
def past(folder: Path, volumes: dict[str, int], **settings) -> Iterator[tuple[Rig, str]]:
    """A journal, its replayer, and the address at which its past is served."""
    with rig(folder, volumes, **settings) as made:
        made.caught_up()
        with serving(past_of(made, folder / "scratch"), folder / "past.sock") as address:
            yield made, address
