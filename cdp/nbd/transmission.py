"""Transmission without I/O: requests out of received bytes, replies into bytes.

`Parser.parse` validates each request against its export before anyone executes it: what is refused is in `refused`
with its errno, what is answered without work in `empty`, everything else in `requests`. Bytes in, tuples out; a
WRITE's data is a view of the bytes it was parsed from.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable, Sequence

from cdp.nbd.contract import Export, Request
from cdp.nbd.wire import (
    BLOCK_STATUS,
    CACHE,
    CAN_MULTI_CONN,
    CHUNK,
    CHUNK_DATA,
    CHUNK_DONE,
    CHUNK_ERROR,
    CHUNK_HOLE,
    CHUNK_MAGIC,
    DF,
    DISC,
    FAST_ZERO,
    FLUSH,
    FUA,
    HAS_FLAGS,
    MAX_PAYLOAD_BYTES,
    NO_HOLE,
    READ,
    READ_ONLY,
    REQ_ONE,
    REQUEST_BYTES,
    REQUEST_HEAD,
    REQUEST_MAGIC,
    ROTATIONAL,
    SEND_CACHE,
    SEND_DF,
    SEND_FAST_ZERO,
    SEND_FLUSH,
    SEND_FUA,
    SEND_TRIM,
    SEND_WRITE_ZEROES,
    SIMPLE,
    SIMPLE_MAGIC,
    TRIM,
    TYPE_BLOCK_STATUS,
    TYPE_ERROR,
    TYPE_NONE,
    TYPE_OFFSET_DATA,
    TYPE_OFFSET_HOLE,
    WRITE,
    WRITE_ZEROES,
    ProtocolError,
    wire_error,
)  # fmt: skip

# What one send buffer holds: the READ replies of one batch, with their heads. A larger READ is a batch of its own.
BATCH_REPLY_BYTES = 4 << 20
# Room for the head of a reply with data, simple or structured.
REPLY_HEAD_BYTES = CHUNK_DATA.size
# Extents in one BLOCK_STATUS reply (8 bytes each); fewer than asked for is allowed, the client asks again.
MAX_EXTENTS = 1 << 15

_PLAIN = REQUEST_MAGIC << 32 | READ  # magic, no flags, command
_PLAIN_WRITE = REQUEST_MAGIC << 32 | WRITE
OK8 = SIMPLE.pack(SIMPLE_MAGIC, 0, b"")[:8]

# Flags that a command may carry; FUA is allowed on every command, and means nothing where nothing is written.
_FLAGS = {
    READ: FUA | DF, WRITE: FUA, FLUSH: FUA, TRIM: FUA, CACHE: FUA,
    WRITE_ZEROES: FUA | NO_HOLE | FAST_ZERO, BLOCK_STATUS: FUA | REQ_ONE,
}  # fmt: skip
_MODIFYING = (WRITE, TRIM, WRITE_ZEROES)


def transmission_flags(export: Export, structured: bool) -> int:
    """What the handshake tells about an export."""
    flags = HAS_FLAGS
    if export.read_only:
        flags |= READ_ONLY
    else:
        flags |= (SEND_TRIM if export.can_trim else 0) | (SEND_FUA if export.can_flush else 0)
        flags |= SEND_WRITE_ZEROES | SEND_FAST_ZERO if export.can_zero else 0
    flags |= SEND_FLUSH if export.can_flush else 0
    flags |= SEND_CACHE if export.can_cache else 0
    flags |= CAN_MULTI_CONN if export.multi_conn else 0
    flags |= ROTATIONAL if export.rotational else 0
    return flags | (SEND_DF if structured else 0)


class Parser:
    """Requests of one connection. After `parse`: the lists, and why it stopped short of the end, if it did."""

    __slots__ = (
        "requests", "refused", "empty", "disconnect", "needed_bytes", "reply_bytes", "skip_bytes", "_size",
        "_read_only", "_commands", "_fast_zero", "_status", "_read_mask", "_write_mask",
    )  # fmt: skip

    def __init__(self, export: Export, structured: bool, contexts: Sequence[str]) -> None:
        self.requests: list[Request] = []
        self.refused: list[tuple[bytes, int]] = []  # cookie, errno
        self.empty: list[tuple[int, bytes, int]] = []  # command, cookie, offset: no length, nothing to do
        self.disconnect = False  # a DISC was met: nothing may follow
        self.needed_bytes = 0  # of the unfinished request at the end (header and data), 0 if its header is cut too
        self.reply_bytes = 0  # READ payload, with heads, that `requests` will answer
        self.skip_bytes = 0  # data of a refused WRITE that is yet to come
        self._size = export.size
        self._read_only = export.read_only
        able = {READ: True, WRITE: True, FLUSH: export.can_flush, TRIM: export.can_trim, CACHE: export.can_cache,
                WRITE_ZEROES: export.can_zero, BLOCK_STATUS: bool(contexts)}  # fmt: skip
        fua = FUA if export.can_flush else 0
        df = DF if structured else 0
        self._commands = {c: _FLAGS[c] & ~(FUA ^ fua) & ~(DF ^ df) for c, can in able.items() if can}
        self._fast_zero = export.can_zero_fast
        # A READ or WRITE with flags that it may carry looks like one without them through these.
        self._read_mask = ~(self._commands[READ] << 16)
        self._write_mask = ~(self._commands[WRITE] << 16)

    def parse(self, view: memoryview, at: int, end: int) -> int:
        """Takes whole requests from `view[at:end]` until it ends, a DISC, or a batch's worth of READs.

        Returns where it stopped. Raises ProtocolError for bytes that are no request.
        """
        requests: list[Request] = []
        self.requests = requests
        self.needed_bytes = 0
        reply_bytes = 0
        if self.skip_bytes:
            skipped = min(self.skip_bytes, end - at)
            self.skip_bytes -= skipped
            at += skipped
        size, writable, unpack = self._size, not self._read_only, REQUEST_HEAD.unpack_from
        read_mask, write_mask = self._read_mask, self._write_mask
        while end - at >= REQUEST_BYTES:
            head, cookie, offset, length = unpack(view, at)
            good = 0 < length <= MAX_PAYLOAD_BYTES and offset + length <= size
            if good and head & write_mask == _PLAIN_WRITE and writable:
                start = at + REQUEST_BYTES
                stop = start + length
                if stop > end:
                    self.needed_bytes = REQUEST_BYTES + length
                    break
                requests.append((WRITE, head >> 16 & 0xFFFF, cookie, offset, length, view[start:stop]))
                at = stop
            elif good and head & read_mask == _PLAIN:
                if reply_bytes + length + REPLY_HEAD_BYTES > BATCH_REPLY_BYTES and requests:
                    break
                reply_bytes += length + REPLY_HEAD_BYTES
                requests.append((READ, head >> 16 & 0xFFFF, cookie, offset, length, None))
                at += REQUEST_BYTES
                if reply_bytes > BATCH_REPLY_BYTES:
                    break
            else:
                at = self._other(head, cookie, offset, length, at + REQUEST_BYTES, end)
                if self.disconnect:
                    break
        self.reply_bytes = reply_bytes
        return at

    def _other(self, head: int, cookie: bytes, offset: int, length: int, at: int, end: int) -> int:
        """Any request that is not a plain, good READ or WRITE; `at` is behind its header. Returns where it ends."""
        if head >> 32 != REQUEST_MAGIC:
            raise ProtocolError(f"request magic {head >> 32:#010x}")
        flags, command = head >> 16 & 0xFFFF, head & 0xFFFF
        if command == DISC:
            self.disconnect = True
            return at
        refusal = self._refusal(command, flags, offset, length)
        if refusal:
            self.refused.append((cookie, refusal))
        elif length == 0 and command != FLUSH:
            self.empty.append((command, cookie, offset))
        else:
            self.requests.append((command, flags, cookie, offset, length, None))
        if command == WRITE:  # its data is passed over, also what is yet to come
            skipped = min(length, end - at)
            self.skip_bytes = length - skipped
            at += skipped
        return at

    def _refusal(self, command: int, flags: int, offset: int, length: int) -> int:
        """The errno that a request is refused with, or 0."""
        if command in _MODIFYING and self._read_only:
            return errno.EPERM
        allowed = self._commands.get(command)
        if allowed is None or flags & ~allowed:
            return errno.EINVAL
        if command == FLUSH:
            return errno.EINVAL if offset or length else 0
        if command in (READ, WRITE) and length > MAX_PAYLOAD_BYTES:
            return errno.EINVAL
        if offset + length > self._size:
            return errno.ENOSPC if command in (WRITE, WRITE_ZEROES) else errno.EINVAL
        if command == BLOCK_STATUS and length == 0:
            return errno.EINVAL
        if flags & FAST_ZERO and not self._fast_zero:
            return errno.ENOTSUP
        return 0


def ok(cookies: Iterable[bytes]) -> bytes:
    """Simple replies of success without payload, one for each cookie."""
    return OK8.join((b"", *cookies))


def error(cookie: bytes, number: int, structured: bool, message: str = "") -> bytes:
    """A reply of failure; `number` is an errno. Where structured replies were agreed on, every error is one."""
    if not structured:
        return SIMPLE.pack(SIMPLE_MAGIC, wire_error(number), cookie)
    text = message.encode()[:1024]
    head = CHUNK.pack(CHUNK_MAGIC, CHUNK_DONE, TYPE_ERROR, cookie, CHUNK_ERROR.size + len(text))
    return head + CHUNK_ERROR.pack(wire_error(number), len(text)) + text


def data_head(cookie: bytes, offset: int, length: int, structured: bool, done: bool = True) -> bytes:
    """What goes in front of a READ's payload."""
    if not structured:
        return SIMPLE.pack(SIMPLE_MAGIC, 0, cookie)
    flags = CHUNK_DONE if done else 0
    return CHUNK_DATA.pack(CHUNK_MAGIC, flags, TYPE_OFFSET_DATA, cookie, length + 8, offset)


