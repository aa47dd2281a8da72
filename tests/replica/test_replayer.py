"""The replayer's states, refusals and ways out, each over a real journal and history."""

from __future__ import annotations

import errno
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cdp import storage
from cdp.errors import RefusedError
from cdp.journal import batch as fmt
from cdp.journal.batch import Batch
from cdp.journal.reader import EmbeddedReader
from cdp.replica import bundle, restart
from cdp.replica.apply import ApplyThread, Settings
from cdp.replica.pins import MAX_PINS
from tests.replica.faults import killed_at, no_space
from tests.replica.helpers import CONSUMER, SEGMENT_BYTES, WAIT_SECONDS, Feed, Rig, rig

SIZE = 64 * 4096


def wait_state(r: Rig, state: str) -> dict[str, str]:
    """The reason, once the group is in `state`."""
    work: ApplyThread = r.replayer._work
    with work.condition:
        assert work.condition.wait_for(lambda: r.replayer.state == state, WAIT_SECONDS), r.replayer.status()
    why = r.replayer.reason
    assert why is not None
    return why


class Carrier:
    """A carrier that delivers what it is told to, for what no healthy journal does."""

    def __init__(self, real: EmbeddedReader, change: object) -> None:
        self._real, self._change = real, change
        self.acknowledge, self.end, self.fileno = real.acknowledge, real.end, real.fileno
        self.drain, self.close = real.drain, real.close

    def read(self, max_bytes: int) -> list[Batch]:
        return self._change(self._real.read(max_bytes))  # type: ignore[operator, no-any-return]


def behind(r: Rig, change: object) -> None:
    """Restarts the replayer on a carrier that changes what the journal says."""
    r.replayer.stop()
    r.replayer = r._new()
    r.replayer._settings = r.replayer._work._settings = restart_settings(r, change)
    r.replayer.start()


def restart_settings(r: Rig, change: object) -> Settings:
    def reader_of(seq: int) -> Carrier:
        return Carrier(EmbeddedReader(r.feed.folder, CONSUMER, seq), change)

    return replace(r.replayer._settings, reader_of=reader_of)


def test_follows_and_serves_every_point(tmp_path: Path) -> None:
    with rig(tmp_path, {"db": SIZE, "log": 10_000}) as r:
        r.feed.write(1, 0, b"a" * 4096)
        r.feed.write(2, 9_000, b"b" * 1000)
        r.feed.bookmark("first")
        r.feed.flush()
        r.feed.write(1, 100, b"c" * 9000)
        r.feed.zero(1, 0, SIZE)
        r.caught_up()
        assert r.check_every_point() > 6
        figures = r.replayer.figures()
        assert (figures["state"], figures["reason"]) == ("protected", None)
        assert figures["applied_seq"] == r.feed.writer.last_seq
        assert figures["newest"]["seq"] == r.feed.writer.last_seq
        assert json.dumps(figures)


def test_duplicates_are_dropped(tmp_path: Path) -> None:
    """Promise 4: a batch that comes again is dropped, for its incarnation is known."""
    with rig(tmp_path, {"db": SIZE}) as r:
        r.caught_up()
        behind(r, lambda batches: [b for batch in batches for b in (batch, batch)])
        for i in range(5):
            r.feed.write(1, i * 5000, b"x" * 5000)
            r.feed.flush()
        r.caught_up()
        r.check_every_point()


def test_a_hole_stops_the_group(tmp_path: Path) -> None:
    """Promise 4: seq n+1 after n, else the group stops and says so; what is applied is still served."""
    with rig(tmp_path, {"db": SIZE}) as r:
        r.caught_up()
        gone = r.feed.next_seq
        behind(r, lambda batches: [b for b in batches if b.first_seq != gone])
        r.feed.write(1, 0, b"lost")
        r.feed.flush()
        r.feed.write(1, 0, b"next")
        last = r.feed.flush()
        assert wait_state(r, "stopped")["code"] == "hole"
        with pytest.raises(RefusedError, match="ended"):
            r.replayer.wait_applied(last, WAIT_SECONDS)
        assert r.read("db", gone - 1) == bytes(SIZE)


def test_another_history_is_forked_and_a_reset_is_the_way_out(tmp_path: Path) -> None:
    """Promise 4: the journal of another history is not applied. After a reset the replica's file goes on, and points
    begin at the end of the resync."""
    with rig(tmp_path, {"db": SIZE}) as r:
        r.feed.write(1, 0, b"old" * 2000)
        r.caught_up()
        r.replayer.stop()
        r.feed.close()
        os.rename(r.feed.folder, r.feed.folder + ".lost")
        r.feed = Feed(Path(r.feed.folder), group_id=b"N" * 16)
        r.feed.volume(1, "db", SIZE)
        for _ in range(4):
            r.feed.gap(1, opens=True)
            r.feed.flush()
        r.start()
        assert wait_state(r, "forked")["code"] == "forked"
        before = r.replica("db")
        assert before.startswith(b"oldold")
        r.replayer.reset_history()
        r.caught_up()
        assert r.replica("db") == before
        assert r.replayer.state == "resyncing"
        with pytest.raises(RefusedError):
            r.replayer.open_view("db", 1)
        for at in range(0, SIZE, 16384):
            seq = r.feed.record(fmt.SYNC, 1, at, 16384, b"s" * 16384)
            r.feed._set(seq, 1, at, b"s" * 16384)
        end = r.feed.gap(1, opens=False)
        r.feed.write(1, 50, b"new")
        r.caught_up()
        assert r.replayer.state == "protected"
        for seq in (end, end + 1):
            assert r.read("db", seq) == r.feed.model[seq][1]
        r.replayer.stop()
        r.start()
        assert r.read("db", end) == r.feed.model[end][1]


