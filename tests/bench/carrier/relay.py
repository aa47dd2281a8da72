"""The relay alone, from a backlog to one broker, against Kafka's own ProducerPerformance with messages of its size.

The relay is up and has nothing to do; the backlog is in the journal (and in the page cache) and becomes visible at
once. It is timed until the broker has acknowledged the last of it. So the relay reads and checks the journal and sends
it, in Python; the peer makes up random letters, or picks prepared messages, and sends those, in Java. Both send as many
bytes, in as many messages, to the same broker, in turn. Ratios are taken inside a round; medians over the rounds. In
cells of a second or two the peer's virtual machine has not warmed up: they show that it works, and no ratio.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from cdp.journal.kafka.cluster import Cluster
from tests.bench.carrier import tools
from tests.bench.carrier.feeding import Batches, Carried, say
from tests.bench.replay import Payloads, large_writes, small_writes
from tests.bench.report import Figure

SMALL, LARGE = "4 KiB writes", "1 MiB writes"
RATIO_MIN = 0.8
# Of a cell, for each second that it is to take: about what is reached.
MIB_A_SECOND = 96
OURS, MADE, PREPARED = "relay", "ProducerPerformance", "ProducerPerformance, prepared messages"


def measure(folder: Path, cluster: Cluster, rounds: int, seconds: int) -> list[Figure]:
    """Both kinds of backlog, each round in an order of its own. Takes about `4 * rounds * seconds` and some starts."""
    total = min(seconds, 8) * MIB_A_SECOND << 20
    carried, payloads = Carried(folder / "relay", cluster), Payloads(False)
    kinds: dict[str, Callable[[int], Batches]] = {
        SMALL: lambda size: small_writes(size, payloads, False),
        LARGE: lambda size: large_writes(size, payloads),
    }
    rates: dict[tuple[str, str], list[float]] = {}
    sizes: dict[str, int] = {}
    try:
        for kind, batches in kinds.items():
            sizes[kind] = _message_bytes(carried, batches(32 << 20))  # not measured: the first of its kind
            tools.prepare(folder / f"messages-{sizes[kind]}", sizes[kind])
        for number in range(rounds):
            for index, (kind, batches) in enumerate(kinds.items()):
                order = [OURS, MADE, PREPARED]
                random.Random(number * 10 + index).shuffle(order)
                for who in order:
                    if who == OURS:
                        rate = _relay(carried, batches(total))
                    else:
                        path = folder / f"messages-{sizes[kind]}" if who == PREPARED else None
                        rate = _producer(cluster, total // sizes[kind], sizes[kind], path)
                    rates.setdefault((kind, who), []).append(rate)
                    say(f"round {number + 1} {kind}: {who} {rate:.0f} MiB/s")
    finally:
        carried.close()
    return [_figure(kind, who, rates, sizes[kind]) for kind in kinds for who in (MADE, PREPARED)]


def _message_bytes(carried: Carried, batches: Batches) -> int:
    """How large the relay's messages are on average, from a small backlog."""
    begin = tools.ends(carried.cluster)[1]
    total, _ = carried.carry(batches)
    return total // (tools.ends(carried.cluster)[1] - begin)


def _relay(carried: Carried, batches: Batches) -> float:
    began = time.process_time()
    total, seconds = carried.carry(batches)
    say(f"  CPU of relay and of writing the backlog {time.process_time() - began:.1f} s, timed {seconds:.1f} s")
    tools.forget(carried.cluster)
    return total / seconds / (1 << 20)


def _producer(cluster: Cluster, count: int, size: int, prepared: Path | None) -> float:
    fresh = tools.another(cluster)
    try:
        return tools.produce(fresh, count, size, prepared)
    finally:
        tools.delete(fresh)


def _figure(kind: str, who: str, rates: dict[tuple[str, str], list[float]], size: int) -> Figure:
    ours, theirs = rates[kind, OURS], rates[kind, who]
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    asked = who == MADE
    return Figure(
        f"relay alone, backlog of {kind} to one broker, against {who} ({size / 1000:.0f} kB a message)",
        f"{statistics.median(ours):.0f} against {statistics.median(theirs):.0f} MiB/s, {ratio:.2f} ×",
        f"≥ {RATIO_MIN:g} ×" if asked else "–", ratio >= RATIO_MIN if asked else None,
    )  # fmt: skip
