"""The parser and the handshake fed whole, byte by byte and with garbage: they answer, or raise their one error."""

from __future__ import annotations

import contextlib
import errno
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdp.errors import NotFoundError, RefusedError
from cdp.nbd import wire
from cdp.nbd.contract import Export
from cdp.nbd.negotiation import GREETING, MAX_ANSWER_BYTES, MAX_OPTION_BYTES, Negotiation
from cdp.nbd.transmission import BATCH_REPLY_BYTES, Parser
from tests.nbd.serving import request


class Small(Export):
    size = 1 << 20
    contexts = ("base:allocation", "cdp:changed")


class ReadOnly(Small):
    read_only = True


requests = st.builds(
    lambda command, offset, length, cookie, flags: request(
        command, offset, length, cookie, flags, bytes(length) if command == wire.WRITE else b""
    ),
    st.sampled_from([0, 1, 3, 4, 5, 6, 7, 9, 77]),
    st.one_of(st.integers(0, 1 << 20), st.integers(0, (1 << 64) - 1)),
    st.integers(0, 9000),
    st.integers(0, (1 << 64) - 1),
    st.sampled_from([0, 0, 0, 1, 2, 4, 8, 16, 32]),
)


def parsed_in_pieces(stream: bytes, cuts: list[int]) -> tuple[list, list, list]:
    """What comes out when the stream arrives in pieces; the rest of each is put in front of the next."""
    parser = Parser(Small(), True, ("base:allocation",))
    good, refused, empty, rest = [], [], [], b""
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        view = rest + stream[start:stop]
        at = parser.parse(memoryview(view), 0, len(view))
        good += [(*r[:5], None if r[5] is None else bytes(r[5])) for r in parser.requests]
        refused += parser.refused
        empty += parser.empty
        parser.refused, parser.empty = [], []
        rest = view[at:]
    return good, refused, empty


