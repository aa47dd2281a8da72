"""TLS and SASL against a real broker: what fits carries, what does not is said, and goes on when it is mended."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from cdp.errors import CdpError
from cdp.journal.kafka.cluster import Cluster
from cdp.journal.kafka.reader import KafkaReader
from cdp.journal.kafka.relay import Relay
from cdp.journal.kafka.security import PASSWORD_VARIABLE, Security
from tests.journal import support
from tests.journal.contract import read_to
from tests.kafka.secured import PLAIN_PASSWORD, SCRAM_PASSWORD, Secured
from tests.support.running import wait_for

SECONDS = 60.0
_numbers = itertools.count(1)


def at(secured: Secured, listener: str, security: Security) -> Cluster:
    topic = f"cdp.secured.{os.getpid()}.{next(_numbers)}"
    return Cluster((secured.address(listener),), topic, 1, 1, 7 * 86400 * 1000, security)


@contextmanager
def relayed(folder: Path, cluster: Cluster) -> Iterator[tuple[Relay, int]]:
    """A journal with some batches, and a relay that was told to carry it; the journal's last seq."""
    writer = support.open_writer(folder / "journal", 1)
    for _ in range(5):
        support.prepare(writer)
        last = support.append(writer, 3000)
    support.sync(writer)
    relay = Relay(cluster, str(folder / "journal"), keep_ns=0, max_kept_bytes=1 << 30)
    relay.start()
    try:
        yield relay, last
    finally:
        relay.stop()
        writer.close()


def carried(relay: Relay, last: int) -> None:
    wait_for(lambda: relay.carried_seq == last, f"carried: {relay.figures()}", SECONDS)


def told(relay: Relay, code: str) -> str:
    """What the relay says once it waits for that reason; no secret is in it."""
    wait_for(lambda: (relay.reason or {}).get("code") == code, f"{code}: {relay.figures()}", SECONDS)
    assert relay.state == "waiting"
    text = (relay.reason or {})["text"]
    assert PLAIN_PASSWORD not in text and SCRAM_PASSWORD not in text
    return text


WAYS: dict[str, tuple[str, Callable[[Secured], Security]]] = {
    "tls": ("TLS", Secured.tls),
    "certificates on both sides": ("MUTUAL", Secured.mutual),
    "plain": ("SASLTLS", lambda s: s.sasl("PLAIN")),
    "scram-256": ("SASLTLS", lambda s: s.sasl("SCRAM-SHA-256")),
    "scram-512": ("SASLTLS", lambda s: s.sasl("SCRAM-SHA-512")),
    "scram without tls": ("SASLCLEAR", lambda s: s.sasl("SCRAM-SHA-512", "SASL_PLAINTEXT")),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_fits_carries(secured: Secured, tmp_path: Path, way: str) -> None:
    listener, security = WAYS[way]
    cluster = at(secured, listener, security(secured))
    with relayed(tmp_path, cluster) as (relay, last):
        carried(relay, last)
        reader = KafkaReader(cluster, str(tmp_path / "place"), 0)
        assert read_to(reader, last)[-1].last_seq == last
        reader.close()


def test_a_password_in_the_environment(
    secured: Secured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    security = replace(secured.sasl("SCRAM-SHA-512"), sasl_password_file=None)
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)
    with relayed(tmp_path, at(secured, "SASLTLS", security)) as (relay, last):
        assert PASSWORD_VARIABLE in told(relay, "kafka_auth")
        monkeypatch.setenv(PASSWORD_VARIABLE, SCRAM_PASSWORD)
        carried(relay, last)


def test_a_wrong_password_is_said_and_mended(secured: Secured, tmp_path: Path) -> None:
    """Promise 8: by the relay and by the reader; the file that is corrected is enough."""
    file = tmp_path / "password"
    file.write_text("wrong")
    cluster = at(secured, "SASLTLS", secured.sasl("SCRAM-SHA-512", file=file))
    with relayed(tmp_path, cluster) as (relay, last):
        reader = KafkaReader(cluster, str(tmp_path / "place"), 0)
        assert "`sasl_user` or its password" in told(relay, "kafka_auth")
        assert wait_for(lambda: code_of(reader), "the reader's reason", SECONDS) == "kafka_auth"
        file.write_text(SCRAM_PASSWORD)
        carried(relay, last)
        got: list[int] = []

        def arrived() -> bool:
            try:
                got.extend(batch.last_seq for batch in reader.read(1 << 20))
            except CdpError as e:
                assert e.retriable, e
            return bool(got) and got[-1] == last

        wait_for(arrived, f"seq {last} at the reader", SECONDS)
        reader.close()


def code_of(reader: KafkaReader) -> str:
    try:
        reader.read(1)
    except CdpError as e:
        assert e.retriable
        return e.code
    return ""


def test_a_mechanism_that_is_not_enabled(secured: Secured, tmp_path: Path) -> None:
    security = secured.sasl("SCRAM-SHA-256", "SASL_PLAINTEXT")
    with relayed(tmp_path, at(secured, "SASLCLEAR", security)) as (relay, _):
        assert "SCRAM-SHA-256" in told(relay, "kafka_auth")


def test_an_unknown_authority_is_said_and_mended(secured: Secured, tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    shutil.copy(secured.stranger.ca, ca)
    security = Security("SSL", ssl_ca=str(ca))
    with relayed(tmp_path, at(secured, "TLS", security)) as (relay, last):
        assert "not trusted" in told(relay, "kafka_tls") and "`ssl_ca`" in (relay.reason or {})["text"]
        shutil.copy(secured.authority.ca, ca)
        carried(relay, last)


def test_a_certificate_for_another_name(secured: Secured, tmp_path: Path) -> None:
    with relayed(tmp_path / "checked", at(secured, "OTHER", secured.tls())) as (relay, _):
        assert "for another name" in told(relay, "kafka_tls")
    loose = replace(secured.tls(), ssl_check_hostname=False)
    with relayed(tmp_path / "loose", at(secured, "OTHER", loose)) as (relay, last):
        carried(relay, last)


MISTAKES: dict[str, tuple[str, Callable[[Secured], Security], str, str]] = {
    "no tls where the port has it": ("TLS", lambda s: Security(), "kafka_tls", "security_protocol"),
    "tls where the port has none": ("PLAINTEXT", Secured.tls, "kafka_tls", "security_protocol"),
    "no user where the port wants one": ("SASLCLEAR", lambda s: Security(), "kafka_auth", "SASL_PLAINTEXT"),
    "no user where the tls port wants one": ("SASLTLS", Secured.tls, "kafka_auth", "SASL_SSL"),
    "a user where the port wants none": (
        "PLAINTEXT", lambda s: s.sasl("SCRAM-SHA-512", "SASL_PLAINTEXT"), "kafka_auth", "`security_protocol`"
    ),
    "no certificate of ours": ("MUTUAL", Secured.tls, "kafka_tls", "`ssl_certificate`"),
    "a file that is not there": (
        "TLS", lambda s: Security("SSL", ssl_ca="/nowhere/ca.pem"), "kafka_tls", "/nowhere/ca.pem"
    ),
    "a file that is no certificate": (
        "TLS", lambda s: Security("SSL", ssl_ca=str(s.scram_file)), "kafka_tls", "ssl_ca"
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_has_its_reason(secured: Secured, tmp_path: Path, mistake: str) -> None:
    listener, security, code, says = MISTAKES[mistake]
    with relayed(tmp_path, at(secured, listener, security(secured))) as (relay, _):
        assert says in told(relay, code)
