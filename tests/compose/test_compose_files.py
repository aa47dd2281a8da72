"""`docker-compose.yml` and what it mounts, held against the code: ports, commands, paths, hosts, targets."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer

from appliance import paths
from appliance.cli.main import app
from cdp import config
from cdp.config import Config
from tests.compose.files import (
    COMPOSE,
    CONFIGS,
    DOCKERFILE,
    GRAFANA,
    ROLES,
    ROOT,
    THREE,
    compose,
    mounts,
    plain,
    prometheus_targets,
    published,
    services,
)

SERVICES = services()
ONCE = "secrets"  # runs, ends, and is not started again
CONFIG_PATH = "/etc/cdp/cdp.toml"


@pytest.fixture(scope="module", params=["cdp.toml", "cdp-three.toml"])
def loaded(request: pytest.FixtureRequest) -> Config:
    return config.load(str(CONFIGS / request.param))


def host_and_port(address: str) -> tuple[str, int]:
    """Of `tcp:host:port`, `http://host:port` or `host:port`."""
    host, _, port = address.removeprefix("tcp:").rpartition("://")[2].rpartition(":")
    return host, int(port)


def listened(section: Any) -> list[int]:
    return [host_and_port(a)[1] for a in section.listen if a.startswith("tcp:")]


def test_the_services_are_the_roles_and_what_they_need() -> None:
    assert set(ROLES) == {paths.COLLECTOR, paths.RELAY, paths.REPLAYER}
    assert set(SERVICES) == {*ROLES, ONCE, "kafka", "prometheus", GRAFANA}
    assert not [name for name, service in SERVICES.items() if GRAFANA in service.get("depends_on", {})]


@pytest.mark.parametrize("role", ROLES)
def test_commands_are_those_of_the_command_line(role: str) -> None:
    """The image's entry point is `cdp`; the program itself parses what it is given."""
    assert 'ENTRYPOINT ["cdp"]' in DOCKERFILE.read_text().splitlines()
    service = SERVICES[role]
    assert service["command"] == [role] and "entrypoint" not in service
    parsed(service["command"])


def parsed(words: list[str]) -> None:
    """Raises for a command that there is not, or that does not take these arguments."""
    group = typer.main.get_command(app)
    group.commands[words[0]].make_context(words[0], list(words[1:]))  # type: ignore[attr-defined]