@given(st.lists(requests, max_size=8), st.data())
def test_any_cuts_give_the_same_requests(messages: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(messages)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    whole = parsed_in_pieces(stream, [])
    assert sum(map(len, whole)) == len(messages)
    assert parsed_in_pieces(stream, cuts) == whole


@settings(max_examples=15, deadline=None)
@given(st.lists(requests, min_size=1, max_size=3))
def test_byte_by_byte(messages: list[bytes]) -> None:
    stream = b"".join(messages)
    assert parsed_in_pieces(stream, list(range(1, len(stream)))) == parsed_in_pieces(stream, [])


@given(st.binary(min_size=28, max_size=300))
def test_garbage_is_the_one_error(garbage: bytes) -> None:
    parser = Parser(Small(), True, ())
    with pytest.raises(wire.ProtocolError):
        parser.parse(memoryview(b"\0" + garbage), 0, len(garbage) + 1)


@given(st.binary(max_size=400), st.booleans())
def test_garbage_behind_good_magic_never_raises_another_error(garbage: bytes, structured: bool) -> None:
    stream = struct.pack(">I", wire.REQUEST_MAGIC) + garbage
    parser = Parser(Small(), structured, ())
    try:
        at = parser.parse(memoryview(stream), 0, len(stream))
    except wire.ProtocolError:
        return
    assert 0 <= at <= len(stream)
    for command, _, _, offset, length, _ in parser.requests:
        assert command == wire.FLUSH or (length > 0 and offset + length <= Small.size)


@pytest.mark.parametrize(
    ("command", "offset", "length", "flags", "number"),
    [
        (wire.READ, 1 << 20, 1, 0, errno.EINVAL),
        (wire.READ, 0, (32 << 20) + 1, 0, errno.EINVAL),
        (wire.READ, (1 << 64) - 1, 4096, 0, errno.EINVAL),
        (wire.WRITE, (1 << 20) - 1, 2, 0, errno.ENOSPC),
        (wire.WRITE, 0, 10, wire.NO_HOLE, errno.EINVAL),
        (wire.WRITE_ZEROES, 1 << 20, 1, 0, errno.ENOSPC),
        (wire.TRIM, 1 << 20, 1, 0, errno.EINVAL),
        (wire.FLUSH, 1, 0, 0, errno.EINVAL),
        (wire.BLOCK_STATUS, 0, 0, 0, errno.EINVAL),
        (42, 0, 0, 0, errno.EINVAL),
    ],
)
def test_refusals(command: int, offset: int, length: int, flags: int, number: int) -> None:
    parser = Parser(Small(), True, ("base:allocation",))
    raw = request(command, offset, length, 7, flags)
    parser.parse(memoryview(raw), 0, len(raw))
    assert parser.refused == [((7).to_bytes(8, "big"), number)] and not parser.requests


@pytest.mark.parametrize("command", [wire.WRITE, wire.TRIM, wire.WRITE_ZEROES])
def test_a_read_only_export_takes_no_change(command: int) -> None:
    parser = Parser(ReadOnly(), True, ())
    raw = request(command, 0, 4096)
    parser.parse(memoryview(raw), 0, len(raw))
    assert parser.refused[0][1] == errno.EPERM


def test_a_batch_answers_a_bounded_amount() -> None:
    class Large(Export):
        size = 1 << 40

    parser = Parser(Large(), True, ())
    raw = request(wire.READ, 0, 1 << 20) * 9 + request(wire.READ, 0, 32 << 20)
    view, at, batches = memoryview(raw), 0, []
    while at < len(raw):
        at = parser.parse(view, at, len(raw))
        batches.append([r[4] for r in parser.requests])
        assert parser.reply_bytes <= BATCH_REPLY_BYTES or len(batches[-1]) == 1
    assert [length for batch in batches for length in batch] == [1 << 20] * 9 + [32 << 20]


# --- handshake


def negotiation() -> Negotiation:
    def open_export(name: str) -> Export:
        if name == "policy":
            raise RefusedError("Not today.")
        if name != "x":
            raise NotFoundError(f"There is no export {name!r}.")
        return Small()

    return Negotiation(lambda: [("x", "the only one"), ("policy", "")], open_export)


def option(number: int, payload: bytes = b"") -> bytes:
    return wire.OPTION.pack(wire.OPTION_MAGIC, number, len(payload)) + payload


def text(value: str) -> bytes:
    return struct.pack(">I", len(value.encode())) + value.encode()


def replies(raw: bytes) -> list[tuple[int, int, bytes]]:
    found = []
    while raw:
        magic, number, kind, length = wire.OPTION_REPLY.unpack_from(raw)
        assert magic == wire.OPTION_REPLY_MAGIC
        found.append((number, kind, raw[20 : 20 + length]))
        raw = raw[20 + length :]
    return found


def kinds(*options: bytes) -> list[int]:
    return [kind for _, kind, _ in replies(negotiation().receive(struct.pack(">I", 3) + b"".join(options)))]


INFO_X = text("x") + b"\0\0"


def test_options_are_answered_as_the_document_says() -> None:
    assert len(GREETING) == 18
    assert kinds(option(wire.OPT_LIST)) == [wire.REP_SERVER, wire.REP_SERVER, wire.REP_ACK]
    assert kinds(option(wire.OPT_LIST, b"x")) == [wire.REP_ERR_INVALID]
    assert kinds(option(wire.OPT_STARTTLS)) == [wire.REP_ERR_POLICY]
    assert kinds(option(77, b"what")) == [wire.REP_ERR_UNSUP]
    assert kinds(option(wire.OPT_INFO, INFO_X)) == [wire.REP_INFO, wire.REP_INFO, wire.REP_ACK]
    assert kinds(option(wire.OPT_GO, text("y") + b"\0\0")) == [wire.REP_ERR_UNKNOWN]
    assert kinds(option(wire.OPT_GO, text("policy") + b"\0\0")) == [wire.REP_ERR_POLICY]
    assert kinds(option(wire.OPT_GO, text("x")[:-1])) == [wire.REP_ERR_INVALID]
    assert kinds(option(wire.OPT_GO, INFO_X + b"!")) == [wire.REP_ERR_INVALID]
    assert kinds(option(wire.OPT_ABORT)) == [wire.REP_ACK]
    assert kinds(option(77, bytes(MAX_OPTION_BYTES + 1)), option(78)) == [wire.REP_ERR_TOO_BIG, wire.REP_ERR_UNSUP]


def contexts(number: int, *queries: str, structured: bool = True) -> list[bytes]:
    payload = text("x") + struct.pack(">I", len(queries)) + b"".join(map(text, queries))
    first = option(wire.OPT_STRUCTURED_REPLY) if structured else b""
    return [
        payload[4:] or b"refused"
        for _, kind, payload in replies(negotiation().receive(struct.pack(">I", 3) + first + option(number, payload)))
        if kind != wire.REP_ACK
    ]


def test_metadata_contexts() -> None:
    both = [b"base:allocation", b"cdp:changed"]
    assert contexts(wire.OPT_LIST_META_CONTEXT) == both
    assert contexts(wire.OPT_LIST_META_CONTEXT, "cdp:") == both[1:]
    assert contexts(wire.OPT_SET_META_CONTEXT, "base:allocation", "other:thing") == both[:1]
    assert contexts(wire.OPT_SET_META_CONTEXT, "base:") == []
    assert contexts(wire.OPT_SET_META_CONTEXT) == []
    payload = text("x") + struct.pack(">I", 0)
    assert kinds(option(wire.OPT_SET_META_CONTEXT, payload)) == [wire.REP_ERR_INVALID]


def test_contexts_of_another_export_are_not_agreed() -> None:
    n = Negotiation(lambda: [], lambda name: Small())
    query = text("other") + struct.pack(">I", 1) + text("base:allocation")
    n.receive(struct.pack(">I", 3) + option(wire.OPT_STRUCTURED_REPLY) + option(wire.OPT_SET_META_CONTEXT, query))
    n.receive(option(wire.OPT_GO, INFO_X) + b"leftover")
    assert n.outcome == "go" and n.contexts == {} and n.leftover() == b"leftover"


@pytest.mark.parametrize(("flags", "length"), [(1, 134), (3, 10)])
def test_export_name(flags: int, length: int) -> None:
    n = negotiation()
    assert len(n.receive(struct.pack(">I", flags) + option(wire.OPT_EXPORT_NAME, b"x"))) == length
    with pytest.raises(wire.ProtocolError):
        negotiation().receive(struct.pack(">I", flags) + option(wire.OPT_EXPORT_NAME, b"y"))


@pytest.mark.parametrize("flags", [0, 2, 4, 0x80000001])
def test_client_flags_that_nobody_knows(flags: int) -> None:
    with pytest.raises(wire.ProtocolError):
        negotiation().receive(struct.pack(">I", flags))


def test_a_handshake_that_only_asks_ends() -> None:
    """Promise 9."""
    names = [(f"name-{i}", "d" * 100) for i in range(100_000)]
    n = Negotiation(lambda: names, lambda name: Small())
    answered = len(n.receive(struct.pack(">I", 3) + option(wire.OPT_LIST)))
    assert answered < 200_000
    with pytest.raises(wire.ProtocolError):
        for _ in range(4096):
            answered += len(n.receive(option(wire.OPT_LIST)))
    assert answered <= MAX_ANSWER_BYTES
    with pytest.raises(wire.ProtocolError):
        negotiation().receive(struct.pack(">I", 3) + option(99) * 5000)


options = st.builds(option, st.integers(0, 12).filter(lambda n: n not in (1, 2, 7)), st.binary(max_size=60))


@given(st.lists(options, max_size=6), st.data())
def test_handshake_in_pieces(messages: list[bytes], data: st.DataObject) -> None:
    stream = struct.pack(">I", 3) + b"".join(messages) + option(wire.OPT_GO, INFO_X)
    whole = negotiation()
    expected = whole.receive(stream)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    n = negotiation()
    got = b"".join(n.receive(stream[a:b]) for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True))
    assert got == expected and n.outcome == whole.outcome == "go"
    assert b"".join(map(n.receive, [])) == b""


@given(st.binary(max_size=300), st.booleans())
def test_handshake_garbage(garbage: bytes, flags: bool) -> None:
    n = negotiation()
    with contextlib.suppress(wire.ProtocolError):
        replies(n.receive((struct.pack(">I", 3) if flags else b"") + garbage))
