"""`ack = "replicated"` in a real collector; the test stands where the relay does, and says what the topic has."""

from __future__ import annotations

import errno
import select
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cdp.journal.acknowledged import Acknowledged, Mouth
from cdp.journal.position import read_durable
from tests.collector.helpers import Runner
from tests.support.nbd import FLUSH, FUA, WRITE, NbdClient

MIB = 1 << 20
LONG_NS, SHORT_NS = 60 * 10**9, 300 * 10**6
# Long enough for a flush that waits for nobody, many times over.
UNANSWERED_SECONDS = 0.4


class Side:
    """A collector, a client of it, and the relay's mouth."""

    def __init__(self, folder: Path, timeout_ns: int, local: bool) -> None:
        replicated = {"timeout_ns": timeout_ns, "local_after_timeout": local}
        self.runner = Runner(folder, [("db", f"file:{folder}/db.raw", 4 * MIB)])
        self.runner.config["groups"][0].update(replicated=replicated, consumers=["relay"])
        self.runner.start()
        self.client = NbdClient(self.runner.socket, "db")
        self.mouth = Mouth(self.runner.journal)

    def says(self, seq: int, *, fenced: bool = False, epoch: int | None = None) -> None:
        figures = self.runner.figures()
        assert self.mouth.say(Acknowledged(figures["epoch"] if epoch is None else epoch, seq, fenced), again=True)

    @property
    def last_seq(self) -> int:
        return int(self.runner.figures()["journal"]["last_seq"])

    def is_silent(self) -> bool:
        return not select.select([self.client.socket], [], [], UNANSWERED_SECONDS)[0]

    def answer(self, cookie: int) -> int:
        """The errno of the reply to this request, which must be the next."""
        found, error, _ = self.client.receive()
        assert found == cookie
        return error

    def close(self) -> None:
        self.mouth.close()
        self.client.socket.close()
        if self.runner.process is not None:
            self.runner.stop()


Make = Callable[..., Side]


@pytest.fixture
def side(tmp_path: Path) -> Iterator[Make]:
    sides: list[Side] = []

    def make(timeout_ns: int = LONG_NS, local: bool = False) -> Side:
        sides.append(Side(tmp_path, timeout_ns, local))
        return sides[-1]

    yield make
    for made in sides:
        made.close()


@pytest.mark.parametrize("what", ["flush", "fua"])
def test_a_flush_waits_for_the_carrier_and_a_write_does_not(side: Make, what: str) -> None:
    """Promise 3, the part of `ack = "replicated"`."""
    s = side()
    s.client.write(0, b"x" * 4096)
    fua: dict[str, Any] = {"data": b"f" * 4096, "flags": FUA}
    cookie = s.client.send(FLUSH) if what == "flush" else s.client.send(WRITE, 8192, **fua)
    assert s.is_silent()
    needed = s.last_seq
    s.says(needed - 2)
    assert s.is_silent()
    figures = s.runner.figures()
    assert figures["replicated"]["waiting"] == 1 and figures["replicated"]["state"] == "replicated"
    s.says(s.last_seq)
    assert s.answer(cookie) == 0
    s.client.write(4096, b"y" * 4096)
    assert s.client.read(4096, 4096) == b"y" * 4096


def test_what_another_incarnation_carried_answers_nothing(side: Make) -> None:
    """Promise 3: nor does a seq that this journal does not have yet."""
    s = side()
    s.client.write(0, b"x" * 4096)
    cookie = s.client.send(FLUSH)
    s.says(s.last_seq, epoch=99)
    s.says(s.last_seq, epoch=0)
    s.says(10**12)
    assert s.is_silent()
    s.says(s.last_seq)
    assert s.answer(cookie) == 0


def test_readers_hear_at_once_of_what_a_flush_waits_for(side: Make) -> None:
    """The relay cannot carry what it has not been told of."""
    s = side()
    s.client.write(0, b"x" * 4096)
    cookie = s.client.send(FLUSH)
    needed = s.last_seq - 1
    figures = s.runner.wait_for("published", lambda _: (read_durable(s.runner.journal) or (0, 0))[1] >= needed)
    s.says(figures["journal"]["last_seq"])
    assert s.answer(cookie) == 0


