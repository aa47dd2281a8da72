"""`cdp config`: the effective configuration, with the reason of every default."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import typer
from pydantic import BaseModel

from appliance.cli.context import Json, config, config_path, emit
from cdp.config import KAFKA_KEYS, REPLICATED_KEYS
from cdp.config_values import format_duration, format_size

_DURATIONS = ("window", "max_lag", "retention", "keep_after_ack", "replicated_timeout")
_SIZES = ("segment_size", "max_size", "window_size", "size")


def add_to(app: typer.Typer) -> None:
    app.command("config", epilog="Example: cdp config | less")(show)


def show(as_json: Json = False) -> None:
    """Print the effective configuration as TOML: paths absolute, defaults filled in, each with its reason."""
    if as_json:
        emit({"path": config_path(), **config().model_dump(by_alias=True)})
        return
    print(f"# {config_path()}")
    print("\n".join(_lines()))


def _lines() -> Iterator[str]:
    c = config()
    for name in ("appliance", "collector", "relay", "replayer", "control", "journal"):
        lines = list(_section(getattr(c, name)))
        yield from ("", f"[{name}]", *lines) if lines else ()  # one machine has no [relay] and no [control]
    for group in c.groups:
        yield from ("", "[[group]]", *_section(group))
        for volume in group.volumes:
            yield from ("", "[[group.volume]]", *_section(volume))


def _section(section: BaseModel) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value: Any = getattr(section, name)
        if name == "volumes" or (value is None and name != "window"):
            continue
        if name in KAFKA_KEYS and section.kind != "kafka":  # type: ignore[attr-defined]
            continue
        if name in REPLICATED_KEYS and section.ack != "replicated":  # type: ignore[attr-defined]
            continue
        if name == "window":
            value = section.window_ns  # type: ignore[attr-defined]
            if value is None:
                continue
        reason = "" if name in section.model_fields_set else f"  # default: {field.description}"
        yield f"{name} = {_text(name, value)}{reason}"


def _text(name: str, value: Any) -> str:
    if name in _DURATIONS:
        value = format_duration(value)
    elif name in _SIZES:
        value = format_size(value)
    return json.dumps(value)  # strings and lists of strings are written alike in TOML
