"""Apache Kafka itself, from its jars (`pom.xml`), with this machine's Java: brokers in KRaft mode on loopback.

A broker is a process of its own that can be killed, frozen and started again over the same folder.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import zlib
from collections.abc import Sequence
from pathlib import Path

from tests.support.running import die_with_parent, wait_for

HERE = Path(__file__).parent
# Where the jars are kept between runs, outside of any checkout.
JARS = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cdp-tests" / "kafka-4.1.0"
CLUSTER_ID = "4L6g3nShT-eMCtK--X86sw"
START_SECONDS = 60.0
FETCH_SECONDS = 300
# A broker's heap: tests send some megabytes at a time.
HEAP = ("-Xms128m", "-Xmx384m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")


def missing() -> str:
    """Why there can be no broker here; empty if there can."""
    lacking = [name for name in ("java", "mvn") if shutil.which(name) is None]
    return f"{' and '.join(lacking)} not installed: no Apache Kafka to test with" if lacking else ""


def fetch_jars() -> Path:
    """The folder of Kafka's jars, fetched once from Maven's repository, and again when other ones are asked for."""
    pom = HERE / "pom.xml"
    complete = JARS / f"complete-{zlib.crc32(pom.read_bytes()):08x}"
    if not complete.exists():
        JARS.mkdir(parents=True, exist_ok=True)
        command = ["mvn", "-q", "-B", "-f", str(pom), "dependency:copy-dependencies",
                   f"-DoutputDirectory={JARS}", "-DincludeScope=runtime"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_SECONDS)
        assert done.returncode == 0, f"Maven could not fetch Kafka:\n{done.stdout}\n{done.stderr}"
        complete.touch()
    return JARS


def java(options: Sequence[str], *arguments: str) -> list[str]:
    """The command that runs one of Kafka's classes with these options of the virtual machine."""
    return ["java", *options, "-cp", f"{fetch_jars()}/*", *arguments]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


class Broker:
    """One node that is broker and controller. `machine` are options of its virtual machine, `settings` more lines for
    its properties."""

    def __init__(self, folder: Path, machine: Sequence[str] = HEAP, settings: str = "") -> None:
        self.folder, self._machine = folder, tuple(machine)
        self.port, controller = free_port(), free_port()
        self.address = f"127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True)
        (folder / "server.properties").write_text(f"""\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners=PLAINTEXT://{self.address},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://{self.address}
controller.listener.names=CONTROLLER
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs={folder / "data"}
offsets.topic.replication.factor=1
auto.create.topics.enable=false
log.retention.check.interval.ms=1000
{settings}
""")
        self._java("kafka.tools.StorageTool", "format", "-t", CLUSTER_ID, "-c", str(folder / "server.properties"))

    def _java(self, *arguments: str) -> None:
        done = subprocess.run(java(HEAP, *arguments), capture_output=True, text=True, timeout=START_SECONDS)
        assert done.returncode == 0, f"{arguments}: {done.stdout}\n{done.stderr}"

    def start(self) -> None:
        """Returns when it takes connections."""
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                java(self._machine, "kafka.Kafka", str(self.folder / "server.properties")), stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, preexec_fn=die_with_parent,
            )  # fmt: skip
        wait_for(lambda: answers(self.port), f"a broker at {self.address}", START_SECONDS)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """kill -9; also of one that is frozen."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
