"""A reader's place in a topic: a small file beside what it has applied (never an offset that Kafka keeps).

It may be behind what is applied after a kill, never ahead: what comes again is a duplicate. It is written when the seq
is durable on the reader's side.
"""

from __future__ import annotations

import json
from typing import NamedTuple

from cdp import storage
from cdp.errors import CorruptionError


class Place(NamedTuple):
    """Everything up to `seq` lies before `offset` of the topic `topic_id`; `holder` and `epoch` counted there."""

    topic_id: str
    offset: int
    seq: int
    holder: bytes
    epoch: int


def load(path: str) -> Place | None:
    """None if there is none. Raises CorruptionError, OSError."""
    try:
        raw = json.loads(storage.read_file(path))
        return Place(
            str(raw["topic_id"]), int(raw["offset"]), int(raw["seq"]), bytes.fromhex(raw["holder"]), int(raw["epoch"])
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as e:
        raise CorruptionError(
            f"{path} is not what was written: {e}.", "Remove it: the topic is then read from its beginning."
        ) from e


def save(path: str, place: Place) -> None:
    """Durable when it returns. Raises OSError."""
    content = place._asdict() | {"holder": place.holder.hex()}
    storage.write_file(path, json.dumps(content).encode() + b"\n")
