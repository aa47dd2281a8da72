"""The configuration: what it accepts, what it refuses and how it says so."""

from __future__ import annotations

import contextlib
import os
import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdp import config, config_file, config_values
from cdp.errors import ConfigError

SMALL = """
[[group]]
name = "shop"
[[group.volume]]
name = "db"
primary = "file:db.raw"
size = "1GiB"
"""


def parsed(text: str, folder: str = "/srv/here") -> config.Config:
    return config.parse(tomllib.loads(text), folder)


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parsed(text)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_defaults_of_a_small_file() -> None:
    c = parsed(SMALL)
    group = c.groups[0]
    assert c.appliance.state_dir == "/var/lib/cdp"
    assert (group.window_ns, group.window_size, group.ack, group.max_lag) == (86400 * 10**9, None, "local", 60 * 10**9)
    assert c.journal.segment_size == 64 << 20 and c.journal.max_size == 20 << 30
    assert group.volumes[0].primary == "file:/srv/here/db.raw" and group.volumes[0].size == 1 << 30


def test_every_default_carries_its_reason() -> None:
    ways = (config.Appliance, config.Collector, config.Relay, config.Replayer, config.Control)
    for section in (*ways, config.Journal, config.Group, config.Volume):
        for name, field in section.model_fields.items():
            assert field.description or name == "volumes", f"{section.__name__}.{name}"


def test_relative_paths_are_taken_from_the_folder_of_the_file(tmp_path: Any) -> None:
    file = tmp_path / "cdp.toml"
    file.write_text('[appliance]\nstate_dir = "state"\n[collector]\nlisten = ["unix:state/c.sock"]\n' + SMALL)
    c = config.load(str(file))
    assert c.appliance.state_dir == str(tmp_path / "state")
    assert c.collector.listen == [f"unix:{tmp_path}/state/c.sock"]


TWO_MACHINES = """
[collector]
listen = ["tcp:0.0.0.0:10809"]
control = "tcp:0.0.0.0:10811"
control_at = "https://site-a:10811/"
nbd_at = "tcp:site-a:10809"
[relay]
monitor = "tcp:[::1]:10823"
[replayer]
control = "tcp:127.0.0.1:10812"
nbd_at = "unix:r.sock"
[control]
token_file = "secrets/token"
certificate = "cert.pem"
key = "cert.pem"
ca = "ca.pem"
"""


def test_the_ways_between_two_machines() -> None:
    c = parsed(TWO_MACHINES + SMALL)
    assert (c.collector.control, c.collector.control_at) == ("tcp:0.0.0.0:10811", "https://site-a:10811")
    assert (c.collector.nbd_at, c.replayer.nbd_at) == ("tcp:site-a:10809", "unix:/srv/here/r.sock")
    assert (c.relay.monitor, c.relay.control, c.replayer.control) == ("tcp:[::1]:10823", None, "tcp:127.0.0.1:10812")
    assert c.control.token_file == "/srv/here/secrets/token" and c.control.ca == "/srv/here/ca.pem"
    assert parsed(SMALL).control.token_file is None and parsed(SMALL).collector.control is None


