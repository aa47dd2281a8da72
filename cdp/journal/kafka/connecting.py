"""Why connections to the brokers do not come about. kafka-python tries again until its time is up, and then says only
that it is; the reason itself is with the connections that failed, so they are listened to here.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from typing import Any, NamedTuple

from kafka.errors import (
    AuthorizationError,
    IllegalSaslStateError,
    KafkaConnectionError,
    KafkaProtocolError,
    SaslAuthenticationFailedError,
    UnsupportedSaslMechanismError,
)
from kafka.net.compat import KafkaNetClient
from kafka.net.manager import KafkaConnectionManager
from kafka.net.selector import NetworkSelector

from cdp import storage
from cdp.errors import StorageError
from cdp.journal.kafka.security import AUTH, TLS, Security, refused

# A failure that is older says nothing about now.
FRESH_NS = 60 * 10**9
# A broker that wants to know who we are ends the connection at the first request without it.
HUNG_UP_NS = 10**9
# X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH.
_OTHER_NAME = (62, 64)
# A chain of causes is short; a ring of them would be a bug of the client.
_MAX_CAUSES = 8


class _Failure(NamedTuple):
    server: str
    error: BaseException
    at_ns: int


class Failures:
    """The last failure of each server that has not been reached since; any thread."""

    def __init__(self) -> None:
        self._last: dict[str, _Failure] = {}

    def failed(self, server: str, error: BaseException) -> None:
        """After some refusals a broker only hangs up: that does not take the place of what it said before."""
        if server in self._last and "disconnected" in str(error):
            return
        self._last[server] = _Failure(server, error, storage.monotonic_ns())

    def reached(self, server: str) -> None:
        self._last.pop(server, None)

    def explain(self, security: Security) -> StorageError | None:
        """What is wrong with how we speak to the brokers; None where it is only that they are away."""
        now_ns = storage.monotonic_ns()
        for failure in list(self._last.values()):
            if now_ns - failure.at_ns < FRESH_NS and (
                found := _explain_first(failure.error, failure.server, security)
            ):
                return found
        return None


class _HungUpError(KafkaConnectionError):  # type: ignore[misc]
    """The connection could be used, and ended at the first request."""


class _Manager(KafkaConnectionManager):  # type: ignore[misc]
    failures: Failures

    def get_connection(self, node_id: Any, **given: Any) -> Any:
        new = node_id not in self._conns
        made = super().get_connection(node_id, **given)
        if new:
            node = self.cluster.broker_metadata(node_id)
            server = f"{node.host}:{node.port}"
            made.init_future.add_callback(lambda _: self._used(made, server))
            made.init_future.add_errback(lambda error: self.failures.failed(server, error))
        return made

    def _used(self, made: Any, server: str) -> None:
        self.failures.reached(server)
        since_ns = storage.monotonic_ns()

        def closed(error: BaseException) -> None:
            if storage.monotonic_ns() - since_ns < HUNG_UP_NS:
                self.failures.failed(server, _HungUpError(str(error)))

        made.close_future.add_errback(closed)


def client(failures: Failures, **settings: Any) -> Any:
    """kafka-python's own, telling `failures`."""
    net = NetworkSelector(**settings)
    manager = _Manager(net, **settings)
    manager.failures = failures
    return KafkaNetClient(net=net, manager=manager, **settings)


def explain(error: BaseException, server: str, security: Security) -> StorageError | None:
    """The reason behind an error of the client; None if it is none of security."""
    user = security.sasl_user
    if isinstance(error, SaslAuthenticationFailedError):
        return refused(
            AUTH, f"Kafka at {server} refuses the user {user} ({security.sasl_mechanism}): wrong name or password.",
            "Correct `sasl_user` or its password",
        )  # fmt: skip
    if isinstance(error, UnsupportedSaslMechanismError | IllegalSaslStateError):
        return refused(
            AUTH, f"Kafka at {server} does not take {security.sasl_mechanism} from us: {_said(error)}.",
            "Correct `sasl_mechanism` or `security_protocol`, or enable it at the brokers",
        )  # fmt: skip
    if isinstance(error, AuthorizationError):
        return refused(
            AUTH, f"Kafka at {server} does not allow {user or 'us'} what is needed: {_said(error)}.",
            "Let this user create, describe, configure, read and write the topic, and write idempotently",
        )  # fmt: skip
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return _untrusted(cause, server)
        if isinstance(cause, ssl.SSLError):
            return refused(
                TLS, f"TLS with Kafka at {server} fails: {cause.reason or cause}.",
                "See that `security_protocol` is what that port speaks, and whether it wants an `ssl_certificate`",
            )  # fmt: skip
    return None


def _explain_first(error: BaseException, server: str, security: Security) -> StorageError | None:
    """The same for what ended a connection before it could be used."""
    if found := explain(error, server, security):
        return found
    if security.encrypted and "Handshake failed" in str(error):
        return refused(
            TLS, f"Kafka at {server} ends the connection during the TLS handshake: {_said(error)}.",
            "See that `security_protocol` is what that port speaks",
        )  # fmt: skip
    if not security.authenticated and isinstance(error, _HungUpError):
        return refused(
            AUTH, f"Kafka at {server} ends every connection at the first request: its port seems to want a user.",
            'Set security_protocol to "SASL_SSL" or "SASL_PLAINTEXT", or name another port',
        )  # fmt: skip
    if not security.encrypted and isinstance(error, KafkaProtocolError):
        return refused(
            TLS, f'Kafka at {server} does not answer in {security.security_protocol}: its port seems to speak TLS.',
            'Set security_protocol to "SSL" or "SASL_SSL", or name another port',
        )  # fmt: skip
    return None


def _untrusted(error: ssl.SSLCertVerificationError, server: str) -> StorageError:
    if error.verify_code in _OTHER_NAME:
        return refused(
            TLS, f"The certificate of Kafka at {server} is for another name: {error.verify_message}",
            "Name the brokers (`bootstrap_servers`, their advertised.listeners) as their certificates do",
        )  # fmt: skip
    return refused(
        TLS, f"The certificate of Kafka at {server} is not trusted: {error.verify_message}.",
        "Set `ssl_ca` to the certificate of who signed it",
    )  # fmt: skip


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was made of, and what it was raised in the middle of."""
    seen: list[BaseException | None] = [error]
    for found in seen:
        if found is None or len(seen) > _MAX_CAUSES:
            continue
        yield found
        seen += [found.__cause__ or found.__context__]
        seen += [part for part in found.args if isinstance(part, BaseException)]


def _said(error: BaseException) -> str:
    return str(error).rstrip(".")

