"""The model: a plain list of states. After every request and every command a group has one more state.

Requests are made one at a time, so between two seqs that are known (bookmarks, a rollback's ends) the states follow
each other in the model's order; records that change nothing (heartbeats, barriers) repeat a state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

State = dict[str, bytes]


@dataclass(frozen=True)
class Mark:
    """A seq that is known to be a certain state. `closed`: no point between the mark before and this one."""

    seq: int
    index: int
    name: str
    closed: frozenset[str] = frozenset()  # volumes of which no point is offered since the mark before


@dataclass
class Book:
    """All states of a group's volumes, and the marks that tie them to seqs."""

    now: dict[str, bytearray]
    states: list[State] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    split: set[int] = field(default_factory=set)  # states that several records made: inside, no point is offered

    def __post_init__(self) -> None:
        self.states.append({name: bytes(content) for name, content in self.now.items()})

    def write(self, volume: str, offset: int, data: bytes, split: bool = False) -> None:
        self.now[volume][offset : offset + len(data)] = data
        self.states.append({**self.states[-1], volume: bytes(self.now[volume])})
        if split:
            self.split.add(len(self.states) - 1)

    def become(self, volumes: Mapping[str, bytes]) -> None:
        """A rollback: these volumes are what they were, in one step."""
        for name, content in volumes.items():
            self.now[name][:] = content
        self.states.append({**self.states[-1], **volumes})

    def mark(self, seq: int, name: str, closed: frozenset[str] = frozenset()) -> None:
        assert not self.marks or seq > self.marks[-1].seq, f"{name} has seq {seq}, not beyond {self.marks[-1]}"
        self.marks.append(Mark(seq, len(self.states) - 1, name, closed))

    def state(self, mark: Mark) -> State:
        return self.states[mark.index]


# What a volume reads at a seq; None where the point is refused.
Read = Callable[[str, int], bytes | None]


def check_marks(book: Book, read: Read, oldest: Callable[[], int]) -> int:
    """Every mark inside the window equals the model, every other one is refused; how many were equal."""
    equal = 0
    for mark in book.marks:
        for volume, expected in book.state(mark).items():
            found = read(volume, mark.seq)
            if found is None:
                assert mark.seq < oldest(), f"{volume}@seq:{mark.seq} ({mark.name}) is refused inside the window"
                continue
            same = found == expected  # apart: pytest must not try to explain megabytes
            assert same, difference(f"{volume}@seq:{mark.seq} ({mark.name})", found, expected)
            equal += 1
    return equal


def check_between(book: Book, first: Mark, last: Mark, read: Read, oldest: Callable[[], int]) -> None:
    """Every seq between two neighbouring marks is a state of the model, in the model's order, none jumped over.

    A seq may repeat the state before it (a heartbeat) or be the next one: after each seq the model is at one of a
    set of indices, which must never be empty and must hold the last mark's at the end.
    """
    candidates = {first.index}
    for seq in range(first.seq + 1, last.seq + 1):
        following = {i + step for i in candidates for step in (0, 1) if i + step <= last.index}
        for volume in book.now:
            if volume in last.closed and seq < last.seq:
                assert read(volume, seq) is None, f"{volume}@seq:{seq} lies inside a rollback and is offered"
                continue
            found = read(volume, seq)
            if found is None and seq < oldest():
                return  # the window went by while we looked
            if found is None:
                following = {i for i in candidates if i + 1 in book.split}
                assert following, f"{volume}@seq:{seq} between {first.name} and {last.name} is refused"
                continue
            following = {i for i in following if book.states[i][volume] == found}
            assert following, f"{volume}@seq:{seq} is no state of the model after {first.name}"
        candidates = following
    assert last.index in candidates, f"not all requests between {first.name} and {last.name} became points"


def difference(what: str, found: bytes, expected: bytes) -> str:
    """Where two contents differ first, in words."""
    if len(found) != len(expected):
        return f"{what} has {len(found)} bytes instead of {len(expected)}"
    blocks = [
        at for at in range(0, len(found), 4096) if found[at : at + 4096] != expected[at : at + 4096]
    ]  # fmt: skip
    if not blocks:
        return f"{what} does not differ"
    first = next(i for i in range(blocks[0], len(found)) if found[i] != expected[i])
    return (
        f"{what} differs in {len(blocks)} blocks ({[at // 4096 for at in blocks[:8]]} …), first at byte {first}: "
        f"{found[first : first + 8].hex()} instead of {expected[first : first + 8].hex()}"
    )