def test_an_older_incarnation_is_refused(tmp_path: Path) -> None:
    """Promise 4: fenced."""
    with rig(tmp_path, {"db": SIZE}) as r:
        r.caught_up()

        def older(batches: list[Batch]) -> list[Batch]:
            for b in batches:
                b.epoch = 0
            return batches

        behind(r, older)
        r.feed.write(1, 0, b"late")
        r.feed.flush()
        assert wait_state(r, "stopped")["code"] == "fenced"


@pytest.mark.parametrize(("call", "where"), [("pwritev", "undo"), ("pwritev", "replica/db.raw")])
def test_no_space_is_waited_for_without_damage(tmp_path: Path, call: str, where: str) -> None:
    with rig(tmp_path, {"db": SIZE}) as r:
        r.caught_up()
        with no_space(call, where) as met:
            r.feed.write(1, 0, b"first" * 900)
            r.feed.write(1, 8192, b"y" * 4096)
            last = r.feed.flush()
            assert met.wait(WAIT_SECONDS)
            assert wait_state(r, "stopped")["code"] == "no_space"
            assert r.replayer.applied.seq < last
            assert r.read("db", last - 2) == r.feed.model[last - 2][1]
        r.caught_up()
        assert r.replayer.state == "protected"
        r.check_every_point()


