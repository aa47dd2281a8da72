"""What people and rollbacks ask of a running collector, over its commands and with real clients."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cdp.collector.service import Collector, GroupSpec, VolumeSpec
from cdp.errors import ConfigError
from cdp.journal import batch
from cdp.nbd import wire
from cdp.nbd.client import Client
from tests.collector.helpers import MIB, Journal, Runner, fio, qemu_io, refusal


def one_volume(folder: Path, **more: Any) -> Runner:
    return Runner(folder, [("db", f"file:{folder}/db.raw", 16 * MIB)], **more)


def test_fio_verifies_what_it_wrote(tmp_path: Path) -> None:
    with one_volume(tmp_path) as runner:
        done = fio(
            runner, "--rw=randrw", "--bsrange=512-128k", "--iodepth=16", "--size=16m", "--verify=crc32c",
            "--verify_backlog=64", "--verify_fatal=1", "--verify_state_save=0", "--fsync=50", "--trim_percentage=10",
        )  # fmt: skip
        assert done["error"] == 0 and done["write"]["total_ios"] > 100
    assert bytes(Journal(runner.journal, {0: 16 * MIB}).images[0]) == (tmp_path / "db.raw").read_bytes()


def test_cold_reads_come_from_the_pool_and_are_right(tmp_path: Path) -> None:
    content = os.urandom(16 * MIB)
    path = tmp_path / "db.raw"
    path.write_bytes(content)
    with one_volume(tmp_path) as runner:
        runner.wait_for("initial sync", lambda f: f["state"] == "protected")
        fd = os.open(path, os.O_RDWR)
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
        copy = tmp_path / "copy.raw"
        subprocess.run(["nbdcopy", runner.uri(), copy], check=True, timeout=30)
        assert copy.read_bytes() == content


def test_zeros_are_written_by_the_client_where_the_primary_cannot_zero(tmp_path: Path) -> None:
    """Promise 9: else one request would keep the loop writing zeros for up to 4 GiB."""
    with one_volume(tmp_path, no_zeroing=True) as runner:
        with Client.connect(runner.uri()) as client:
            assert not client.flags & wire.SEND_WRITE_ZEROES
        done = qemu_io(runner, "write -P 1 0 16M", "write -z 100 12M", "discard 0 1M", "flush")
        assert done.returncode == 0, done.stdout
        assert qemu_io(runner, "read -P 0 100 12M", "read -P 1 0 100").returncode == 0
    journal = Journal(runner.journal, {0: 16 * MIB})
    assert bytes(journal.images[0]) == (tmp_path / "db.raw").read_bytes()
    assert not journal.of(batch.ZERO)


def test_requests_as_records(tmp_path: Path) -> None:
    """One request of up to 1 MiB is one record; a larger one is pieces, all but the last CONTINUED; FLUSH is a
    BARRIER, FUA a flag; TRIM and WRITE_ZEROES are one ZERO of any length."""
    with one_volume(tmp_path) as runner:
        qemu_io(runner, "write 0 1M", "write 1M 2560k", "write -f 4M 4k", "discard 0 16M", "write -z 1M 8M", "flush")
    kinds = [
        (r.kind, r.flags, r.length) for r in Journal(runner.journal, {0: 16 * MIB}).records
        if r.kind in (batch.WRITE, batch.ZERO)
    ]  # fmt: skip
    assert kinds == [
        (batch.WRITE, 0, MIB), (batch.WRITE, batch.CONTINUED, MIB), (batch.WRITE, batch.CONTINUED, MIB),
        (batch.WRITE, 0, MIB // 2), (batch.WRITE, batch.FUA, 4096), (batch.ZERO, batch.PUNCH, 16 * MIB),
        (batch.ZERO, 0, 8 * MIB),
    ]  # fmt: skip


def test_bookmarks_are_unique_for_ever(tmp_path: Path) -> None:
    with one_volume(tmp_path) as runner:
        first = runner.command("bookmark", group="shop", name="before-upgrade")
        assert refusal(lambda: runner.command("bookmark", group="shop", name="before-upgrade")).code == "name_taken"
        for bad in ("now", "9lives", "rollback-7", "a b", "", "x" * 65):
            assert refusal(lambda bad=bad: runner.command("bookmark", group="shop", name=bad)).exit_code == 2  # type: ignore[misc]
        assert refusal(lambda: runner.command("bookmark", group="nope", name="x")).exit_code == 3
        runner.kill()
        runner.start()
        assert refusal(lambda: runner.command("bookmark", group="shop", name="before-upgrade")).code == "name_taken"
        assert runner.stop() == 0
        runner.start()
        assert refusal(lambda: runner.command("bookmark", group="shop", name="before-upgrade")).code == "name_taken"
    marks = Journal(runner.journal, {0: 16 * MIB}).of(batch.BOOKMARK)
    assert [(r.seq, r.time_ns, bytes(r.data)) for r in marks] == [
        (first["seq"], first["time_ns"], b"before-upgrade")
    ]


def test_heartbeats_keep_time_moving(tmp_path: Path) -> None:
    with one_volume(tmp_path) as runner:
        before = runner.figures()
        after = runner.wait_for("heartbeat", lambda f: f["last_time_ns"] > before["last_time_ns"] + 15 * 10**8)
        assert after["journal"]["last_seq"] >= before["journal"]["last_seq"] + 2


def test_initial_sync_while_clients_write(tmp_path: Path) -> None:
    """A volume that holds data: holes are skipped, points are withheld until its end, the journal then has it all."""
    path = tmp_path / "db.raw"
    with path.open("wb") as f:
        f.truncate(64 * MIB)
        f.seek(8 * MIB)
        f.write(os.urandom(24 * MIB))
    with Runner(tmp_path, [("db", f"file:{path}", 64 * MIB)]) as runner:
        fio(runner, "--rw=randwrite", "--bs=4k", "--iodepth=8", "--size=64m", "--io_size=4m")
        figures = runner.wait_for("in sync", lambda f: f["state"] == "protected")
        assert figures["volumes"]["db"]["progress"] is None
    journal = Journal(runner.journal, {0: 64 * MIB})
    assert bytes(journal.images[0]) == path.read_bytes()
    assert sum(r.length for r in journal.of(batch.SYNC)) < 40 * MIB
    assert len(journal.gaps()) == 1 and journal.gaps()[0][1]


def test_a_killed_pass_starts_over(tmp_path: Path) -> None:
    path = tmp_path / "db.raw"
    path.write_bytes(os.urandom(64 * MIB))
    runner = Runner(tmp_path, [("db", f"file:{path}", 64 * MIB)]).start()
    assert runner.figures()["state"] == "syncing"
    runner.kill()
    with runner:
        assert runner.figures()["state"] == "syncing"
        runner.wait_for("in sync", lambda f: f["state"] == "protected")
        runner.command("resync", volume="db")
        assert runner.figures()["state"] == "resyncing"
        runner.wait_for("in sync", lambda f: f["state"] == "protected")
    journal = Journal(runner.journal, {0: 64 * MIB})
    assert bytes(journal.images[0]) == path.read_bytes()
    assert all(to is not None for _, to in journal.gaps())


def test_another_boot_compares_the_primary(tmp_path: Path) -> None:
    """Promise 2 for power loss: what the intent map names is compared."""
    runner = one_volume(tmp_path).start()
    qemu_io(runner, "write -P 1 0 1M", "flush")
    runner.kill()
    checkpoint = tmp_path / "collector/groups/shop/checkpoint"
    checkpoint.write_text(checkpoint.read_text().replace('"boot_id": "', '"boot_id": "x'))
    with runner:
        assert runner.figures()["state"] == "resyncing"
        runner.wait_for("in sync", lambda f: f["state"] == "protected")
    journal = Journal(runner.journal, {0: 16 * MIB})
    assert sum(r.length for r in journal.of(batch.SYNC)) == MIB and len(journal.gaps()) == 1


def test_verify_digests_what_the_primary_holds(tmp_path: Path) -> None:
    with one_volume(tmp_path) as runner:
        qemu_io(runner, "write -P 1 1M 1M")
        whole = runner.command("verify", volume="db")
        part = runner.command("verify", volume="db", ranges=[{"offset": 3, "length": 9}])
        assert (whole["bytes"], part["bytes"]) == (16 * MIB, 9)
    journal = Journal(runner.journal, {0: 16 * MIB})
    records = [r for r in journal.of(batch.VERIFY) if whole["first_seq"] <= r.seq <= whole["last_seq"]]
    assert sum(r.length for r in records) == 16 * MIB
    for r in records:
        content = bytes(journal.images[0][r.offset : r.offset + r.length])
        if r.flags & batch.ZEROS:
            assert content == bytes(r.length)
        else:
            assert bytes(r.data) == hashlib.sha256(content).digest()


def test_rollback_lock_outlives_a_kill(tmp_path: Path) -> None:
    """Promise 7: clients are out, only the secret opens it, also after a restart; BEGIN is a bookmark of its own."""
    with one_volume(tmp_path) as runner:
        idle = Client.connect(runner.uri())
        assert refusal(lambda: runner.command("lock", volumes=["db"], secret="s3")).code == "busy"
        assert len(runner.command("clients", volume="db")["clients"]) == 1
        runner.command("lock", volumes=["db"], secret="s3", disconnect=True)
        assert runner.figures()["volumes"]["db"]["clients"] == 0
        with pytest.raises(OSError):
            idle.read(0, 1)
        idle.close()
        runner.kill()
        runner.start()
        assert runner.figures()["state"] == "rolling_back"
        assert qemu_io(runner, "write 0 4k").returncode != 0
        assert qemu_io(runner, "write 0 4k", volume="db!guess").returncode != 0
        assert refusal(lambda: runner.command("unlock", volumes=["db"], secret="guess")).code == "locked"
        rollback = {"group": "shop", "volumes": ["db"], "secret": "s3"}
        begin = runner.command("rollback_begin", **rollback, target_seq=1, target_time_ns=7)
        assert begin["bookmark"] == f"rollback-{begin['seq']}"
        assert qemu_io(runner, "write -P 1 0 4k", "flush", volume="db!s3").returncode == 0
        end = runner.command("rollback_end", **rollback, begin=begin["seq"], abandoned=False)
        assert end["seq"] > begin["seq"] and end["time_ns"] > begin["time_ns"]
        runner.command("unlock", volumes=["db"], secret="s3")
        assert qemu_io(runner, "read -P 1 0 4k").returncode == 0
        assert qemu_io(runner, "read 0 4k", volume="db!s3").returncode != 0


def test_a_bookmark_says_whose_points_are_withheld(tmp_path: Path) -> None:
    """Promise 8: refused where no volume could be opened at it, else it names those that cannot."""
    volumes = [(name, f"file:{tmp_path}/{name}.raw", MIB) for name in ("db", "log")]
    with Runner(tmp_path, volumes) as runner:
        assert runner.command("bookmark", group="shop", name="whole")["withheld"] == []
        begun = {}
        for name, withheld in (("db", ["db"]), ("log", None)):
            rollback = {"group": "shop", "volumes": [name], "secret": "s"}
            runner.command("lock", volumes=[name], secret="s", disconnect=True)
            begun[name] = runner.command("rollback_begin", **rollback, target_seq=1, target_time_ns=7)
            if withheld is not None:
                answer = runner.command("bookmark", group="shop", name=f"while-{name}")
                assert [w["volume"] for w in answer["withheld"]] == withheld
                assert answer["withheld"][0]["reason"]["code"] == "rollback"
        assert refusal(lambda: runner.command("bookmark", group="shop", name="none")).code == "in_gap"
        rollback = {"group": "shop", "volumes": ["log"], "secret": "s", "begin": begun["log"]["seq"]}
        runner.command("rollback_end", **rollback)
        assert len(runner.command("bookmark", group="shop", name="none")["withheld"]) == 1


def test_consumers_can_be_listed_and_removed(tmp_path: Path) -> None:
    with one_volume(tmp_path) as runner:
        assert set(runner.command("consumers", group="shop")["consumers"]) == {"primary", "replayer"}
        assert refusal(lambda: runner.command("consumer_remove", group="shop", name="primary")).exit_code == 4
        runner.command("consumer_remove", group="shop", name="replayer")
        assert refusal(lambda: runner.command("consumer_remove", group="shop", name="replayer")).exit_code == 3
        assert refusal(lambda: runner.command("dance")).exit_code == 2


def test_mirror_sink_takes_writes_and_cannot_be_read(tmp_path: Path) -> None:
    with Runner(tmp_path, [("db", "none", 16 * MIB)]) as runner:
        done = qemu_io(runner, "write -P 7 0 1M", "discard 4M 1M", "flush")
        assert done.returncode == 0
        assert qemu_io(runner, "read 0 4k").returncode != 0
        assert refusal(lambda: runner.command("verify", volume="db")).code == "unsupported"
        assert refusal(lambda: runner.command("lock", volumes=["db"], secret="s")).code == "unsupported"
    assert Journal(runner.journal, {0: 16 * MIB}).images[0][:MIB] == b"\7" * MIB


def test_volumes_keep_their_numbers(tmp_path: Path) -> None:
    a, b = ("a", f"file:{tmp_path}/a.raw", MIB), ("b", f"file:{tmp_path}/b.raw", MIB)
    c = ("c", "none", MIB)
    for volumes, numbers in (([a, b], {"a": 0, "b": 1}), ([b], {"b": 1}), ([c, a], {"c": 2, "a": 0})):
        with Runner(tmp_path, volumes) as runner:
            assert {name: v["id"] for name, v in runner.figures()["volumes"].items()} == numbers


def test_specs_are_checked(tmp_path: Path) -> None:
    volume = VolumeSpec("db", "none", MIB)
    for groups in (
        [GroupSpec("db", [volume])],
        [GroupSpec("shop", [volume, volume])],
    ):
        with pytest.raises(ConfigError):
            Collector(str(tmp_path), groups, segment_bytes=MIB, max_bytes=8 * MIB)
