"""Ports, certificates of an authority of one's own, and two networks joined by a cable that can be pulled."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

TOKEN = "a-token-of-the-tests-9f86d081884c7d65"


def free_port() -> int:
    """A TCP port of loopback that nobody has just now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def token_file(folder: Path, token: str = TOKEN) -> Path:
    """A file with a token that only we can read."""
    made = folder / "token"
    made.write_text(token + "\n")
    made.chmod(0o600)
    return made


class Authority:
    """A certificate authority made by openssl; `ca` is what a client trusts."""

    def __init__(self, openssl: str, folder: Path) -> None:
        self._openssl, self._folder = openssl, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.ca, self._key = folder / "ca.pem", folder / "ca.key"
        self._run("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
                  "-subj", "/CN=an authority of the tests", "-addext", "keyUsage=critical,keyCertSign",
                  "-keyout", str(self._key), "-out", str(self.ca))  # fmt: skip

    def _run(self, *arguments: str) -> None:
        subprocess.run([self._openssl, *arguments], check=True, capture_output=True)

    def certify(self, name: str, subject: str) -> tuple[Path, Path]:
        """(certificate, key) for `subject`, like `IP:127.0.0.1` or `DNS:site-a`."""
        certificate, key, request = (self._folder / f"{name}.{kind}" for kind in ("pem", "key", "csr"))
        extensions = self._folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName={subject}\n")
        self._run("req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                  "-subj", f"/CN={name}", "-keyout", str(key), "-out", str(request))  # fmt: skip
        self._run("x509", "-req", "-in", str(request), "-CA", str(self.ca), "-CAkey", str(self._key), "-days", "2",
                  "-set_serial", "1", "-extfile", str(extensions), "-out", str(certificate))  # fmt: skip
        return certificate, key


class Cable:
    """Two network namespaces, `a` and `b`, joined by a veth pair. Skips the test where they cannot be made."""

    addresses = {"a": "10.213.0.1", "b": "10.213.0.2"}

    def __init__(self, ip: str) -> None:
        self._ip = ip
        self._names = {side: f"cdp-{os.getpid()}-{side}" for side in self.addresses}
        try:
            self._make()
        except BaseException:
            self.close()
            raise

    def _make(self) -> None:
        for name in self._names.values():
            done = self._run("netns", "add", name)
            if done.returncode != 0:
                pytest.skip(f"no network namespaces can be made here: {done.stderr.strip()}")
        ends = self._names["a"], "type", "veth", "peer", "name", "cable", "netns", self._names["b"]
        self._must("link", "add", "cable", "netns", *ends)
        for side, name in self._names.items():
            self._must("-n", name, "address", "add", f"{self.addresses[side]}/24", "dev", "cable")
            for device in ("lo", "cable"):
                self._must("-n", name, "link", "set", device, "up")

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([self._ip, *arguments], capture_output=True, text=True)

    def _must(self, *arguments: str) -> None:
        done = self._run(*arguments)
        assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"

    def inside(self, side: str) -> tuple[str, ...]:
        """What stands before a command that is to run in the network of `a` or `b`."""
        return self._ip, "netns", "exec", self._names[side]

    def pull(self) -> None:
        """From here on nothing passes; who sends hears nothing."""
        self._must("-n", self._names["a"], "link", "set", "cable", "down")

    def plug(self) -> None:
        """It passes again."""
        self._must("-n", self._names["a"], "link", "set", "cable", "up")

    def close(self) -> None:
        """Idempotent. The processes inside must have ended."""
        for name in self._names.values():
            self._run("netns", "delete", name)
