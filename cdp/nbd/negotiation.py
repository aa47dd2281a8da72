"""The handshake without I/O: fixed newstyle, bytes in, bytes out.

`Negotiation.receive` takes what came and returns what to send; `outcome` says how it ended. The catalog that it asks
for names and exports decides what exists; an export that was opened for INFO or a metadata context stays open for a
GO of the same name, so that a name which is resolved at opening means the same in all of them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable

from cdp.errors import CdpError, NotFoundError
from cdp.nbd import wire
from cdp.nbd.contract import Export
from cdp.nbd.transmission import transmission_flags
from cdp.nbd.wire import OPTION, OPTION_MAGIC, OPTION_REPLY, OPTION_REPLY_MAGIC, ProtocolError

GREETING = struct.pack(">8s8sH", wire.INIT_MAGIC, OPTION_MAGIC, wire.FLAG_FIXED_NEWSTYLE | wire.FLAG_NO_ZEROES)
# Data of one option; a name and some dozen context names fit many times. Longer ones are passed over unread.
MAX_OPTION_BYTES = 64 << 10
# Options of one handshake; libnbd and QEMU send fewer than ten, a LIST client one INFO for each export.
MAX_OPTIONS = 4096
# Names in one LIST: what a person can read, and few enough that a client may ask INFO about each.
MAX_LISTED = 1000
# Answers of one handshake: many LISTs' worth. A client that asks for more without end loses its connection.
MAX_ANSWER_BYTES = 8 << 20
# Metadata contexts in one query or agreed on.
MAX_CONTEXTS = 16

GO, EXPORT_NAME, ABORT = "go", "export_name", "abort"


class Negotiation:
    """One connection's handshake. `open_export` raises CdpError for a name that it does not serve."""

    def __init__(
        self, names: Callable[[], Iterable[tuple[str, str]]], open_export: Callable[[str], Export]
    ) -> None:
        self._names = names
        self._open_export = open_export
        self._input = bytearray()
        self._skip_bytes = 0
        self._skipped: int | None = None
        self._client_flags: int | None = None
        self._options = self._answer_bytes = 0
        self._context_export: str | None = None
        self._opened: tuple[str, Export] | None = None
        self.outcome: str | None = None  # GO, EXPORT_NAME or ABORT once it ended
        self.name = ""
        self.structured = False
        self.contexts: dict[str, int] = {}  # agreed metadata contexts and their ids

    @property
    def export(self) -> Export:
        """What GO or EXPORT_NAME opened."""
        if self._opened is None:
            raise ProtocolError("no export was opened")
        return self._opened[1]

    def leftover(self) -> bytes:
        """What came behind the option that ended the handshake: the first bytes of the transmission phase."""
        return bytes(self._input)

    def receive(self, data: bytes | memoryview) -> bytes:
        """Takes bytes, returns the answers. Raises ProtocolError when the connection must be dropped."""
        self._input += data
        out: list[bytes] = []
        if self._client_flags is None and not self._take_flags():
            return b""
        while self.outcome is None:
            if self._skipped is not None and not self._pass_over(out):
                break
            option = self._take_option()
            if option is None:
                if self._skipped is None:
                    break
                continue
            self._options += 1
            if self._options > MAX_OPTIONS:
                raise ProtocolError(f"more than {MAX_OPTIONS} options")
            before = len(out)
            self._answer(*option, out)
            self._answer_bytes += sum(map(len, out[before:]))
            if self._answer_bytes > MAX_ANSWER_BYTES:
                raise ProtocolError("a handshake without end")
        return b"".join(out)

    def _answer(self, number: int, payload: bytes, out: list[bytes]) -> None:
        if number == wire.OPT_EXPORT_NAME:
            out.append(self._export_name(payload))
            return
        handler = _HANDLERS.get(number)
        if handler is None:
            out.append(reply(number, wire.REP_ERR_UNSUP, b"option is not supported"))
            return
        try:
            out.extend(handler(self, number, payload))
        except (struct.error, ValueError) as e:  # ValueError covers UnicodeDecodeError
            out.append(reply(number, wire.REP_ERR_INVALID, f"malformed option: {e}".encode()))
        except CdpError as e:
            kind = wire.REP_ERR_UNKNOWN if isinstance(e, NotFoundError) else wire.REP_ERR_POLICY
            out.append(reply(number, kind, str(e).encode()[: wire.MAX_STRING_BYTES]))

    def _take_flags(self) -> bool:
        if len(self._input) < 4:
            return False
        (flags,) = struct.unpack_from(">I", self._input)
        if flags & ~(wire.FLAG_C_FIXED_NEWSTYLE | wire.FLAG_C_NO_ZEROES) or not flags & wire.FLAG_C_FIXED_NEWSTYLE:
            raise ProtocolError(f"client flags {flags:#x}")
        del self._input[:4]
        self._client_flags = flags
        return True

    def _pass_over(self, out: list[bytes]) -> bool:
        """Passes over the data of an option that is too long; False while some is yet to come."""
        assert self._skipped is not None
        passed = min(self._skip_bytes, len(self._input))
        del self._input[:passed]
        self._skip_bytes -= passed
        if self._skip_bytes:
            return False
        out.append(reply(self._skipped, wire.REP_ERR_TOO_BIG, b"option is too long"))
        self._skipped = None
        return True

    def _take_option(self) -> tuple[int, bytes] | None:
        if len(self._input) < OPTION.size:
            return None
        magic, number, length = OPTION.unpack_from(self._input)
        if magic != OPTION_MAGIC:
            raise ProtocolError("option without its magic")
        if length > MAX_OPTION_BYTES:
            if number == wire.OPT_EXPORT_NAME:
                raise ProtocolError("export name is too long")
            del self._input[: OPTION.size]
            self._skipped, self._skip_bytes = number, length
            return None
        if len(self._input) < OPTION.size + length:
            return None
        payload = bytes(self._input[OPTION.size : OPTION.size + length])
        del self._input[: OPTION.size + length]
        return number, payload

    def _open(self, name: str) -> Export:
        if self._opened is None or self._opened[0] != name:
            self._opened = None
            self._opened = (name, self._open_export(name))
        return self._opened[1]

    def _export_name(self, payload: bytes) -> bytes:
        """The oldest way in: no errors can be told, a refusal is a closed connection."""
        try:
            name = _text(payload)
            export = self._open(name)
        except (CdpError, ValueError) as e:
            raise ProtocolError(f"export name refused: {e}") from e
        self._begin(name, EXPORT_NAME)
        assert self._client_flags is not None
        zeros = 0 if self._client_flags & wire.FLAG_C_NO_ZEROES else 124
        return struct.pack(f">QH{zeros}x", export.size, transmission_flags(export, self.structured))

    def _begin(self, name: str, outcome: str) -> None:
        if self._context_export != name:
            self.contexts = {}
        self.name, self.outcome = name, outcome

    def _abort(self, number: int, payload: bytes) -> list[bytes]:
        self.outcome = ABORT
        return [reply(number, wire.REP_ACK)]

    def _list(self, number: int, payload: bytes) -> list[bytes]:
        if payload:
            raise ValueError("LIST carries no data")
        out: list[bytes] = []
        for name, description in self._names():
            if len(out) == MAX_LISTED:
                break
            encoded = name.encode()
            text = struct.pack(">I", len(encoded)) + encoded + description.encode()[: wire.MAX_STRING_BYTES]
            out.append(reply(number, wire.REP_SERVER, text))
        return [*out, reply(number, wire.REP_ACK)]

    def _starttls(self, number: int, payload: bytes) -> list[bytes]:
        if payload:
            raise ValueError("STARTTLS carries no data")
        return [reply(number, wire.REP_ERR_POLICY, b"TLS is not offered here")]

    def _structured_reply(self, number: int, payload: bytes) -> list[bytes]:
        if payload:
            raise ValueError("STRUCTURED_REPLY carries no data")
        self.structured = True
        return [reply(number, wire.REP_ACK)]

    def _info(self, number: int, payload: bytes) -> list[bytes]:
        """INFO and GO."""
        (length,) = struct.unpack_from(">I", payload)
        name = _text(payload[4 : 4 + length])
        (count,) = struct.unpack_from(">H", payload, 4 + length)
        asked = struct.unpack(f">{count}H", payload[6 + length :])
        export = self._open(name)
        flags = transmission_flags(export, self.structured)
        infos = [struct.pack(">HQH", wire.INFO_EXPORT, export.size, flags)]
        if wire.INFO_NAME in asked:
            infos.append(struct.pack(">H", wire.INFO_NAME) + name.encode())
        sizes = (wire.MIN_BLOCK_BYTES, wire.PREFERRED_BLOCK_BYTES, wire.MAX_PAYLOAD_BYTES)
        infos.append(struct.pack(">HIII", wire.INFO_BLOCK_SIZE, *sizes))
        if number == wire.OPT_GO:
            self._begin(name, GO)
        return [*(reply(number, wire.REP_INFO, info) for info in infos), reply(number, wire.REP_ACK)]

    def _meta_context(self, number: int, payload: bytes) -> list[bytes]:
        """LIST_META_CONTEXT and SET_META_CONTEXT."""
        setting = number == wire.OPT_SET_META_CONTEXT
        if setting:
            self.contexts, self._context_export = {}, None
            if not self.structured:
                raise ValueError("structured replies come first")
        name, queries = _context_queries(payload)
        offered = {context: i for i, context in enumerate(self._open(name).contexts, 1)}
        chosen = {c: i for c, i in offered.items() if any(_matches(q, c, setting) for q in queries)}
        if not setting and not queries:
            chosen = offered
        if setting:
            self.contexts, self._context_export = chosen, name
        out = [
            reply(number, wire.REP_META_CONTEXT, struct.pack(">I", i if setting else 0) + context.encode())
            for context, i in chosen.items()
        ]
        return [*out, reply(number, wire.REP_ACK)]