def test_a_carrier_that_is_late_fails_flushes_and_says_so(side: Make) -> None:
    """Promises 3 and 8."""
    s = side(SHORT_NS)
    s.client.write(0, b"x" * 4096)
    assert s.answer(s.client.send(FLUSH)) == errno.EIO
    figures = s.runner.figures()
    assert figures["replicated"]["state"] == "late" and figures["state"] == "protected"
    assert figures["reason"]["code"] == "not_replicated" and "refused" in figures["reason"]["text"]
    assert s.answer(s.client.send(FLUSH)) == errno.EIO
    s.says(s.last_seq)
    s.runner.wait_for("caught up", lambda f: f["replicated"]["state"] == "replicated" and f["reason"] is None)


def test_a_carrier_that_is_late_may_be_done_without(side: Make) -> None:
    """If so configured: the first flush waits, those behind it do not, until the carrier has caught up."""
    s = side(SHORT_NS, local=True)
    s.client.write(0, b"x" * 4096)
    assert s.answer(s.client.send(FLUSH)) == 0
    figures = s.runner.figures()
    assert figures["replicated"]["state"] == "local" and "here alone" in figures["reason"]["text"]
    for _ in range(50):
        s.client.flush()
    s.says(s.last_seq)
    s.runner.wait_for("caught up", lambda f: f["replicated"]["state"] == "replicated" and f["reason"] is None)
    s.client.write(0, b"z" * 4096)
    cookie = s.client.send(FLUSH)
    assert not select.select([s.client.socket], [], [], SHORT_NS / 1e9 / 3)[0]
    s.says(s.last_seq)
    assert s.answer(cookie) == 0


def test_a_carrier_behind_a_steady_load_is_waited_for_again(side: Make) -> None:
    """It never has everything, but it has what there was a second ago."""
    s = side(SHORT_NS, local=True)
    s.client.write(0, b"x" * 4096)
    assert s.answer(s.client.send(FLUSH)) == 0

    def keeps_up(figures: dict[str, dict[str, object]]) -> bool:
        s.client.flush()  # never acknowledged when the relay speaks
        s.says(int(str(figures["journal"]["last_seq"])))
        return figures["replicated"]["state"] != "local"

    s.runner.wait_for("waited for again", keeps_up)


def test_a_fenced_collector_takes_no_more_writes(side: Make) -> None:
    """Promise 4: flushes in flight are never acknowledged; and it goes on when the topic is its own again."""
    s = side()
    s.client.write(0, b"x" * 4096)
    cookie = s.client.send(FLUSH)
    assert s.is_silent()
    s.says(0, fenced=True)
    assert s.answer(cookie) == errno.EIO
    figures = s.runner.wait_for("stopped", lambda f: f["state"] == "stopped")
    assert figures["reason"]["code"] == "fenced" and figures["replicated"]["state"] == "fenced"
    assert s.answer(s.client.send(WRITE, 0, data=b"n" * 4096)) == errno.EIO
    assert s.answer(s.client.send(FLUSH)) == errno.EIO
    assert s.client.read(0, 4096) == b"x" * 4096
    assert s.runner.wait_for("still", lambda f: f["epoch"] == 1)["state"] == "stopped"
    s.says(s.last_seq)
    s.runner.wait_for("goes on", lambda f: f["state"] == "protected" and f["reason"] is None)
    s.client.write(0, b"m" * 4096)


def test_a_local_group_does_not_listen(tmp_path: Path) -> None:
    """Promise 10: whatever a relay says, nothing of `ack = "local"` waits for it or is stopped by it."""
    with Runner(tmp_path, [("db", f"file:{tmp_path}/db.raw", MIB)]) as runner:
        mouth = Mouth(runner.journal)
        assert mouth.say(Acknowledged(1, 0, True))
        client = NbdClient(runner.socket, "db")
        client.write(0, b"x" * 512)
        client.flush()
        assert runner.figures()["replicated"] is None
        client.socket.close()
        mouth.close()


def test_a_stop_with_a_flush_that_waits_is_clean(side: Make) -> None:
    s = side()
    s.client.write(0, b"x" * 4096)
    s.client.send(FLUSH)
    assert s.is_silent()
    assert s.runner.stop() == 0
    s.runner.start()
    assert s.runner.figures()["state"] == "protected"