def test_a_failed_sync_is_final(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 5: after a sync that failed nothing is applied; a restart goes on from the committed seq."""
    with rig(tmp_path, {"db": SIZE}) as r:
        r.caught_up()
        real = storage.fdatasync

        def fail(fd: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(storage, "fdatasync", fail)
        r.feed.writer.append(fmt.DESCRIPTOR.pack(fmt.WRITE, 0, 1, 4, 0, 4), [b"lost"], 4)
        monkeypatch.setattr(storage, "fdatasync", real)
        token = r.feed.writer.begin_sync()
        assert token is not None
        r.feed.writer.sync(token)
        r.feed.writer.end_sync(token)
        monkeypatch.setattr(storage, "fdatasync", fail)
        r.feed.writer.publish(r.feed.writer.last_seq)
        assert wait_state(r, "stopped")["code"] == "storage"
        assert not any(r.replica("db"))
        monkeypatch.setattr(storage, "fdatasync", real)
        r.replayer.stop()
        r.start()
        assert r.replayer.wait_applied(r.feed.writer.last_seq, WAIT_SECONDS)
        assert r.replica("db").startswith(b"lost")


def test_a_dying_thread_is_noticed(tmp_path: Path) -> None:
    with rig(tmp_path, {"db": SIZE}) as r:
        r.caught_up()
        with killed_at(1, half_done=False):
            r.feed.write(1, 0, b"x")
            last = r.feed.flush()
            with pytest.raises(RefusedError, match="ended"):
                r.replayer.wait_applied(last, WAIT_SECONDS)
            assert wait_state(r, "stopped")["code"] == "internal"


def test_states_follow_gaps_and_rollbacks(tmp_path: Path) -> None:
    with rig(tmp_path, {"db": SIZE, "log": SIZE}) as r:
        r.feed.gap(1, opens=True, code="initial_sync")
        assert r.caught_up().state == "syncing"
        assert r.replayer.figures()["volumes"]["log"]["state"] == "protected"
        r.feed.gap(1, opens=False)
        r.feed.gap(2, opens=True)
        assert r.caught_up().state == "resyncing"
        r.feed.gap(2, opens=False)
        plan = json.dumps({"volumes": [1], "target_seq": 1, "target_time_ns": 1, "bookmark": "x"}).encode()
        r.feed.record(fmt.ROLLBACK_BEGIN, 1, data=plan)
        assert r.caught_up().state == "rolling_back"
        r.replayer.stop()
        assert r.start().state == "rolling_back"
        r.feed.record(fmt.ROLLBACK_END, 1, data=json.dumps({"begin": 1, "volumes": [1]}).encode())
        assert r.caught_up().state == "protected"


def test_verify_finds_what_differs_and_forgets_it_when_it_is_equal_again(tmp_path: Path) -> None:
    with rig(tmp_path, {"db": SIZE}) as r:
        r.feed.write(1, 5000, b"v" * 30_000)
        first = r.feed.verify(1, 0, SIZE)
        wrong = r.feed.verify(1, 4096, 8192, b"something else")
        r.feed.record(fmt.VERIFY, 1, 40_960, 8192, b"", fmt.ZEROS)
        r.feed.record(fmt.VERIFY, 1, 8192, 4096, b"", fmt.ZEROS)
        last = r.feed.flush()
        r.caught_up()
        assert r.replayer.verify_result("db", first, first) == []
        assert r.replayer.verify_result("db", first, last) == [(4096, 8192), (8192, 4096)]
        assert r.replayer.verify_result("db", wrong + 3, last) == []
        assert r.replayer.state == "stopped"
        assert (r.replayer.reason or {})["code"] == "unequal"
        r.feed.verify(1, 0, SIZE)
        assert r.caught_up().state == "protected"
        r.feed.verify(1, 0, 4096, b"wrong again")
        assert r.caught_up().state == "stopped"
        r.feed.gap(1, opens=True)
        r.feed.gap(1, opens=False)
        assert r.caught_up().state == "protected"
        r.feed.gap(1, opens=True)
        r.feed.gap(1, opens=False)
        r.feed.verify(1, 0, 4096, b"wrong behind the resync")
        assert r.caught_up().state == "stopped"


def test_batches_beyond_a_bundle_are_served_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "BUNDLE_BLOCKS", 5)
    with rig(tmp_path, {"db": SIZE}) as r:
        for i in range(4):
            r.feed.write(1, 1000, bytes([i]) * (SIZE - 3000))
            r.feed.write(1, i * 8192, b"w" * 4096)
            r.feed.zero(1, 777, SIZE - 1000)
            r.feed.write(1, i * 8192, b"u" * 12)
            r.feed.flush()
        r.caught_up()
        r.check_every_point()


def test_a_trim_of_a_huge_sparse_volume_is_quick_and_small(tmp_path: Path) -> None:
    """A TRIM costs history by the data that it discards, never by its length."""
    feed = Feed(tmp_path / "journal", modelled=False)
    feed.volume(1, "db", 1 << 40)
    for place in (0, 1 << 39, (1 << 40) - 4096):
        feed.write(1, place, os.urandom(4096))
    r = Rig(tmp_path / "replayer", feed, ["db"])
    r.start()
    r.caught_up()
    before, data = r.replayer.history.bytes, r.read("db", feed.writer.last_seq, 1 << 39, 4096)
    feed.zero(1, 0, 1 << 40)
    began = time.monotonic()
    r.caught_up()
    assert time.monotonic() - began < 5
    assert r.replayer.history.bytes - before < 1 << 20
    assert r.read("db", feed.writer.last_seq, 1 << 39, 4096) == bytes(4096)
    assert r.read("db", feed.writer.last_seq - 1, 1 << 39, 4096) == data
    r.replayer.stop()
    feed.close()


def test_retention_never_changes_a_point(tmp_path: Path) -> None:
    """Promise 6: inside the window the bytes are the same; outside it is refused."""
    with rig(tmp_path, {"db": SIZE}, segment_bytes=256 << 10, window_bytes=1 << 20) as r:
        for i in range(40):
            r.feed.write(1, (i % 8) * 32768, os.urandom(32768))
            r.caught_up()  # each a bundle of its own: all in one would be the newest segment, which stays
        work = r.replayer._work
        with work.condition:
            assert work.condition.wait_for(lambda: r.replayer.history.oldest_seq > 1, WAIT_SECONDS)
        r.feed.write(1, 0, b"one more")
        r.caught_up()
        oldest = r.replayer.history.oldest_seq
        assert oldest > 1
        r.check_every_point()
        with pytest.raises(RefusedError, match="window"):
            r.replayer.open_view("db", 1)


def test_check_is_refused_while_the_replayer_runs_and_leaves_a_usable_replica(tmp_path: Path) -> None:
    with rig(tmp_path / "replayer" / "groups" / "g", {"db": SIZE}) as r:
        r.feed.write(1, 0, b"abc")
        r.caught_up()
        r.replayer.stop()
        home = str(tmp_path / "home")
        os.makedirs(f"{home}/groups")
        os.rename(r.folder, f"{home}/groups/g")
        held = storage.lock_file(f"{home}/lock", 0, "test")
        with pytest.raises(RefusedError):
            restart.check(home, SEGMENT_BYTES)
        os.close(held)
        found = restart.check(home, SEGMENT_BYTES)
        assert found["g"]["committed_seq"] == r.feed.writer.last_seq
        assert Path(f"{home}/groups/g/replica/db.raw").read_bytes() == r.feed.model[r.feed.writer.last_seq][1]


def test_pins_are_bounded_and_named(tmp_path: Path) -> None:
    with rig(tmp_path, {"db": SIZE}) as r:
        held = [r.replayer.pin(1, "export") for _ in range(MAX_PINS)]
        with pytest.raises(RefusedError, match="export"):
            r.replayer.pin(1)
        held[0].release()
        with r.replayer.pin(1, "rollback"):
            assert len(r.replayer.pins.seqs()) == MAX_PINS