_HANDLERS: dict[int, Callable[[Negotiation, int, bytes], list[bytes]]] = {
    wire.OPT_ABORT: Negotiation._abort,
    wire.OPT_LIST: Negotiation._list,
    wire.OPT_STARTTLS: Negotiation._starttls,
    wire.OPT_INFO: Negotiation._info,
    wire.OPT_GO: Negotiation._info,
    wire.OPT_STRUCTURED_REPLY: Negotiation._structured_reply,
    wire.OPT_LIST_META_CONTEXT: Negotiation._meta_context,
    wire.OPT_SET_META_CONTEXT: Negotiation._meta_context,
}


def reply(option: int, kind: int, payload: bytes = b"") -> bytes:
    """One reply to an option."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(payload)) + payload


def _text(raw: bytes) -> str:
    """A string of the protocol. Raises ValueError."""
    if len(raw) > wire.MAX_STRING_BYTES or b"\0" in raw:
        raise ValueError(f"a string of {len(raw)} bytes, or with a NUL")
    return raw.decode()


def _context_queries(payload: bytes) -> tuple[str, list[str]]:
    """Export name and queries of a metadata context option. Raises struct.error, ValueError."""
    (length,) = struct.unpack_from(">I", payload)
    name, at = _text(payload[4 : 4 + length]), 4 + length
    (count,) = struct.unpack_from(">I", payload, at)
    if count > MAX_CONTEXTS:
        raise ValueError(f"{count} queries")
    queries, at = [], at + 4
    for _ in range(count):
        (length,) = struct.unpack_from(">I", payload, at)
        if at + 4 + length > len(payload):
            raise ValueError("a query is cut")
        queries.append(_text(payload[at + 4 : at + 4 + length]))
        at += 4 + length
    if at != len(payload):
        raise ValueError("data behind the last query")
    return name, queries


def _matches(query: str, context: str, setting: bool) -> bool:
    """A query names a context, or (listing) a namespace with a colon and nothing behind it."""
    return query == context or (not setting and query.endswith(":") and context.startswith(query))