def hole(cookie: bytes, offset: int, length: int, done: bool = True) -> bytes:
    """A chunk of a structured READ reply: zeros that are not carried."""
    return CHUNK_HOLE.pack(CHUNK_MAGIC, CHUNK_DONE if done else 0, TYPE_OFFSET_HOLE, cookie, 12, offset, length)


def empty_reply(command: int, cookie: bytes, structured: bool) -> bytes:
    """Success for a request of no length."""
    if structured and command == READ:
        return CHUNK.pack(CHUNK_MAGIC, CHUNK_DONE, TYPE_NONE, cookie, 0)
    return ok((cookie,))


def clip_extents(extents: Iterable[tuple[int, int]], length: int, only_one: bool) -> list[tuple[int, int]]:
    """Neighbours with equal flags joined, ended where the request ends, at most MAX_EXTENTS of them."""
    clipped: list[tuple[int, int]] = []
    for extent_length, flags in extents:
        extent_length = min(extent_length, length)
        if extent_length <= 0:
            continue
        if clipped and clipped[-1][1] == flags:
            clipped[-1] = (clipped[-1][0] + extent_length, flags)
        elif len(clipped) == (1 if only_one else MAX_EXTENTS):
            break
        else:
            clipped.append((extent_length, flags))
        length -= extent_length
    return clipped


def block_status(cookie: bytes, context_id: int, extents: Sequence[tuple[int, int]], done: bool) -> bytes:
    """One context's chunk of a BLOCK_STATUS reply."""
    numbers = [number for extent in extents for number in extent]
    payload = struct.pack(f">I{len(numbers)}I", context_id, *numbers)
    head = CHUNK.pack(CHUNK_MAGIC, CHUNK_DONE if done else 0, TYPE_BLOCK_STATUS, cookie, len(payload))
    return head + payload
