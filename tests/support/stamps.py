"""A writer that knows what it was promised: every block carries its number and a version, at a queue depth.

After a kill each block must hold the last acknowledged version, or one that was under way; never an older one,
another block's content, or a mixture.
"""

from __future__ import annotations

import random
import struct
import threading

from tests.support.nbd import FLUSH, FUA, WRITE, NbdClient

BLOCK = 4096
_STAMP = struct.Struct("<QQ")
DEPTH = 16
# One in so many requests is a flush, one in so many a write with FUA.
FLUSH_EVERY, FUA_EVERY = 40, 17


def stamped(block: int, version: int) -> bytes:
    """A block's content; version 0 is a block never written."""
    return _STAMP.pack(block, version) * (BLOCK // _STAMP.size) if version else bytes(BLOCK)


class StampWriter:
    """Writes random blocks of one volume until told to stop or until its connection breaks."""

    def __init__(self, size: int, seed: int, pause_seconds: float = 0.0) -> None:
        """`pause_seconds` after each answer makes it a moderate load."""
        self._pause_seconds = pause_seconds
        self.blocks = size // BLOCK
        self.acknowledged = [0] * self.blocks
        self.under_way: dict[int, int] = {}  # block → version sent and not answered
        self.requests = 0
        self._rng, self._version = random.Random(seed), 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def start(self, client: NbdClient) -> None:
        """Goes on over a new connection. `check` must have been called since the last one broke."""
        assert not self.under_way
        self._stop.clear()
        self.error = None
        self._thread = threading.Thread(target=self._run, args=(client,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Until every request is answered, or the connection is found broken (see `error`)."""
        self._stop.set()
        assert self._thread is not None
        self._thread.join(60)
        assert not self._thread.is_alive(), "the writer waits for an answer that does not come"

    def _run(self, client: NbdClient) -> None:
        waiting: dict[int, int | None] = {}  # cookie → block, None for a flush
        try:
            while not self._stop.is_set() or waiting:
                while len(waiting) < DEPTH and not self._stop.is_set():
                    self._send(client, waiting)
                self._receive(client, waiting)
                if self._pause_seconds:
                    self._stop.wait(self._pause_seconds)
            client.close()
        except (OSError, ConnectionError) as e:
            self.error = e

    def _send(self, client: NbdClient, waiting: dict[int, int | None]) -> None:
        self.requests += 1
        if self.requests % FLUSH_EVERY == 0:
            waiting[client.send(FLUSH)] = None
            return
        block = self._rng.randrange(self.blocks)
        while block in self.under_way:  # at most DEPTH of them: overlapping requests have no order
            block = (block + 1) % self.blocks
        self._version += 1
        self.under_way[block] = self._version
        flags = FUA if self.requests % FUA_EVERY == 0 else 0
        waiting[client.send(WRITE, block * BLOCK, 0, stamped(block, self._version), flags)] = block

    def _receive(self, client: NbdClient, waiting: dict[int, int | None]) -> None:
        cookie, error, _ = client.receive()
        block = waiting.pop(cookie)
        if error:
            raise OSError(error, "a request failed")
        if block is not None:
            self.acknowledged[block] = self.under_way.pop(block)

    def check(self, content: bytes) -> None:
        """What the volume holds now against what was promised; it becomes what is expected from here on."""
        for block in range(self.blocks):
            found = content[block * BLOCK : (block + 1) * BLOCK]
            allowed = {self.acknowledged[block], self.under_way.get(block, self.acknowledged[block])}
            version = next((v for v in sorted(allowed) if found == stamped(block, v)), None)
            assert version is not None, (
                f"block {block} holds {_STAMP.unpack_from(found)} and should hold version {sorted(allowed)}"
            )
            self.acknowledged[block] = version
        self.under_way.clear()
