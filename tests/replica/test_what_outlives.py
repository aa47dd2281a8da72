"""What outlives a life of the replayer: views that were open, and the points that an unfinished rollback needs."""

from __future__ import annotations

import errno
import json
import os
from functools import partial
from pathlib import Path
from threading import Thread

import pytest

from cdp.errors import RefusedError
from cdp.history import retention
from cdp.journal import batch as fmt
from tests.replica.helpers import WAIT_SECONDS, rig

SIZE = 64 * 4096


def test_a_view_of_a_history_that_was_reset_reads_nothing(tmp_path: Path) -> None:
    """Promise 6: its replica's descriptor may be another file's by then, or the same file with newer bytes."""
    with rig(tmp_path, {"db": SIZE}) as r:
        r.feed.write(1, 0, b"a" * 4096)
        first = r.feed.flush()
        r.feed.write(1, 0, b"b" * 4096)
        replayer = r.caught_up()
        views = [replayer.open_view("db", seq) for seq in (first, replayer.applied.seq)]
        replayer.reset_history(replayer.applied.seq)
        r.feed.volume(1, "db", SIZE)
        r.feed.write(1, 0, b"c" * 4096)
        r.caught_up()
        for view in views:
            for call in (partial(view.read_into, 0, memoryview(bytearray(4096))), partial(view.allocation, 0, SIZE)):
                with pytest.raises(OSError, match="closed") as refusal:
                    call()
                assert refusal.value.errno == errno.EIO
            view.close()


def test_the_points_of_an_open_rollback_stay_over_a_restart(tmp_path: Path) -> None:
    """Promise 7: pins end with their process, so the journal's own BEGIN keeps what a rollback goes on with."""
    with rig(tmp_path, {"db": SIZE}, window_bytes=1, segment_bytes=1 << 16) as r:
        held = r.replayer.pin(1)
        for _ in range(40):
            r.feed.write(1, 0, os.urandom(SIZE))
            r.caught_up()  # each in a bundle, and so a segment, of its own: what is read together stays together
        target = r.feed.next_seq - 30
        about = json.dumps({"volumes": [1], "target_seq": target, "target_time_ns": 0, "bookmark": "b"}).encode()
        begin = r.feed.record(fmt.ROLLBACK_BEGIN, 1, data=about)
        replayer = r.caught_up()
        work = replayer._work
        with work.condition:
            assert work.condition.wait_for(lambda: work.committer.position.seq >= begin, WAIT_SECONDS)  # type: ignore[union-attr]
        replayer.stop()
        held.release()
        replayer = r.start()
        for _ in range(4):
            r.feed.write(1, 0, os.urandom(SIZE))
            r.caught_up()
        with replayer._work.condition:
            assert replayer._work.condition.wait_for(lambda: replayer.history.oldest_seq > 1, WAIT_SECONDS)
        assert r.read("db", target) == r.feed.model[target][1]
        end = r.feed.record(fmt.ROLLBACK_END, 1, data=json.dumps({"begin": begin, "volumes": [1]}).encode())
        r.caught_up()
        with replayer._work.condition:
            assert replayer._work.condition.wait_for(lambda: replayer.history.oldest_seq > target, WAIT_SECONDS)
        assert end == r.feed.writer.last_seq
        with pytest.raises(RefusedError, match="left the window") as refused:  # before a rollback begins with it
            replayer.pin(target)
        assert refused.value.code == "expired" and not replayer.pins.seqs()


def test_a_pin_of_a_history_that_was_reset_holds_nothing_of_the_new_one(tmp_path: Path) -> None:
    """Promise 9: a client that stays connected to what is gone must not keep the window open for ever."""
    with rig(tmp_path, {"db": SIZE}, window_bytes=1, segment_bytes=1 << 16) as r:
        held = r.replayer.pin(1)
        behind = r.feed.flush()
        r.caught_up().reset_history(behind)
        r.feed.volume(1, "db", SIZE)
        for _ in range(8):
            r.feed.write(1, 0, os.urandom(SIZE))
            r.caught_up()
        work = r.replayer._work
        with work.condition:
            assert work.condition.wait_for(lambda: r.replayer.history.oldest_seq > behind + 1, WAIT_SECONDS)
        held.release()


def test_a_pin_that_comes_while_it_is_decided_what_goes_is_kept_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 7: nobody is told that a point is pinned which leaves the window in that moment."""
    outcome: list[object] = []

    def pin() -> None:
        try:
            outcome.append(r.replayer.pin(1))
        except RefusedError as e:
            outcome.append(e.code)

    pinning, decide = Thread(target=pin), retention.decide

    def deciding(*arguments: object) -> retention.Decision:
        wanted = decide(*arguments)  # type: ignore[arg-type]
        if wanted.drop and pinning.ident is None:
            pinning.start()
            pinning.join(1.0)  # it ends at once where nothing holds it up
        return wanted

    with rig(tmp_path, {"db": SIZE}, window_bytes=1, segment_bytes=1 << 16) as r:
        monkeypatch.setattr(retention, "decide", deciding)
        for _ in range(8):
            r.feed.write(1, 0, os.urandom(SIZE))
            r.caught_up()
        with r.replayer._work.condition:
            assert r.replayer._work.condition.wait_for(lambda: r.replayer.history.oldest_seq > 1, WAIT_SECONDS)
        pinning.join(WAIT_SECONDS)
        assert outcome == ["expired"]


def test_a_power_cut_may_take_the_growth_of_a_replica_whose_undo_it_left(tmp_path: Path) -> None:
    """Promise 5: the undo of writes beyond the committed size is durable, the file's new length is not."""
    with rig(tmp_path, {"db": SIZE}) as r:
        r.feed.write(1, 0, b"a" * SIZE)
        r.caught_up().stop()
        committed = (tmp_path / "replayer" / "committed").read_bytes()
        r.start()
        r.feed.volume(1, "db", 2 * SIZE)
        r.feed.write(1, SIZE - 4096, b"b" * 12288)
        last = r.feed.flush()
        r.caught_up().stop()
        (tmp_path / "replayer" / "committed").write_bytes(committed)
        os.truncate(tmp_path / "replayer" / "replica" / "db.raw", SIZE)
        replayer = r.start()
        assert replayer.wait_applied(last, WAIT_SECONDS), replayer.reason
        r.check_every_point()
        assert r.replica("db") == r.feed.model[last][1]
