"""A reader process for tests: follows a journal, checks all that it reads, keeps its place, until it is killed.

    python -m tests.journal.following FOLDER PLACE

PLACE is a file with what a consumer keeps durably: seq, checksum, epoch, incarnations. It is written before the
journal is told. Prints the seq it has reached, and its CPU seconds, after each batch of reads.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time

from cdp.journal.chain import Chain
from cdp.journal.reader import EmbeddedReader
from tests.journal import support


def load(place: str) -> Chain:
    try:
        with open(place) as f:
            kept = json.load(f)
    except FileNotFoundError:
        return Chain(support.GROUP)
    lives = [(epoch, bytes.fromhex(name)) for epoch, name in kept["lives"]]
    return Chain(support.GROUP, kept["seq"], kept["crc"], kept["epoch"], lives)


def save(place: str, chain: Chain) -> None:
    lives = [(epoch, name.hex()) for epoch, name in chain.incarnations]
    with open(place + ".tmp", "w") as f:
        json.dump({"seq": chain.seq, "crc": chain.crc, "epoch": chain.epoch, "lives": lives}, f)
        f.flush()
        os.fsync(f.fileno())
    os.rename(place + ".tmp", place)


def main(folder: str, place: str) -> None:
    chain = load(place)
    reader = EmbeddedReader(folder, "replayer", chain.seq)
    while True:
        batches = reader.read(1 << 20)
        for batch in batches:
            support.check_batch(batch)
            assert chain.check(batch)
        if batches:
            save(place, chain)
            reader.acknowledge(chain.seq)
            print(chain.seq, time.process_time(), flush=True)
            continue
        select.select([reader], [], [])
        reader.drain()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
