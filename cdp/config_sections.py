"""The sections of a configuration that say where the processes are: their folder, addresses, and how others reach them.

`listen` is NBD, for production and for readers of the past. `control` is the HTTP API on TCP besides the unix socket in
the state folder, `monitor` the part of it that needs no token. `control_at` and `nbd_at` are what another machine
dials, which may differ from what is listened on. All machines can so share one file.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cdp.config_file import DEFAULT_STATE_DIR
from cdp.config_values import Address, Path, TcpAddress, Url

# Addresses are for networks and sockets of one machine.
MAX_ADDRESSES = 8


class Section(BaseModel):
    """A table of the file: unknown keys are refused, and nothing changes it once it is checked."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Appliance(Section):
    """`[appliance]`"""

    state_dir: Path = Field(
        default=DEFAULT_STATE_DIR, description="journal, replicas and history; a service's place"
    )


class Relay(Section):
    """`[relay]`, and what the other two processes share with it."""

    control: TcpAddress | None = Field(
        default=None, description="not on TCP: on one machine the unix socket in state_dir is all that is needed"
    )
    monitor: TcpAddress | None = Field(
        default=None, description="not on TCP: nobody is given figures without a token who was not meant to have them"
    )
    control_at: Url | None = Field(default=None, description="no other machine asks this one")


class Collector(Relay):
    """`[collector]`"""

    listen: list[Address] = Field(
        default=["unix:/run/cdp/collector.sock", "tcp:127.0.0.1:10809"],
        description="where production connects; 10809 is the NBD port, on loopback because NBD has no password",
        min_length=1, max_length=MAX_ADDRESSES,
    )  # fmt: skip
    nbd_at: Address | None = Field(default=None, description="no rollback from another machine")


class Replayer(Relay):
    """`[replayer]`"""

    listen: list[Address] = Field(
        default=["unix:/run/cdp/replayer.sock", "tcp:127.0.0.1:10810"],
        description="where past states are read; loopback, as they hold the same data as production",
        min_length=1, max_length=MAX_ADDRESSES,
    )  # fmt: skip
    nbd_at: Address | None = Field(default=None, description="no export from another machine")


class Control(Section):
    """`[control]`: the API on TCP, for who serves it and for who asks. The token itself stays in its file."""

    token_file: Path | None = Field(default=None, description="no token; then `control` must stay on loopback")
    certificate: Path | None = Field(default=None, description="no TLS: a network of one's own, or a proxy does it")
    key: Path | None = Field(default=None, description="no TLS")
    ca: Path | None = Field(default=None, description="the system's authorities are trusted")

    @model_validator(mode="after")
    def _check(self) -> Control:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together (one file may hold both: name it twice)")
        return self
