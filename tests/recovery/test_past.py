"""The past over NBD, served by a real replayer, read by real peers and by our own clients."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import time
from pathlib import Path

import pytest

from cdp.errors import CdpError, NotFoundError, RefusedError
from cdp.nbd import wire
from cdp.nbd.client import Client
from cdp.recovery.copying import ranges
from cdp.recovery.export import nbd_uri
from cdp.recovery.past import CHANGED
from tests.conftest import find_peer
from tests.recovery.serving import past, past_of, serving

MIB = 1 << 20
SIZE = 4 * MIB
BOTH = (wire.BASE_ALLOCATION, CHANGED)


def read(client: Client) -> bytearray:
    return client.read(0, client.size)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Twelve steps of writes and zeros, a bookmark after each."""
    chance = random.Random(7)
    with past(tmp_path_factory.mktemp("past"), {"db": SIZE, "log": MIB}) as (made, address):
        feed = made.feed
        seqs = []
        for step in range(12):
            for _ in range(20):
                offset = chance.randrange(SIZE - 40000)
                feed.write(1, offset, chance.randbytes(chance.randrange(1, 40000)))
            feed.zero(1, chance.randrange(SIZE // 2), chance.randrange(1, 200000))
            feed.write(2, step * 4096, bytes([step + 1]) * 4096)
            seqs.append(feed.bookmark(f"step-{step}"))
            feed.flush()
        made.caught_up()
        yield made, address, seqs


def test_every_name_reads_its_point(served):
    made, address, seqs = served
    model = made.feed.model
    for step, seq in enumerate(seqs):
        for name in (f"db@seq:{seq}", f"db@step-{step}"):
            with Client.connect(address, name) as client:
                assert read(client) == model[seq][1]
    for name in ("db", "db@now"):
        with Client.connect(address, name) as client:
            assert client.read(5, 99999) == model[seqs[-1]][1][5:100004]


def test_a_printed_time_as_a_name_is_that_point(served):
    from cdp.recovery.times import iso_utc

    made, address, seqs = served
    for seq in seqs[::4]:
        printed = iso_utc(made.replayer.history.timeline.time_of(seq))
        with Client.connect(address, f"db@{printed}") as client:
            assert read(client) == made.feed.model[seq][1]


@pytest.mark.parametrize(
    "name, kind, says",
    [
        ("db@", CdpError, "empty"), ("db@seq:999999999", RefusedError, "newest"), ("nothing", NotFoundError, "nothing"),
        ("db@2020-01-01T00:00:00", CdpError, "time zone"), ("db@-5d", RefusedError, "window"),
        ("db@never-made", NotFoundError, "never-made"), ("db@seq:0", RefusedError, "window"),
        ("", NotFoundError, "no volume"),
        ("db@2031-01-01T00:00:00Z", RefusedError, "future"),
    ],
)  # fmt: skip
def test_refused_names_say_why(served, name, kind, says):
    """Promise 8."""
    with pytest.raises(kind, match=says):
        Client.connect(served[1], name).close()


def test_a_point_stays_what_it_was_while_replay_goes_on(tmp_path):
    """Promise 6: opened, then overwritten many times."""
    with past(tmp_path, {"db": SIZE}) as (made, address):
        made.feed.write(1, 0, os.urandom(MIB))
        made.caught_up()
        with Client.connect(address, "db", BOTH) as client:
            before = read(client)
            for i in range(20):
                made.feed.write(1, i * 50000, os.urandom(70000))
                made.caught_up()
                assert read(client) == before == made.feed.model[made.feed.writer.last_seq - i - 1][1]
            assert list(ranges(client)) == []  # as of the connection's opening nothing differed


def test_private_writes_are_seen_by_their_connection_alone(served):
    made, address, seqs = served
    content = bytearray(made.feed.model[seqs[3]][1])
    name = f"db@seq:{seqs[3]}"
    with Client.connect(address, name, BOTH) as client, Client.connect(address, name) as other:
        for offset, data in ((1, b"x" * 5000), (SIZE - 7, b"y" * 7), (MIB, os.urandom(MIB))):
            client.write(offset, data)
            content[offset : offset + len(data)] = data
        client.zero(3 * MIB - 50, MIB // 2)
        client.flush()
        content[3 * MIB - 50 : 3 * MIB - 50 + MIB // 2] = bytes(MIB // 2)
        assert read(client) == content
        assert read(other) == made.feed.model[seqs[3]][1]
        status = client.block_status(0, SIZE)
        assert sum(length for length, _ in status[CHANGED]) == SIZE
    with Client.connect(address, f"db@seq:{seqs[3]}") as again:
        assert read(again) == made.feed.model[seqs[3]][1]


def test_what_changed_is_what_was_written_since(served):
    made, address, seqs = served
    for seq in seqs[::3]:
        with Client.connect(address, f"db@seq:{seq}", BOTH) as client:
            then, now = made.feed.model[seq][1], made.feed.model[seqs[-1]][1]
            found = bytearray(then)
            for offset, length in ranges(client):
                found[offset : offset + length] = now[offset : offset + length]
            assert found == now  # nothing that differs is missing


def test_a_point_that_left_the_window_is_an_error_and_never_other_bytes(tmp_path):
    """Promise 6: a reader without a pin, while retention runs."""
    with past(tmp_path, {"db": SIZE}, window_bytes=2 * MIB, segment_bytes=MIB) as (made, _):
        first = made.feed.write(1, 0, b"first" * 1000)
        made.caught_up()
        from cdp.recovery.past import PastLimits

        unpinned = past_of(made, tmp_path / "s", limits=PastLimits(pinned_points=0))
        name = f"db@seq:{first}"
        with serving(unpinned, tmp_path / "unpinned.sock") as address, Client.connect(address, name) as client:
            held = made.feed.model[first][1]
            for _ in range(400):
                made.feed.write(1, 0, os.urandom(MIB // 2))
                made.caught_up()
                try:
                    assert read(client) == held
                except OSError as e:
                    assert e.errno == 5 and "has left the window" in str(e)
                    break
            else:
                pytest.fail("the point never left the window")


def test_damage_of_the_past_is_said_to_its_reader_and_in_the_log(tmp_path, caplog):
    """EIO alone tells nobody which disk to look at; a thousand lines of it neither."""
    with past(tmp_path, {"db": SIZE}) as (made, address):
        seq = made.feed.write(1, 0, os.urandom(MIB))
        made.feed.write(1, 0, os.urandom(MIB))
        made.caught_up()
        for path in (tmp_path / "replayer" / "history" / "undo").glob("undo-*"):
            with path.open("r+b") as file:
                file.seek(64 << 10)
                file.write(b"!" * (512 << 10))
        with Client.connect(address, f"db@seq:{seq}") as client:
            for _ in range(3):
                with pytest.raises(OSError, match="damaged in the undo log") as refused:
                    client.read(0, MIB)
                assert refused.value.errno == errno.EIO
        lines = [record.getMessage() for record in caplog.records if "damaged in the undo log" in record.getMessage()]
        assert len(lines) == 1 and f"db at seq {seq}" in lines[0]


def test_open_points_are_pinned_until_closed(tmp_path):
    with past(tmp_path, {"db": SIZE}) as (made, address):
        with Client.connect(address, "db"), Client.connect(address, "db@now"):
            assert len(made.replayer.pins.seqs()) == 2
        end = time.monotonic() + 10
        while made.replayer.pins.seqs():  # the server meets the goodbyes in its own time
            assert time.monotonic() < end


# --- real peers


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def test_nbdinfo_lists_volumes_and_bookmarks(served):
    _, address, seqs = served
    listed = json.loads(run(find_peer("nbdinfo"), "--list", "--no-content", "--json", nbd_uri(address, "")))
    names = [export["export-name"] for export in listed["exports"]]
    assert names[:2] == ["db", "log"]
    assert "db@step-0" in names and "log@step-11" in names
    assert all(not export["can_multi_conn"] and not export["is_read_only"] for export in listed["exports"])


def test_nbdinfo_maps_both_contexts(served):
    made, address, seqs = served
    uri = nbd_uri(address, f"db@seq:{seqs[8]}")
    for context in BOTH:
        extents = json.loads(run(find_peer("nbdinfo"), f"--map={context}", "--json", uri))
        assert sum(extent["length"] for extent in extents) == SIZE


def test_nbdcopy_and_qemu_img_read_the_same_bytes(served, tmp_path: Path):
    made, address, seqs = served
    uri = nbd_uri(address, f"db@seq:{seqs[5]}")
    run(find_peer("nbdcopy"), uri, str(tmp_path / "copied.raw"))
    run(find_peer("qemu-img"), "convert", "-f", "raw", "-O", "qcow2", uri, str(tmp_path / "converted.qcow2"))
    run(find_peer("qemu-img"), "compare", "-f", "raw", "-F", "qcow2", uri, str(tmp_path / "converted.qcow2"))
    assert (tmp_path / "copied.raw").read_bytes() == made.feed.model[seqs[5]][1]
    mapped = json.loads(run(find_peer("qemu-img"), "map", "--output=json", "-f", "raw", uri))
    assert sum(extent["length"] for extent in mapped) == SIZE


def test_qemu_io_writes_are_private(served):
    made, address, seqs = served
    uri = nbd_uri(address, f"db@seq:{seqs[5]}")
    told = run(
        find_peer("qemu-io"), "-f", "raw", "-c", "write -P 0xab 1000 9000", "-c", "read -P 0xab 1000 9000",
        "-c", "write -z 1M 1M", "-c", "read -P 0 1M 1M", "-c", "flush", uri,
    )  # fmt: skip
    assert "failed" not in told
    with Client.connect(address, f"db@seq:{seqs[5]}") as client:
        assert read(client) == made.feed.model[seqs[5]][1]
