"""A broker with a listener for each way of speaking to it, and the certificates for them, made with openssl."""

from __future__ import annotations

import subprocess
from pathlib import Path

from cdp.journal.kafka.security import Security
from tests.kafka.broker import Broker

USER, PLAIN_PASSWORD, SCRAM_PASSWORD = "cdp", "plain-Sesame-41", "scram-Sesame-42"
_SCRAM = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
_PLAIN = "org.apache.kafka.common.security.plain.PlainLoginModule required"
_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def _openssl(*arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"openssl {arguments}: {done.stderr}"


class Authority:
    """Signs certificates; `ca` is its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder, self.ca = folder, folder / "ca.pem"
        _openssl("req", "-x509", *_NEW_KEY, "-keyout", str(folder / "ca.key"), "-out", str(self.ca), "-days", "2",
                 "-subj", f"/CN={folder.name}")  # fmt: skip

    def issue(self, name: str, alternative: str) -> Path:
        """A PEM file with key and certificate; `alternative` like `IP:127.0.0.1`."""
        made = {part: self._folder / f"{name}.{part}" for part in ("key", "csr", "crt", "ext", "pem")}
        made["ext"].write_text(f"subjectAltName={alternative}\n")
        _openssl("req", "-new", *_NEW_KEY, "-keyout", str(made["key"]), "-out", str(made["csr"]),
                 "-subj", f"/CN={name}")  # fmt: skip
        _openssl("x509", "-req", "-in", str(made["csr"]), "-CA", str(self.ca), "-CAkey", str(self._folder / "ca.key"),
                 "-CAcreateserial", "-days", "2", "-extfile", str(made["ext"]), "-out", str(made["crt"]))  # fmt: skip
        made["pem"].write_text(made["key"].read_text() + made["crt"].read_text())
        return made["pem"]


class Secured:
    """The broker, and what a client needs to know of it."""

    def __init__(self, folder: Path) -> None:
        self.authority, self.stranger = Authority(folder / "authority"), Authority(folder / "stranger")
        self.certificate = self.authority.issue("client", "DNS:client")
        own, other = self.authority.issue("broker", "IP:127.0.0.1"), self.authority.issue("other", "DNS:elsewhere")
        self.plain_file, self.scram_file = folder / "plain-password", folder / "scram-password"
        self.plain_file.write_text(PLAIN_PASSWORD + "\n")
        self.scram_file.write_text(SCRAM_PASSWORD)
        keystores = {"tls": own, "mutual": own, "sasltls": own, "other": other}
        settings = [
            line for name, keystore in keystores.items() for line in (
                f"listener.name.{name}.ssl.keystore.type=PEM",
                f"listener.name.{name}.ssl.keystore.location={keystore}",
            )
        ] + [
            "listener.name.mutual.ssl.client.auth=required",
            "listener.name.mutual.ssl.truststore.type=PEM",
            f"listener.name.mutual.ssl.truststore.location={self.authority.ca}",
            "listener.name.sasltls.sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512",
            f'listener.name.sasltls.plain.sasl.jaas.config={_PLAIN} user_{USER}="{PLAIN_PASSWORD}";',
            f"listener.name.sasltls.scram-sha-256.sasl.jaas.config={_SCRAM}",
            f"listener.name.sasltls.scram-sha-512.sasl.jaas.config={_SCRAM}",
            "listener.name.saslclear.sasl.enabled.mechanisms=SCRAM-SHA-512",
            f"listener.name.saslclear.scram-sha-512.sasl.jaas.config={_SCRAM}",
        ]  # fmt: skip
        scram = [
            option for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512")
            for option in ("--add-scram", f"{mechanism}=[name={USER},password={SCRAM_PASSWORD}]")
        ]  # fmt: skip
        self.broker = Broker(
            folder / "broker",
            listeners={"TLS": "SSL", "MUTUAL": "SSL", "OTHER": "SSL", "SASLTLS": "SASL_SSL",
                       "SASLCLEAR": "SASL_PLAINTEXT"},
            settings="\n".join(settings), format_options=scram,
        )  # fmt: skip

    def address(self, listener: str) -> str:
        return self.broker.addresses[listener]

    def tls(self) -> Security:
        return Security("SSL", ssl_ca=str(self.authority.ca))

    def mutual(self) -> Security:
        return Security("SSL", ssl_ca=str(self.authority.ca), ssl_certificate=str(self.certificate))

    def sasl(self, mechanism: str, protocol: str = "SASL_SSL", file: Path | None = None) -> Security:
        file = file or (self.plain_file if mechanism == "PLAIN" else self.scram_file)
        ca = str(self.authority.ca) if protocol == "SASL_SSL" else None
        return Security(protocol, ssl_ca=ca, sasl_mechanism=mechanism, sasl_user=USER, sasl_password_file=str(file))