@pytest.mark.parametrize(("address", "loopback"), [
    ("tcp:127.0.0.1:1", True), ("tcp:127.9.9.9:1", True), ("tcp:[::1]:1", True), ("tcp:localhost:1", True),
    ("tcp:0.0.0.0:1", False), ("tcp:[::]:1", False), ("tcp:10.0.0.1:1", False), ("tcp:localhost.evil.example:1", False),
])  # fmt: skip
def test_what_is_loopback(address: str, loopback: bool) -> None:
    assert config_values.is_loopback(address) is loopback


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("size =", "siez ="), ["group[1].volume[1].siez", '"size"']),
        (("[[group]]", "[colector]\nx = 1\n[[group]]"), ["colector", '"collector"']),
        (("[[group]]", "[journal]\nsegmentsize = 1\n[[group]]"), ["journal.segmentsize", '"segment_size"']),
        (('"1GiB"', '"1 gigabyte"'), ["size", "1 gigabyte", "64MiB"]),
        (('"1GiB"', '"1000B"'), ["size"]),
        (('"1GiB"', '"8EiB"'), ["size"]),
        (('name = "db"', 'name = "shop"'), ["shop", "namespace"]),
        (('name = "db"', 'name = "now"'), ["now"]),
        (('name = "db"', 'name = "1db"'), ["1db"]),
        (('name = "db"\n', ""), ["group[1].volume[1].name", "missing"]),
        (("file:db.raw", "ftp:db.raw"), ["ftp:db.raw", "nbd://"]),
        (("file:db.raw", "nbd+unix:///x"), ["nbd+unix"]),
        (("[[group]]", '[journal]\nkind = "kafka"\n[[group]]'), ["bootstrap_servers", "kafka-1:9092"]),
        (("[[group]]", '[journal]\nretention = "1h"\n[[group]]'), ["retention", "kafka", "embedded"]),
        (("[[group]]", '[journal]\nkind = "kafka"\nbootstrap_servers = ["k"]\n[[group]]'), ["'k'", "host:9092"]),
        (
            ("[[group]]", '[journal]\nkind = "kafka"\nbootstrap_servers = ["k:1"]\nreplication_factor = 1\n[[group]]'),
            ["min_insync_replicas", "replication_factor"],
        ),
        (("[[group.volume]]", 'ack = "replicated"\n[[group.volume]]'), ["replicated", "shop", 'kind = "kafka"']),
        (("[[group.volume]]", 'replicated_timeout = "9s"\n[[group.volume]]'), ["replicated_timeout", "local"]),
        (("[[group.volume]]", 'window = "24"\n[[group.volume]]'), ["window", "24h"]),
        (("[[group.volume]]", 'window = "0s"\n[[group.volume]]'), ["window"]),
        (("[[group]]", '[collector]\nlisten = ["10809"]\n[[group]]'), ["collector.listen[1]", "10809"]),
        (("[[group]]", '[collector]\nlisten = ["tcp:h:99999"]\n[[group]]'), ["collector.listen[1]", "99999"]),
        (("[[group]]", f'[collector]\nlisten = ["unix:{"x" * 120}"]\n[[group]]'), ["longer than 107"]),
        (("[[group]]", '[collector]\nlisten = ["tcp:h:1"]\n[replayer]\nlisten = ["tcp:h:1"]\n[[group]]'), ["tcp:h:1"]),
        (("[[group]]", '[relay]\nmonitor = "tcp:h:1"\n[replayer]\nlisten = ["tcp:h:1"]\n[[group]]'), ["tcp:h:1"]),
        (("[[group]]", '[collector]\ncontrol = "unix:/x"\n[[group]]'), ["collector.control", "unix:/x", "tcp:"]),
        (
            ("[[group]]", '[collector]\ncontrol = "tcp:0.0.0.0:10811"\n[[group]]'),
            ["collector.control", "loopback", "token_file", "16"],
        ),
        (("[[group]]", '[replayer]\ncontrol_at = "site-b:10812"\n[[group]]'), ["replayer.control_at", "https://host"]),
        (("[[group]]", '[replayer]\ncontrol_at = "https://u:p@h"\n[[group]]'), ["replayer.control_at", "https://host"]),
        (("[[group]]", '[replayer]\ncontrol_at = "https://h/v1"\n[[group]]'), ["replayer.control_at", "https://host"]),
        (("[[group]]", '[control]\nkey = "k"\n[[group]]'), ["control", "certificate"]),
        (("[[group]]", '[control]\ntoken = "secret"\n[[group]]'), ["control.token", '"token_file"']),
        (
            ("[[group]]", '[relay]\ncontrol_at = "http://h"\n[control]\ncertificate = "c"\nkey = "k"\n[[group]]'),
            ["relay.control_at", "TLS", "https://"],
        ),
    ],
)
def test_what_is_wrong_is_named(change: tuple[str, str], words: list[str]) -> None:
    text = SMALL.replace(*change)
    assert text != SMALL
    message = refused(text)
    assert all(word in message for word in words), message


