"""What changed between two points, and points as files; read back by qemu-img."""

from __future__ import annotations

import json
import os
import random
import subprocess

import pytest

from cdp.errors import RefusedError, UsageError
from cdp.nbd import wire
from cdp.nbd.client import Client
from cdp.recovery import diff as differences
from cdp.recovery import export as exports
from cdp.recovery.copying import Copier, measure, near, ranges
from cdp.recovery.diff import diff
from cdp.recovery.export import export
from cdp.recovery.past import CHANGED
from cdp.recovery.points import Resolved, resolve
from tests.conftest import find_peer
from tests.nbd.memory_export import FileExport, OneExport
from tests.recovery.serving import past, serving

MIB = 1 << 20
SIZE = 8 * MIB + 1536  # no whole number of blocks


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Two points with odd writes, zeros and holes between them."""
    chance = random.Random(5)
    with past(tmp_path_factory.mktemp("export"), {"db": SIZE}) as (made, address):
        feed = made.feed
        for _ in range(10):
            feed.write(1, chance.randrange(4 * MIB), chance.randbytes(50_000))
        feed.write(1, MIB, chance.randbytes(2 * MIB))
        first = feed.bookmark("first")
        feed.write(1, SIZE - 700, b"the end" * 100)
        feed.write(1, 6 * MIB, bytes(MIB))
        feed.zero(1, MIB, 2 * MIB)
        feed.write(1, MIB + 5, b"!")
        second = feed.bookmark("second")
        made.caught_up()
        yield made, address, first, second


def point(seq: int) -> Resolved:
    return Resolved(seq, seq * 1000, f"seq:{seq}", "UTC")


# --- diff


def test_a_diff_is_the_same_both_ways_round(served):
    made, _, first, second = served
    history = made.replayer.history
    there = diff(history, 1, SIZE, point(first), point(second))
    back = diff(history, 1, SIZE, point(second), point(first))
    assert there.extents == back.extents
    assert there.extents == [(MIB, 2 * MIB), (6 * MIB, MIB), (8 * MIB, 1536)]
    assert there.bytes == 3 * MIB + 1536
    assert there.to_json()["extents"][0] == {"offset": MIB, "length": 2 * MIB}
    assert back.to_json()["from"]["seq"] == second
    assert diff(history, 1, SIZE, point(first), point(first)).extents == []


def test_more_extents_than_one_answer_carries_are_refused_and_still_measured(served, monkeypatch):
    """Promise 9: a list without an end would be the end of the process that has to carry it."""
    made, _, first, second = served
    history, ends = made.replayer.history, (point(first), point(second))
    assert differences.measure(history, 1, SIZE, *ends) == (3 * MIB + 1536, 3)
    assert differences.measure(history, 1, SIZE, ends[0], ends[0]) == (0, 0)
    monkeypatch.setattr(differences, "MAX_EXTENTS", 2)
    with pytest.raises(RefusedError, match="3 extents differ"):
        diff(history, 1, SIZE, *ends)
    assert differences.measure(history, 1, SIZE, *ends)[1] == 3


def test_near_changes_are_joined():
    assert list(near([], 10)) == []
    assert list(near([(0, 5)], 10)) == [(0, 5)]
    assert list(near([(0, 5), (15, 5), (31, 9)], 10)) == [(0, 20), (31, 9)]


# --- export


class Seen:
    """Notes the progress."""

    def __init__(self, done: list[int]) -> None:
        self._done = done

    def __call__(self, done: int, total: int) -> None:
        assert done <= total
        self._done.append(done)


def test_raw_is_whole_and_sparse(served, tmp_path):
    made, address, first, second = served
    for seq in (first, second):
        output = tmp_path / f"{seq}.raw"
        done: list[int] = []
        assert export(address, f"db@seq:{seq}", str(output), Seen(done)) == SIZE
        assert output.read_bytes() == made.feed.model[seq][1]
        assert output.stat().st_blocks * 512 < 6 * MIB
        assert done == sorted(done) and done[-1] == SIZE
    assert sorted(os.listdir(tmp_path)) == sorted(f"{seq}.raw" for seq in (first, second))


def test_qcow2_is_what_qemu_says_it_is(served, tmp_path):
    made, address, _, second = served
    qemu_img = find_peer("qemu-img")
    output = tmp_path / "out.qcow2"
    seen: list[int] = []
    export(address, "db@second", str(output), Seen(seen))
    told = json.loads(subprocess.check_output([qemu_img, "info", "--output=json", str(output)]))
    # A qcow2 image is a whole number of sectors.
    assert told["format"] == "qcow2" and told["virtual-size"] == SIZE
    subprocess.check_call([qemu_img, "convert", "-O", "raw", str(output), str(tmp_path / "back.raw")])
    assert (tmp_path / "back.raw").read_bytes() == made.feed.model[second][1]
    assert seen and seen[-1] == SIZE


def test_an_existing_file_is_left_alone(served, tmp_path):
    output = tmp_path / "out.raw"
    output.write_text("mine")
    with pytest.raises(RefusedError) as refused:
        export(served[1], "db", str(output))
    assert refused.value.code == "exists" and output.read_text() == "mine"


def test_a_file_that_appears_meanwhile_is_left_alone(served, tmp_path):
    output = tmp_path / "out.raw"

    def interfere(done: int, total: int) -> None:
        output.write_text("mine")

    with pytest.raises(RefusedError) as refused:
        export(served[1], "db", str(output), interfere)
    assert refused.value.code == "exists" and output.read_text() == "mine"
    assert os.listdir(tmp_path) == ["out.raw"]


@pytest.mark.parametrize("name", ["out", "out.vmdk", "raw"])
def test_a_name_must_say_its_format(served, tmp_path, name):
    with pytest.raises(UsageError, match="format"):
        export(served[1], "db", str(tmp_path / name))


def test_qcow2_without_its_tool_is_refused_and_nothing_is_left(served, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RefusedError, match="qemu-img") as refused:
        export(served[1], "db", str(tmp_path / "out.qcow2"))
    assert refused.value.code == "unsupported" and os.listdir(tmp_path) == []


def test_a_refused_point_leaves_nothing(served, tmp_path):
    for name in ("out.raw", "out.qcow2"):
        if name == "out.qcow2":
            find_peer("qemu-img")
        with pytest.raises(RefusedError):
            export(served[1], "db@seq:99999", str(tmp_path / name))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "address, name, uri",
    [
        ("unix:/a b/s", "db@seq:1", "nbd+unix:///db%40seq%3A1?socket=/a%20b/s"),
        ("tcp:[::1]:10810", "db", "nbd://[::1]:10810/db"),
    ],
)
def test_uris(address, name, uri):
    assert exports.nbd_uri(address, name) == uri


# --- copying


@pytest.mark.parametrize("can_zero", [True, False])
def test_what_is_copied_makes_the_other_equal_and_comparing_finds_one_byte(served, tmp_path, can_zero):
    made, address, first, second = served
    target = tmp_path / "target.raw"
    target.write_bytes(made.feed.model[second][1])
    served_file = FileExport(str(target))
    served_file.can_zero = can_zero  # else zeros are written
    with serving(OneExport(served_file), tmp_path / "target.sock") as there:
        with Copier(address, f"db@seq:{first}", there, "x") as copier:
            assert measure(copier.changes) == (3 * MIB + 1536, 3)
            assert list(ranges(copier.changes)) == [(MIB, 2 * MIB), (6 * MIB, MIB), (8 * MIB, 1536)]
            assert copier.compare(lambda done: None)
            durable = list(copier.copy(0, MIB, lambda done: None))
            assert durable == sorted(durable) and durable[-1] == SIZE and len(durable) > 2
            assert copier.unequal == []
            assert copier.compare(lambda done: None) == []
        assert target.read_bytes() == made.feed.model[first][1]
        with Client.connect(there, "x") as client:
            for offset in (2 * MIB, 6 * MIB + 9, SIZE - 1):
                kept = client.read(offset, 1)
                client.write(offset, bytes([kept[0] ^ 1]))
                with Copier(address, f"db@seq:{first}", there, "x") as copier:
                    ((at, length),) = copier.compare(lambda done: None)
                    assert at <= offset < at + length
                client.write(offset, kept)


class Forgetful(FileExport):
    """Says yes to a write and keeps one byte of it as it was."""

    def __init__(self, path: str, lost: int) -> None:
        super().__init__(path)
        self.lost = lost

    def submit(self, connection, requests):
        kept = os.pread(self.fd, 1, self.lost)
        super().submit(connection, requests)
        if any(command in (wire.WRITE, wire.WRITE_ZEROES) for command, *_ in requests):
            os.pwrite(self.fd, kept, self.lost)


@pytest.mark.parametrize("lost", [MIB + 5, 2 * MIB + 77, 7 * MIB - 1])
def test_a_copy_finds_what_the_primary_did_not_keep(served, tmp_path, lost):
    """Promise 7: each piece is proven by what the primary holds after it was written, not by what was sent."""
    made, address, first, second = served
    target = tmp_path / "target.raw"
    old = bytearray(made.feed.model[second][1])
    old[lost] = made.feed.model[first][1][lost] ^ 1
    target.write_bytes(old)
    with (
        serving(OneExport(Forgetful(str(target), lost)), tmp_path / "target.sock") as there,
        Copier(address, f"db@seq:{first}", there, "x") as copier,
    ):
        list(copier.copy(0, MIB, lambda done: None))
        ((at, length),) = copier.unequal
        assert at <= lost < at + length


def test_a_copy_goes_on_at_an_offset(served, tmp_path):
    made, address, first, second = served
    target = tmp_path / "target.raw"
    target.write_bytes(made.feed.model[second][1])
    with (
        serving(OneExport(FileExport(str(target))), tmp_path / "target.sock") as there,
        Copier(address, f"db@seq:{first}", there, "x") as copier,
    ):
        list(copier.copy(2 * MIB, MIB, lambda done: None))
    now, then = made.feed.model[second][1], made.feed.model[first][1]
    assert target.read_bytes() == now[: 2 * MIB] + then[2 * MIB :]


def test_the_real_timeline_resolves_as_the_plain_one(served):
    made, _, first, second = served
    timeline = made.replayer.history.timeline
    for seq in range(1, second + 1):
        asked = resolve(f"seq:{seq}", timeline, 1, 1 << 62, None)
        from cdp.recovery.times import iso_utc

        again = resolve(iso_utc(asked.time_ns), timeline, 1, 1 << 62, None)
        assert (asked.seq, again.seq) == (seq, seq)
    assert resolve("first", timeline, 1, 1 << 62, None).seq == first


def test_contexts_are_agreed_one_by_one(served):
    for contexts in ((wire.BASE_ALLOCATION,), (CHANGED,)):
        with Client.connect(served[1], "db@first", contexts) as client:
            assert list(client.block_status(0, SIZE)) == list(contexts)
