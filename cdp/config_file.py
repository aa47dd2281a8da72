"""Which file is the configuration, and what it says before it is checked. Needs the standard library alone."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from typing import Any

from cdp.errors import ConfigError

# The file is small; more than this is not a configuration.
MAX_FILE_BYTES = 1 << 20
# Of [appliance]; here for who reads the file without checking it.
DEFAULT_STATE_DIR = "/var/lib/cdp"


def find(explicit: str | None, environ: Mapping[str, str] = os.environ) -> str:
    """The path of the configuration: `--config`, $CDP_CONFIG, ./cdp.toml, /etc/cdp/cdp.toml. Raises ConfigError."""
    named = explicit or environ.get("CDP_CONFIG")
    if named:
        return os.path.abspath(named)
    for path in ("cdp.toml", "/etc/cdp/cdp.toml"):
        if os.path.exists(path):
            return os.path.abspath(path)
    raise ConfigError(
        "There is no configuration: neither ./cdp.toml nor /etc/cdp/cdp.toml exists.",
        "Write one with `cdp init`, or name yours with --config or $CDP_CONFIG.",
    )


def read(path: str) -> dict[str, Any]:
    """The decoded TOML of a file. Raises ConfigError."""
    try:
        with open(path, "rb") as f:
            raw = f.read(MAX_FILE_BYTES + 1)
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}.", "Write one with `cdp init`.") from None
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB.", "Is it a configuration?")
    try:
        return tomllib.loads(raw.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as e:
        raise ConfigError(f"{path} is not valid TOML: {e}.", "Correct the file.") from None
