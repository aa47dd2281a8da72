"""The whole appliance over SASL and TLS: it works, and the password is nowhere to be seen."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tests.kafka.secured import PLAIN_PASSWORD, USER, Secured
from tests.kafka.test_kafka_processes import SIZE, folder, qemu_io
from tests.support.running import Appliance, running, wait_for

__all__ = ["folder", "qemu_io"]


def command_lines() -> bytes:
    """Of every process of this machine."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found.append((process / "cmdline").read_bytes())
        except OSError:
            continue  # it ended meanwhile
    return b"\n".join(found)


def shown(a: Appliance) -> str:
    """Everything that the appliance prints, logs, hands on or keeps."""
    answers = [a.run(*command) for command in (
        ("config",), ("config", "--json"), ("--debug", "status"), ("status", "--json"), ("--debug", "points", "db"),
    )]  # fmt: skip
    files = [p.read_bytes().decode(errors="replace") for p in (a.folder / "state").rglob("*.json")]
    return "\n".join([*(done.stdout + done.stderr for done in answers), *files, a.logs()])


def test_the_password_is_nowhere_to_be_seen(
    secured: Secured, folder: Path, qemu_io: Callable[..., None]
) -> None:
    password = folder / "password"
    password.write_text(PLAIN_PASSWORD)
    journal = "\n".join((
        'kind = "kafka"', f'bootstrap_servers = ["{secured.address("SASLTLS")}"]',
        f'topic_prefix = "cdp.secrets.{os.getpid()}."', "replication_factor = 1", "min_insync_replicas = 1",
        'security_protocol = "SASL_SSL"', f'ssl_ca = "{secured.authority.ca}"', 'sasl_mechanism = "PLAIN"',
        f'sasl_user = "{USER}"', 'sasl_password_file = "password"',
    ))  # fmt: skip
    with running(folder, {"db": SIZE}, journal=journal) as a:
        a.wait_protected()
        qemu_io(a.uri("db"), "write -P 0x11 0 4M", "flush")
        a.bookmark("good")
        qemu_io(a.past("db", "good"), "read -P 0x11 0 4M")
        everything = shown(a)
        assert "sasl_password_file" in everything and PLAIN_PASSWORD not in everything
        assert PLAIN_PASSWORD.encode() not in command_lines()
        password.write_text("Sesame-wrong")
        a.kill_child("relay")
        wait_for(lambda: "kafka_auth" in a.run("status", "--json").stdout, "the reason in the status", 60)
        page = a.run("status").stdout
        assert "refuses the user" in page and "password" in page
        everything = shown(a)
        assert "Sesame-wrong" not in everything and PLAIN_PASSWORD not in everything
        password.write_text(PLAIN_PASSWORD)
        a.wait_protected(60)
