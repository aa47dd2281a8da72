"""Where a parent's API is served: the unix socket in the state folder, and `control` and `monitor` if configured.

What is wrong with token, certificate or address is said before anything is started.
"""

from __future__ import annotations

import logging
import ssl
from typing import NamedTuple

from fastapi import FastAPI

from appliance import paths, reaching
from appliance.guard import Guard
from appliance.http_server import Endpoint
from cdp.config import Config
from cdp.config_sections import Relay
from cdp.config_values import is_loopback
from cdp.errors import ConfigError
from cdp.nbd.listening import listen_tcp, parse_address

log = logging.getLogger("cdp")


class Served(NamedTuple):
    """The endpoints, and a line for people about each that is on TCP."""

    endpoints: list[Endpoint]
    lines: list[str]


def open_all(role: str, config: Config, api: FastAPI, monitor: FastAPI) -> Served:
    """Listens at all of them. Raises CdpError. The caller holds the lock of the role's folder."""
    section: Relay = {
        paths.COLLECTOR: config.collector, paths.RELAY: config.relay, paths.REPLAYER: config.replayer,
    }[role]  # fmt: skip
    served = Served([], [])
    if section.control is not None:
        token = None if config.control.token_file is None else reaching.read_token(config.control.token_file)
        _check_certificate(config.control.certificate, config.control.key)
        _warn(section.control, config)
        app = Guard(api, role, token, from_network=True)
        _add(served, "control", section.control, app, config.control.certificate, config.control.key)
    if section.monitor is not None:
        _add(served, "monitor", section.monitor, Guard(monitor, role, None, from_network=True), None, None)
    private = paths.listen_private(paths.api_socket(config.appliance.state_dir, role))
    served.endpoints.append(Endpoint(Guard(api, role, None, from_network=False), private))
    return served


def _add(served: Served, what: str, address: str, app: Guard, certificate: str | None, key: str | None) -> None:
    _, host, port = parse_address(address)
    listener = listen_tcp(host, port)
    served.endpoints.append(Endpoint(app, listener, certificate, key))
    name = f"[{host}]" if ":" in host else host
    scheme = "http" if certificate is None else "https"
    served.lines.append(f"{what} at {scheme}://{name}:{listener.getsockname()[1]}")


def _check_certificate(certificate: str | None, key: str | None) -> None:
    if certificate is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as e:
        raise ConfigError(
            f"The certificate {certificate} with the key {key} cannot be used: {e.strerror or e}.",
            "Both are PEM files, the certificate first and then those that signed it; see [control].",
        ) from None


def _warn(address: str, config: Config) -> None:
    """What is allowed, and not safe everywhere."""
    c = config.control
    if c.token_file is None:
        log.warning("the API at %s asks for no token: every user of this machine may roll volumes back", address)
    elif reaching.is_readable_by_all(c.token_file):
        log.warning("every user of this machine can read the token in %s; if there are others: chmod 600", c.token_file)
    if c.certificate is None and not is_loopback(address):
        log.warning("the API at %s is without TLS: who listens on that network has the token "
                    "(certificate and key in [control])", address)  # fmt: skip