def test_one_primary_serves_one_volume_and_counts_are_limited() -> None:
    volume = '[[group.volume]]\nname = "v{}"\nprimary = "{}"\nsize = "1MiB"\n'
    assert "two volumes" in refused(SMALL + volume.format(1, "file:./db.raw"))
    assert parsed(SMALL + "".join(volume.format(i, "none") for i in range(config.MAX_VOLUMES_IN_GROUP - 1)))
    refused(SMALL + "".join(volume.format(i, "none") for i in range(config.MAX_VOLUMES_IN_GROUP)))


def test_primaries_are_made_absolute_and_kept() -> None:
    for given_, kept in {
        "none": "none",
        "file:/dev/vda": "file:/dev/vda",
        "nbd://host:10809/x": "nbd://host:10809/x",
        "nbd+unix:///x?socket=s.sock": "nbd+unix:///x?socket=/srv/here/s.sock",
    }.items():
        assert parsed(SMALL.replace("file:db.raw", given_)).groups[0].volumes[0].primary == kept


def test_window_by_size_alone_has_no_age() -> None:
    group = parsed(SMALL.replace("[[group.volume]]", 'window_size = "1GiB"\n[[group.volume]]')).groups[0]
    assert (group.window_ns, group.window_size) == (None, 1 << 30)


def test_lookup_order(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert config_file.find("a.toml", {"CDP_CONFIG": "/b.toml"}) == str(tmp_path / "a.toml")
    assert config_file.find(None, {"CDP_CONFIG": "/b.toml"}) == "/b.toml"
    if not os.path.exists("/etc/cdp/cdp.toml"):
        with pytest.raises(ConfigError, match="cdp init"):
            config_file.find(None, {})
    (tmp_path / "cdp.toml").write_text(SMALL)
    assert config_file.find(None, {}) == str(tmp_path / "cdp.toml")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a = ", b"[" * 100_000, b"#" * (2 << 20)])
def test_garbage_is_one_error(tmp_path: Any, content: bytes) -> None:
    file = tmp_path / "cdp.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError):
        config.load(str(file))
    with pytest.raises(ConfigError):
        config.load(str(tmp_path / "missing.toml"))
    with pytest.raises(ConfigError):
        config.load(str(tmp_path))


@given(st.integers(0, 10**18 - 1))
def test_sizes_survive_printing(number: int) -> None:
    assert config_values.parse_size(config_values.format_size(number)) == number


@given(st.integers(0, 10**9))
def test_durations_survive_printing(milliseconds: int) -> None:
    number_ns = milliseconds * 10**6
    assert config_values.parse_duration_ns(config_values.format_duration(number_ns)) == number_ns


@given(st.text())
def test_any_text_is_a_size_or_an_error(text: str) -> None:
    for parse in (config_values.parse_size, config_values.parse_duration_ns):
        with contextlib.suppress(ValueError):
            assert parse(text) >= 0


KEYS = st.sampled_from(["group", "volume", "name", "size", "journal", "kind", "listen", "collector", "x"])
ANYTHING = st.recursive(
    st.none() | st.integers() | st.text() | st.booleans(), lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner)
)


@given(st.dictionaries(KEYS, ANYTHING))
def test_any_content_is_a_configuration_or_a_config_error(content: Any) -> None:
    with contextlib.suppress(ConfigError):
        config.parse(content, "/srv")


VOLUME = {"name": "db", "primary": "file:x", "size": "1GiB"}


@pytest.mark.parametrize(("content", "says"), [
    ({}, "there is no [[group]]"),
    ({"group": 3}, "double brackets, [[group]]"),
    ({"group": [{"name": "g", "volume": "db"}]}, "double brackets, [[group.volume]]"),
    ({"group": [{"name": "g", "volume": [VOLUME]}], "collector": {"listen": "tcp:h:1"}}, "a list of strings"),
    ({"group": [{"name": "g", "volume": [VOLUME]}], "journal": {"kind": "kafak"}}, "must be 'embedded'"),
    ({"group": [{"name": "g", "volume": [VOLUME | {"size": -5}]}]}, "-5 is no size"),
])  # fmt: skip
def test_what_is_wrong_is_said_in_words_of_the_file(content: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config.parse(content, "/srv")
    assert says in refused.value.message and "Input" not in refused.value.message
