"""How we speak to the brokers: TLS and SASL. Files are read again for every client, so that what was mended counts.

The password is in a file or in the environment; it is read when a client is made, goes into that client alone, and is
in nothing that this package keeps, prints or logs.
"""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from typing import Any

from cdp import storage
from cdp.errors import StorageError

# Where the password is without `sasl_password_file`.
PASSWORD_VARIABLE = "CDP_KAFKA_PASSWORD"
# A password is one line; more is another file.
MAX_PASSWORD_BYTES = 4096

AUTH, TLS = "kafka_auth", "kafka_tls"
MENDED = "it goes on by itself."


def refused(code: str, text: str, hint: str) -> StorageError:
    """An error of security (AUTH, TLS): tried again all the same, because it is mended on either side."""
    found = StorageError(text, f"{hint}; {MENDED}", code=code)
    found.retriable = True
    return found


@dataclass(frozen=True, slots=True)
class Security:
    """The keys of `[journal]` of the same names."""

    security_protocol: str = "PLAINTEXT"
    ssl_ca: str | None = None
    ssl_certificate: str | None = None
    ssl_key: str | None = None
    ssl_check_hostname: bool = True
    sasl_mechanism: str = "SCRAM-SHA-512"
    sasl_user: str = ""
    sasl_password_file: str | None = None

    @property
    def encrypted(self) -> bool:
        return self.security_protocol in ("SSL", "SASL_SSL")

    @property
    def authenticated(self) -> bool:
        return self.security_protocol in ("SASL_PLAINTEXT", "SASL_SSL")

    def settings(self) -> dict[str, Any]:
        """For one client. Raises StorageError (AUTH, TLS) for what cannot be read here."""
        found: dict[str, Any] = {"security_protocol": self.security_protocol}
        if self.encrypted:
            found["ssl_context"] = self._context()
        if self.authenticated:
            found |= {
                "sasl_mechanism": self.sasl_mechanism, "sasl_plain_username": self.sasl_user,
                "sasl_plain_password": self._password(),
            }  # fmt: skip
        return found

    def _context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.check_hostname = self.ssl_check_hostname
        if self.ssl_ca is None:
            context.load_default_certs()
        else:
            try:
                context.load_verify_locations(self.ssl_ca)
            except OSError as e:  # ssl.SSLError is one
                raise _unreadable("ssl_ca", self.ssl_ca, e) from None
        if self.ssl_certificate is not None:
            try:
                # A key that is encrypted would ask for its password at a terminal.
                context.load_cert_chain(self.ssl_certificate, self.ssl_key, password="")
            except OSError as e:
                files = ", ".join(filter(None, [self.ssl_certificate, self.ssl_key]))
                raise _unreadable("ssl_certificate and ssl_key", files, e) from None
        return context

    def _password(self) -> str:
        path = self.sasl_password_file
        if path is None:
            password = os.environ.get(PASSWORD_VARIABLE, "")
            where = f"${PASSWORD_VARIABLE}, which is not set"
        else:
            where = path
            try:
                raw = storage.read_file(path)
                password = raw[:MAX_PASSWORD_BYTES].decode().strip("\r\n")
            except (OSError, UnicodeDecodeError) as e:
                why = e.strerror if isinstance(e, OSError) else "it is not UTF-8"
                raise refused(
                    AUTH, f"The password of {self.sasl_user} in {path} cannot be read: {why}.",
                    "Correct `sasl_password_file`, or the file's permissions",
                ) from None  # fmt: skip
        if not password:
            raise refused(
                AUTH, f"There is no password of {self.sasl_user} in {where}.",
                f"Write it into `sasl_password_file`, or start the processes with ${PASSWORD_VARIABLE}",
            )  # fmt: skip
        return password


def _unreadable(keys: str, files: str, error: OSError) -> StorageError:
    why = error.strerror or str(error)
    return refused(TLS, f"{files} cannot be used: {why}.", f"Correct {keys} in [journal], or the files themselves")
