"""The API on TCP: who is let in, over what, and what a stranger can cost. Real processes, real sockets, real TLS."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from appliance import guard, http_server, paths
from appliance.client import Client
from appliance.reaching import Reach
from cdp.errors import RefusedError, UnreachableError
from tests.support.network import TOKEN, Authority, free_port, token_file
from tests.support.running import Appliance, wait_for

SIZE = 4 << 20


def configured(folder: Path) -> Appliance:
    """A collector with `control` on loopback and a token, not started."""
    port = free_port()
    made = Appliance(folder / "x", {"db": SIZE}, more={
        "collector": f'control = "tcp:127.0.0.1:{port}"\ncontrol_at = "http://127.0.0.1:{port}"',
        "control": f'token_file = "{token_file(folder)}"',
    })  # fmt: skip
    made.write_config()
    return made


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Appliance]:
    appliance = configured(tmp_path)
    try:
        yield appliance
    finally:
        appliance.end()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    """One that runs, for all tests that only ask it something."""
    appliance = configured(tmp_path_factory.mktemp("served"))
    try:
        appliance.start("collector")
        yield appliance
        appliance.stop()
    finally:
        appliance.end()


def url(appliance: Appliance) -> str:
    return appliance.more["collector"].rpartition(' = "')[2].removesuffix('"')


def away(appliance: Appliance, token: str | None = TOKEN, **reach: str) -> Client:
    """A client on a machine that has no state folder of the appliance."""
    folder = appliance.folder.parent / "elsewhere"
    folder.mkdir(exist_ok=True)
    file = None if token is None else str(token_file(folder, token))
    return Client(Reach(str(folder), control_at={"collector": url(appliance)}, token_file=file, **reach))


def test_who_has_the_token_is_served_from_another_machine(served: Appliance) -> None:
    client = away(served)
    assert client.status("collector")["pid"] == served.child("collector")
    assert client.collector("bookmark", group="shop", name="far")["seq"] > 0
    with pytest.raises(UnreachableError, match="replayer cannot be reached"):
        client.status("replayer")
    with pytest.raises(RefusedError, match="far"):  # errors come back as they were raised there
        client.collector("bookmark", group="shop", name="far")


@pytest.mark.parametrize("token", [None, TOKEN[:-1] + "X", TOKEN + "X"])
def test_who_has_not_is_refused_with_what_to_do(served: Appliance, token: str | None) -> None:
    with pytest.raises(RefusedError, match="token_file") as refused:
        away(served, token).collector("bookmark", group="shop", name="x")
    assert (refused.value.code, refused.value.exit_code, refused.value.retriable) == ("unauthorized", 4, False)
    answer = httpx.get(f"{url(served)}/v1/status")
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    for path in ("/v1/none", "/metrics/", "/v1/command/bookmark", "/docs", "//healthz"):
        assert httpx.post(url(served) + path, json={}).status_code == 401
    assert Client(Reach(str(served.folder / "state"))).status("collector")["figures"]  # the unix socket asks for none


def test_the_command_line_at_another_machine(served: Appliance, tmp_path: Path) -> None:
    text = served.config.read_text().replace(f'"{served.folder}/state"', f'"{tmp_path}/other"')
    other = Appliance(tmp_path / "y", {"db": SIZE})
    other.folder.mkdir()
    other.config.write_text(text)
    assert other.json("bookmark", "shop", "here")["seq"] > 0
    status = other.json("status", expect=(1,))
    assert status["groups"][0]["journal"]["last_seq"] > 0 and status["processes"]["collector"]
    assert set(status["unreached"]) == {"replayer"}
    wrong = token_file(tmp_path, "another-token-altogether")
    other.config.write_text(text.replace(str(served.folder.parent / "token"), str(wrong)))
    done = other.run("bookmark", "shop", "there")
    assert done.returncode == 4 and "another token than its own" in done.stderr and "token_file" in done.stderr
    page = other.run("status")
    assert page.returncode == 4 and "another token" in page.stderr
    assert other.run("ready", "collector").returncode == 0  # it asks for no token


def test_the_token_is_never_printed(served: Appliance) -> None:
    away(served).status("collector")
    with contextlib.suppress(RefusedError):
        away(served, "wrong-wrong-wrong-wrong").status("collector")
    shown = served.cli("config") + served.cli("config", "--json") + served.services["collector"].tail()
    assert "no valid token" in shown and str(served.folder.parent / "token") in shown
    assert TOKEN not in shown and "wrong-wrong" not in shown


@pytest.mark.parametrize("address", ["tcp:0.0.0.0:0", "tcp:[::]:0", "tcp:site-a:10811"])
def test_without_a_token_it_stays_on_loopback(made: Appliance, address: str) -> None:
    text = made.config.read_text().replace("token_file", "ca")
    made.config.write_text(re.sub('control = "[^"]*"', f'control = "{address}"', text))
    done = made.run("collector")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "collector.control" in done.stderr and "token_file" in done.stderr
    assert not (made.folder / "state").exists()


@pytest.mark.parametrize("content", [None, "k33p", "with a space in between it", "umläute-sind-kein-token"])
def test_a_token_file_that_is_none(made: Appliance, tmp_path: Path, content: str | None) -> None:
    (tmp_path / "token").unlink()
    if content is not None:
        (tmp_path / "token").write_text(content)
    done = made.run("collector")
    assert done.returncode == 2 and str(tmp_path / "token") in done.stderr and "openssl rand" in done.stderr
    assert content is None or content not in done.stderr


def test_what_is_allowed_and_not_safe_is_warned_of(made: Appliance, tmp_path: Path) -> None:
    (tmp_path / "token").chmod(0o644)
    made.config.write_text(made.config.read_text().replace('control = "tcp:127.0.0.1:', 'control = "tcp:0.0.0.0:'))
    made.start("collector")
    log = made.services["collector"].tail()
    assert "every user of this machine can read the token" in log and "without TLS" in log
    assert any("control at http://0.0.0.0:" in line for line in made.services["collector"].lines)


def test_tls_with_an_authority_of_ones_own(made: Appliance, tmp_path: Path, peer: Callable[[str], str]) -> None:
    authority = Authority(peer("openssl"), tmp_path / "ca")
    certificate, key = authority.certify("site", "IP:127.0.0.1")
    more = f'[control]\ncertificate = "{certificate}"\nkey = "{key}"\nca = "{authority.ca}"\n'
    text = made.config.read_text().replace("[control]\n", more).replace("http://", "https://")
    made.config.write_text(text)
    made.more["collector"] = made.more["collector"].replace("http://", "https://")
    made.start("collector")
    assert away(made, ca=str(authority.ca)).status("collector")["figures"]
    stranger = Authority(peer("openssl"), tmp_path / "other")
    for ca in ({}, {"ca": str(stranger.ca)}):
        with pytest.raises(UnreachableError, match="ca in"):
            away(made, **ca).status("collector")
    with pytest.raises(httpx.HTTPError):
        httpx.get(url(made).replace("https", "http") + "/healthz")
    # The health check, from a machine that trusts the authority and one that does not.
    far = Appliance(tmp_path, {})
    for trusted, expected in ((authority.ca, 0), (stranger.ca, 5)):
        far.config.write_text(text.replace(str(authority.ca), str(trusted)).replace("/state", "/none"))
        assert far.run("ready", "collector").returncode == expected
    made.stop()
    assert not os.path.exists(paths.api_socket(str(made.folder / "state"), "collector"))
    key.write_text("no key")
    done = made.run("collector")
    assert done.returncode == 2 and str(certificate) in done.stderr


def test_a_body_that_is_too_large_reaches_nobody(served: Appliance) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    child = served.child("collector")
    path = f"{url(served)}/v1/command/verify"
    body = b'{"x": "' + b"x" * guard.MAX_BODY_BYTES + b'"}'
    with contextlib.suppress(httpx.TransportError):  # it may hang up before all of it was sent
        answer = httpx.post(path, content=body, headers=headers | {"Content-Type": "application/json"})
        assert answer.status_code == 413 and answer.json()["exit_code"] == 2
    assert served.child("collector") == child and away(served).status("collector")["figures"]
    assert httpx.post(path, json={}, headers=headers | {"Origin": "https://evil.example"}).status_code == 403


def connections(appliance: Appliance, count: int) -> list[socket.socket]:
    _, port = url(appliance).rsplit(":", 1)
    return [socket.create_connection(("127.0.0.1", int(port)), 5) for _ in range(count)]


def test_a_crowd_on_the_network_keeps_nobody_from_the_unix_socket(served: Appliance) -> None:
    crowd = connections(served, http_server.MAX_OPEN_CONNECTIONS + 8)
    try:
        with pytest.raises(UnreachableError):
            away(served).status("collector")
        assert Client(Reach(str(served.folder / "state"))).status("collector")["figures"]
    finally:
        for sock in crowd:
            sock.close()
    wait_for(lambda: is_served(served), "served again when the crowd is gone")


def is_served(appliance: Appliance) -> bool:
    with contextlib.suppress(UnreachableError):
        return bool(away(appliance).status("collector")["figures"])
    return False


@pytest.mark.slow
def test_who_asks_nothing_is_let_go(served: Appliance) -> None:
    """Also one that begins and never ends, and one that is silent after its first request."""
    silent, slow, second = connections(served, 3)
    slow.sendall(b"GET /healthz HTTP/1.1\r\nHost:")
    second.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = b""
    while not answer.endswith(b"alive\n"):  # head and body come as they like
        answer += second.recv(4096)
    assert answer.startswith(b"HTTP/1.1 200")
    second.sendall(b"GET /hea")
    for sock in (silent, slow, second):
        sock.settimeout(http_server.HEAD_SECONDS + 10)
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(4096) == b""
        sock.close()
    (half,) = connections(served, 1)
    half.sendall(b"POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf")
    half.settimeout(guard.BODY_SECONDS + 10)
    assert half.recv(4096).startswith(b"HTTP/1.1 408")
    half.close()


def test_the_unix_socket_is_for_its_owner_alone(served: Appliance) -> None:
    path = paths.api_socket(str(served.folder / "state"), "collector")
    assert os.stat(path).st_mode & 0o777 == 0o600
