"""The keys of `[journal]` that say how the brokers are spoken to: TLS, and who we are. Refused where they do not fit.

There is no key for a password: it stands in a file, or in the environment of the processes, and so in nothing that is
printed, logged or handed on.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from cdp.config_values import Path


class KafkaSecurity(BaseModel):
    """Part of `[journal]`."""

    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        default="PLAINTEXT", description="kafka only: what the brokers' port speaks; enough in a network of one's own"
    )
    ssl_ca: Path | None = Field(
        default=None, description="kafka only: PEM file of who signs the brokers' certificates; without it the system's"
    )
    ssl_certificate: Path | None = Field(
        default=None, description="kafka only: our own certificate (PEM), for brokers that ask for one"
    )
    ssl_key: Path | None = Field(
        default=None, description="kafka only: its key (PEM, not encrypted), unless it stands in ssl_certificate too"
    )
    ssl_check_hostname: bool = Field(
        default=True, description="kafka only: else any certificate of that CA passes for any broker"
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        default="SCRAM-SHA-512", description="kafka only: proves the password without sending it"
    )
    sasl_user: str = Field(default="", description="kafka only: who the brokers know us as")
    sasl_password_file: Path | None = Field(
        default=None, description="kafka only: one line; without it $CDP_KAFKA_PASSWORD in the processes' environment"
    )

    def check_security(self) -> None:
        """Raises ValueError for keys that contradict each other."""
        protocol = self.security_protocol
        self._check_prefix("ssl_", "SSL" in protocol, '"SSL" or "SASL_SSL"')
        self._check_prefix("sasl_", "SASL" in protocol, '"SASL_SSL" or "SASL_PLAINTEXT"')
        if "SASL" in protocol and not self.sasl_user:
            raise ValueError(f'sasl_user is missing, which security_protocol = "{protocol}" needs')
        if set(self.sasl_user) & set(",=\0"):
            raise ValueError("sasl_user must have none of `,` and `=`, which separate the fields of SASL's messages")
        if self.ssl_key is not None and self.ssl_certificate is None:
            raise ValueError("ssl_key is of no use without ssl_certificate")

    def _check_prefix(self, prefix: str, fits: bool, wanted: str) -> None:
        """A default that is written out (`cdp config` does) says nothing."""
        given = [
            name for name, field in KafkaSecurity.model_fields.items()
            if name.startswith(prefix) and getattr(self, name) != field.default
        ]  # fmt: skip
        if given and not fits:
            need = "needs" if len(given) == 1 else "need"
            raise ValueError(
                f'{", ".join(given)} {need} security_protocol = {wanted}, but it is "{self.security_protocol}"'
            )


SECURITY_KEYS = frozenset(KafkaSecurity.model_fields)
