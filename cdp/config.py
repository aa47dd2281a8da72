"""The configuration: the content of `cdp.toml` checked by pydantic, every default with its reason.

Promises: an unknown key is refused by its name and with the nearest known one; a size or a duration carries its
unit; a relative path is taken from the folder of the configuration file, so that a tree can be moved; whoever holds
a `Config` need not check anything again. Every failure is a ConfigError (exit code 2) that names file and key.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from cdp import config_file
from cdp.config_kafka import SECURITY_KEYS, KafkaSecurity
from cdp.config_sections import MAX_ADDRESSES, Appliance, Collector, Control, Relay, Replayer, Section
from cdp.config_values import Broker, Duration, Name, Primary, Size, is_loopback
from cdp.errors import ConfigError

# Every group has its own journal, replica thread and index: some 10 MiB and a few descriptors each.
MAX_GROUPS = 16
# Volumes of a group share one journal stream and one intent map.
MAX_VOLUMES_IN_GROUP = 64
# Keys of [journal] that mean something to Kafka alone.
KAFKA_KEYS = SECURITY_KEYS | {
    "bootstrap_servers", "topic_prefix", "replication_factor", "min_insync_replicas", "retention", "keep_after_ack",
}  # fmt: skip
# Keys of a group that mean something to ack = "replicated" alone.
REPLICATED_KEYS = frozenset({"replicated_timeout", "replicated_fallback"})
# Above this, file offsets and NBD tools begin to differ; no disk is near.
MAX_VOLUME_BYTES = 1 << 52
# A sector: what a guest's disk is made of.
SECTOR_BYTES = 512


class Journal(Section, KafkaSecurity):
    """`[journal]`"""

    kind: Literal["embedded", "kafka"] = Field(default="embedded", description="segment files: nothing else to run")
    segment_size: Size = Field(
        default=64 << 20, description="big enough for long sequential writes, small enough to be freed soon",
        ge=1 << 20, le=4 << 30,
    )  # fmt: skip
    max_size: Size = Field(
        default=20 << 30, description="of each group; hours of a busy volume while the replayer is away", ge=8 << 20
    )
    bootstrap_servers: list[Broker] = Field(
        default=[], description="kafka only: where its brokers are found", max_length=MAX_ADDRESSES
    )
    topic_prefix: str = Field(
        default="cdp.journal.", description="kafka only: the topic is this and the group's name",
        pattern=r"^[A-Za-z0-9._-]{0,100}$",
    )  # fmt: skip
    replication_factor: int = Field(default=3, description="kafka only: two brokers may be lost", ge=1, le=9)
    min_insync_replicas: int = Field(
        default=2, description="kafka only: what is acknowledged is on two brokers", ge=1, le=9
    )
    retention: Duration = Field(
        default=7 * 86400 * 10**9, description="kafka only: what a replayer may be away for", ge=60 * 10**9
    )
    keep_after_ack: Duration = Field(
        default=600 * 10**9, description="kafka only: an acknowledgement is not a sync, brokers sync within minutes"
    )

    @model_validator(mode="after")
    def _check(self) -> Journal:
        if self.kind == "kafka":
            self._check_kafka()
        elif self.model_fields_set & KAFKA_KEYS:
            given = ", ".join(sorted(self.model_fields_set & KAFKA_KEYS))
            raise ValueError(f'{given} belong to kind = "kafka", but kind is "embedded"')
        if self.max_size < 4 * self.segment_size:
            raise ValueError("max_size must hold at least four segments of segment_size")
        return self

    def _check_kafka(self) -> None:
        if not self.bootstrap_servers:
            raise ValueError('bootstrap_servers is missing; write it like ["kafka-1:9092", "kafka-2:9092"]')
        if self.min_insync_replicas > self.replication_factor:
            raise ValueError("min_insync_replicas must not be greater than replication_factor")
        self.check_security()


class Volume(Section):
    """`[[group.volume]]`"""

    name: Name = Field(description="its export name on both servers")
    primary: Primary = Field(description="where production data lives")
    size: Size = Field(description="bytes, whole sectors", ge=4096, le=MAX_VOLUME_BYTES, multiple_of=SECTOR_BYTES)


class Group(Section):
    """`[[group]]`"""

    name: Name = Field(description="of its journal, for bookmarks and rollbacks of all its volumes")
    window: Duration | None = Field(default=None, description="24h unless window_size is given: time to notice")
    window_size: Size | None = Field(default=None, description="no limit: history is kept by time alone", ge=64 << 20)
    ack: Literal["local", "replicated"] = Field(default="local", description="nothing else slows production")
    replicated_timeout: Duration = Field(
        default=30 * 10**9, description='ack = "replicated" only: guests wait for a disk so long', gt=0
    )
    replicated_fallback: Literal["refuse", "local"] = Field(
        default="refuse", description='ack = "replicated" only: after it a flush fails; "local": it is answered'
    )
    max_lag: Duration = Field(default=60 * 10**9, description="a replayer that is a minute behind wants a look", gt=0)
    volumes: list[Volume] = Field(alias="volume", min_length=1, max_length=MAX_VOLUMES_IN_GROUP)

    @property
    def window_ns(self) -> int | None:
        """Age up to which points are kept; None: by size alone."""
        return self.window if self.window is not None or self.window_size is not None else 86400 * 10**9

    @model_validator(mode="after")
    def _check(self) -> Group:
        given = self.model_fields_set & REPLICATED_KEYS
        if given and self.ack != "replicated":
            raise ValueError(f'{", ".join(sorted(given))} belong to ack = "replicated", but ack is "local"')
        if self.window == 0:
            raise ValueError("window must be longer than nothing")
        return self


class Config(Section):
    """The whole file."""

    appliance: Appliance = Appliance()
    collector: Collector = Collector()
    relay: Relay = Relay()
    replayer: Replayer = Replayer()
    control: Control = Control()
    journal: Journal = Journal()
    groups: list[Group] = Field(alias="group", min_length=1, max_length=MAX_GROUPS)

    @model_validator(mode="after")
    def _check(self) -> Config:
        names: set[str] = set()
        for name in self._names():
            if name in names:
                raise ValueError(f"the name {name!r} is given twice; volumes and groups share one namespace")
            names.add(name)
        primaries: set[str] = set()
        for _, volume in self.volumes():
            if volume.primary in primaries:
                raise ValueError(f"the primary {volume.primary} is given to two volumes")
            primaries.update({volume.primary} - {"none"})
        for group in self.groups:
            if group.ack == "replicated" and self.journal.kind != "kafka":
                raise ValueError(
                    f'the group {group.name} has ack = "replicated", which needs kind = "kafka" in [journal]: '
                    "segment files are on this machine alone"
                )
        self._check_addresses()
        return self

    def _check_addresses(self) -> None:
        sections = {"collector": self.collector, "relay": self.relay, "replayer": self.replayer}
        listen = [*self.collector.listen, *self.replayer.listen]
        listen += [a for section in sections.values() for a in (section.control, section.monitor) if a]
        twice = next((a for i, a in enumerate(listen) if a in listen[:i] and not a.endswith(":0")), None)
        if twice:
            raise ValueError(f"the address {twice} is given twice")
        for name, section in sections.items():
            if section.control and not is_loopback(section.control) and self.control.token_file is None:
                raise ValueError(
                    f"{name}.control = {section.control!r} is outside of loopback, where everyone could roll a volume "
                    "back: name a file with a token of at least 16 characters as token_file in [control]"
                )
            if section.control_at and section.control_at.startswith("http:") and self.control.certificate:
                raise ValueError(
                    f"{name}.control_at = {section.control_at!r}: with a certificate the API speaks TLS; write https://"
                )

    def _names(self) -> Iterator[str]:
        for group in self.groups:
            yield group.name
            yield from (volume.name for volume in group.volumes)

    def volumes(self) -> Iterator[tuple[Group, Volume]]:
        """Every volume with its group."""
        for group in self.groups:
            for volume in group.volumes:
                yield group, volume


def load(path: str) -> Config:
    """Reads and checks one file. Raises ConfigError."""
    return parse(config_file.read(path), os.path.dirname(os.path.abspath(path)), path)


def parse(content: dict[str, Any], folder: str, path: str = "configuration") -> Config:
    """Checks decoded TOML; relative paths are taken from `folder`. Raises ConfigError."""
    try:
        return Config.model_validate(content, context={"folder": folder})
    except ValidationError as e:
        errors = sorted(e.errors(), key=lambda error: error["type"] != "extra_forbidden")
        more = f" {len(errors) - 1} more after it." if len(errors) > 1 else ""
        raise ConfigError(f"{path}: {_explain(errors[0])}.", f"Correct the file.{more}") from None


# What pydantic says for programmers, in words for who edits the file.
_TEXTS = {
    "list_type": 'must be a list of strings, like ["tcp:127.0.0.1:10809"]',
    "too_short": "must not be empty",
    "model_type": "must be a section of its own, in brackets",
    "string_type": "must be a string, in quotes",
}
_TABLES = {"group": "[[group]], once for each group", "volume": "[[group.volume]], once for each volume"}


def _explain(error: Any) -> str:
    """One clause: where, and what is wrong there."""
    location = [part for part in error["loc"] if not (isinstance(part, str) and part.startswith("function"))]
    where = "".join(f"[{p + 1}]" if isinstance(p, int) else f".{p}" for p in location).lstrip(".")
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(location[-1]), _known_keys(location[:-1]), 1, 0.5)
        return f"unknown key {where}" + (f' (did you mean "{near[0]}"?)' if near else "")
    if error["type"] == "missing":
        return f"{where} is missing" if where != "group" else "there is no [[group]] with volumes to protect"
    text = _TEXTS.get(error["type"]) or str(error["msg"]).removeprefix("Value error, ").replace("Input should", "must")
    if error["type"] in ("list_type", "too_short") and location[-1] in _TABLES:
        return f"{where} is a section with double brackets, {_TABLES[location[-1]]}"
    return f"{where}: {text}" if where else text


def _known_keys(location: list[Any]) -> list[str]:
    """The keys of the section at `location` (keys and indexes from the top)."""
    section: Any = Config
    for part in location:
        if isinstance(part, str):
            field = next(f for n, f in section.model_fields.items() if (f.alias or n) == part)
            section = get_args(field.annotation)[0] if get_args(field.annotation) else field.annotation
    return [field.alias or name for name, field in section.model_fields.items()]
