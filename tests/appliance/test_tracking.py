"""The whole appliance with a replayer that takes nothing until the journal is full, and then goes on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.support.nbd import NbdClient
from tests.support.running import running, wait_for

MIB = 1 << 20


def test_production_goes_on_and_the_replica_catches_up(tmp_path: Path) -> None:
    """Promises 8 and 10: what was written without a journal is there in the end; the time between is never offered."""
    with running(tmp_path, {"db": 64 * MIB}, max_size="16MiB") as a:
        a.wait_protected()
        with NbdClient(a.socket("collector"), "db") as client:
            client.write(0, b"before" * 1000)
            good = a.bookmark("good")
            replayer = a.child("replayer")
            os.kill(replayer, signal.SIGSTOP)
            for i in range(1, 31):
                client.write(i * MIB, bytes((i,)) * MIB)
            client.flush()
            client.write(0, b"within" * 1000)
            group = a.control().status("collector")["figures"]["groups"]["shop"]
            assert (group["state"], group["reason"]["code"]) == ("tracking", "journal_full")
            os.kill(replayer, signal.SIGCONT)
            wait_for(lambda: a.look()["healthy"], "healed")
            client.write(MIB, b"behind" * 1000)
        a.bookmark("healed")
        assert a.json("verify", "db")["equal"]
        with NbdClient(a.socket("replayer"), "db@good") as past:
            assert past.read(0, 6000) == b"before" * 1000 and past.read(30 * MIB, 4096) == bytes(4096)
        with NbdClient(a.socket("replayer"), "db@healed") as past:
            assert past.read(0, 6000) == b"within" * 1000 and past.read(MIB, 6000) == b"behind" * 1000
            assert past.read(30 * MIB, MIB) == b"\x1e" * MIB
        (gap,) = [g for g in a.json("points", "db")["gaps"] if g["reason"]["code"] == "tracking"]
        assert gap["from"]["seq"] > good and gap["to"]["seq"]
        refused = a.json("diff", "db@good", f"db@seq:{gap['from']['seq']}", expect=(4,))
        assert refused["error"]["before"]["seq"] >= good and refused["error"]["after"]["seq"] == gap["to"]["seq"]
