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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Node:
    """Of a cluster whose nodes are all both broker and controller; everything listens on loopback."""

    number: int
    port: int
    controller_port: int


def nodes(count: int) -> list[Node]:
    return [Node(number, free_port(), free_port()) for number in range(1, count + 1)]


class Broker:
    """One node, alone or of a `cluster`. `machine` are options of its virtual machine, `settings` more lines for its
    properties, `listeners` those besides PLAINTEXT, which the brokers themselves use: name to protocol."""

    def __init__(
        self,
        folder: Path,
        machine: Sequence[str] = HEAP,
        settings: str = "",
        *,
        cluster: Sequence[Node] = (),
        number: int = 1,
        listeners: Mapping[str, str] | None = None,
        format_options: Sequence[str] = (),
    ) -> None:
        cluster = cluster or nodes(1)
        (own,) = [node for node in cluster if node.number == number]
        self.folder, self.port, self._machine = folder, own.port, tuple(machine)
        self.address = f"127.0.0.1:{self.port}"
        protocols = {"PLAINTEXT": "PLAINTEXT", **(listeners or {})}
        self.addresses = {name: f"127.0.0.1:{own.port if name == 'PLAINTEXT' else free_port()}" for name in protocols}
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True)
        ours = ",".join(f"{name}://{address}" for name, address in self.addresses.items())
        voters = ",".join(f"{node.number}@127.0.0.1:{node.controller_port}" for node in cluster)
        (folder / "server.properties").write_text(f"""\
process.roles=broker,controller
node.id={number}
controller.quorum.voters={voters}
listeners={ours},CONTROLLER://127.0.0.1:{own.controller_port}
advertised.listeners={ours}
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
listener.security.protocol.map=CONTROLLER:PLAINTEXT,{",".join(f"{n}:{p}" for n, p in protocols.items())}
log.dirs={folder / "data"}
offsets.topic.replication.factor=1
auto.create.topics.enable=false
log.retention.check.interval.ms=1000
{settings}
""")
        configured = ("-t", CLUSTER_ID, "-c", str(folder / "server.properties"))
        self._java("kafka.tools.StorageTool", "format", *configured, *format_options)

    def _java(self, *arguments: str) -> None:
        done = subprocess.run(java(self._machine, *arguments), capture_output=True, text=True, timeout=START_SECONDS)
        assert done.returncode == 0, f"{arguments}: {done.stdout}\n{done.stderr}"

    def start(self) -> None:
        """Returns when it takes connections."""
        self.launch()
        self.wait_ready()

    def launch(self) -> None:
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                java(self._machine, "kafka.Kafka", str(self.folder / "server.properties")), stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, preexec_fn=die_with_parent,
            )  # fmt: skip

    def wait_ready(self) -> None:
        wait_for(lambda: answers(self.port), f"a broker at {self.address}", START_SECONDS)

    @property
    def running(self) -> bool:
        return self._process is not None

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