@pytest.mark.parametrize(("started", "asked"), [*((role, role) for role in ROLES), ("up", "collector")])
def test_health_is_asked_of_the_role_that_runs(started: str, asked: str, tmp_path: Path) -> None:
    """The image's HEALTHCHECK, with the words of a first process that are those of this container."""
    check = re.search(r"^HEALTHCHECK [^\n]*\\\n  CMD (cdp .*)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert check
    words = tmp_path / "cmdline"
    words.write_bytes(b"\0".join((b"/sbin/docker-init", b"--", b"cdp", started.encode(), b"")))
    script = f"cdp() {{ echo \"$@\"; }}; {check[1].replace('/proc/1/cmdline', str(words))}"
    told = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert told == ["ready", asked]
    parsed(told)


def test_addresses_are_those_of_the_services(loaded: Config) -> None:
    """What others dial is the service's name and the very port that it listens on; all are exposed by the image."""
    exposed = set(map(int, re.search(r"^EXPOSE (.*)$", DOCKERFILE.read_text(), re.MULTILINE)[1].split()))  # type: ignore[index]
    for role in ROLES:
        section = getattr(loaded, role)
        assert host_and_port(section.control_at) == (role, host_and_port(section.control)[1])
        used = {host_and_port(section.control)[1], host_and_port(section.monitor)[1]}
        if role != paths.RELAY:
            assert host_and_port(section.nbd_at) == (role, listened(section)[0])
            used.update(listened(section))
        assert used <= exposed
        assert all(host_and_port(a)[0] == "0.0.0.0" for a in (section.control, section.monitor))


def test_published_ports_are_the_nbd_servers_and_stay_on_this_host(loaded: Config) -> None:
    for name, service in SERVICES.items():
        assert all(host == "127.0.0.1" for host, _, _ in published(service)), f"{name} is open to the network"
    for role in (paths.COLLECTOR, paths.REPLAYER):
        inside = listened(getattr(loaded, role))
        assert [(outside, port) for _, outside, port in published(SERVICES[role])] == [(p, p) for p in inside]


def test_state_and_secrets_are_where_the_configuration_says(loaded: Config) -> None:
    state, token = loaded.appliance.state_dir, loaded.control.token_file
    assert token is not None
    volumes = {}
    for role in ROLES:
        mounted = mounts(SERVICES[role])
        volumes[role], mode = mounted[state]
        assert mode == "rw"
        assert mounted[CONFIG_PATH] == ("./appliance/compose/cdp.toml", "ro")
        assert mounted[os.path.dirname(token)] == ("token", "ro")
    # The relay reads the collector's segment files; nobody else has them.
    assert volumes[paths.RELAY] == volumes[paths.COLLECTOR] != volumes[paths.REPLAYER]
    for _, volume in loaded.volumes():
        folder = os.path.dirname(volume.primary.removeprefix("file:"))
        assert mounts(SERVICES[paths.COLLECTOR])[folder][1] == "rw"
        assert not [name for name in SERVICES if name != paths.COLLECTOR and folder in mounts(SERVICES[name])]


def test_secrets_are_made_where_they_are_read(loaded: Config) -> None:
    """What the first service writes is what the others mount; an image's folder gives a new volume its owner."""
    script, image = (CONFIGS / "make-secrets").read_text(), DOCKERFILE.read_text()
    assert os.stat(CONFIGS / "make-secrets").st_mode & stat.S_IXUSR
    written = re.findall(r"^secret (\S+) (\d+)$", script, re.MULTILINE)
    password = SERVICES[GRAFANA]["environment"]["GF_SECURITY_ADMIN_PASSWORD__FILE"]
    assert dict(written) == {loaded.control.token_file: "400", password: "444"}
    made = mounts(SERVICES[ONCE])
    for path, _ in written:
        folder = os.path.dirname(path)
        assert made[folder][1] == "rw" and re.search(rf"install -d .*{folder}\b", image)
    assert mounts(SERVICES[GRAFANA])[os.path.dirname(password)] == (made[os.path.dirname(password)][0], "ro")
    for folder in (loaded.appliance.state_dir, "/srv/cdp"):
        assert re.search(rf"install -d .*{folder}\b", image)
    waiting = {name for name, s in SERVICES.items() if ONCE in s.get("depends_on", {})}
    assert waiting == {*ROLES, GRAFANA}


def brokers(how_many: int) -> dict[str, dict[str, Any]]:
    """The environment of each broker."""
    first = SERVICES["kafka"]["environment"]
    if how_many == 1:
        return {"kafka": first}
    added = compose(THREE)["services"].items()
    return {name: {**first, **service["environment"]} for name, service in added if name.startswith("kafka")}


def test_brokers_are_found_by_the_names_they_give(loaded: Config) -> None:
    """And all of them know the whole quorum, each its own number."""
    found = brokers(loaded.journal.replication_factor)
    advertised = [e["KAFKA_ADVERTISED_LISTENERS"].removeprefix("PLAINTEXT://") for e in found.values()]
    assert loaded.journal.kind == "kafka"
    assert loaded.journal.bootstrap_servers == advertised
    assert [host_and_port(a)[0] for a in advertised] == list(found)
    assert loaded.journal.replication_factor == len(found)
    quorum = ",".join(f"{number}@{name}:9093" for number, name in enumerate(found, 1))
    assert {e["KAFKA_CONTROLLER_QUORUM_VOTERS"] for e in found.values()} == {quorum}
    assert [e["KAFKA_NODE_ID"] for e in found.values()] == list(range(1, len(found) + 1))
    assert all(e["KAFKA_LOG_DIRS"] in mounts(SERVICES["kafka"]) for e in found.values())


def test_three_brokers_are_the_same_appliance() -> None:
    """Only where the journal goes differs."""
    one, three = (config.load(str(CONFIGS / name)) for name in ("cdp.toml", "cdp-three.toml"))
    keys = ("replication_factor", "min_insync_replicas", "bootstrap_servers")
    assert one.model_dump(exclude={"journal"}) == three.model_dump(exclude={"journal"})
    assert one.journal.model_dump(exclude=set(keys)) == three.journal.model_dump(exclude=set(keys))
    assert three.journal.min_insync_replicas == 2
    changed = compose(THREE)["services"]
    for role in ROLES:
        assert mounts(changed[role]) == {CONFIG_PATH: ("./appliance/compose/cdp-three.toml", "ro")}


def test_prometheus_reads_every_process(loaded: Config) -> None:
    targets = prometheus_targets()
    for role in ROLES:
        port = host_and_port(getattr(loaded, role).monitor)[1]
        assert targets[role] == [f"{role}:{port}"]
    assert set(targets) == {*ROLES, "prometheus"}


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_confined_and_watched(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"] and "no-new-privileges:true" in service["security_opt"]
    assert "privileged" not in service and "cap_add" not in service
    assert service["mem_limit"] and service["pids_limit"] and service["logging"]["options"]["max-size"]
    assert service["restart"] == ("no" if name == ONCE else "unless-stopped")
    if name in (*ROLES, ONCE):
        assert service["read_only"] and service["init"]
        assert service.get("healthcheck", {}) == ({"disable": True} if name == ONCE else {})  # it is the image's own
    else:
        assert service["healthcheck"]["test"]
    variable = re.match(r"\$\{(CDP_[A-Z]*_?IMAGE):-\S+:\S+\}$", service["image"])
    assert variable, f"{name}: the image cannot be chosen, or is not pinned"


@pytest.mark.parametrize("path", [COMPOSE, THREE], ids=lambda p: p.name)
def test_what_is_mounted_exists(path: Path) -> None:
    content = compose(path)
    for service in content["services"].values():
        for source, mode in mounts(service).values():
            if source.startswith("."):
                assert mode == "ro" and (ROOT / source).exists(), f"{source} is mounted and is not there"
            else:
                assert source in content["volumes"], f"the volume {source} is not declared"


def test_the_image_is_built_of_what_its_context_has() -> None:
    """`.dockerignore` lets through what is copied; the base comes from outside; nobody in it is root."""
    lines = DOCKERFILE.read_text().splitlines()
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [word for line in lines if line.startswith("COPY ") and "--from" not in line
              for word in line.split()[1:-1] if not word.startswith("--")]  # fmt: skip
    assert copied and {word.split("/")[0] for word in copied} <= allowed
    assert all((ROOT / word).exists() for word in copied)
    assert {line.split()[1] for line in lines if line.startswith("FROM ")} == {"${CDP_PYTHON_IMAGE}"}
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users and not users[-1].startswith(("0", "root"))
    default = plain(SERVICES[ONCE]["build"]["args"]["CDP_PYTHON_IMAGE"])
    assert f"ARG CDP_PYTHON_IMAGE={default}" in lines
