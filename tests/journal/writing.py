"""A writer process for tests: appends without end, syncing and publishing as it goes, until it is killed.

    python -m tests.journal.writing FOLDER EPOCH

Prints the highest published seq after each publish. Batches have between 1 and 40 records of up to 4 KiB.
"""

from __future__ import annotations

import random
import sys

from tests.journal import support


def main(folder: str, epoch: int) -> None:
    writer = support.open_writer(folder, epoch, segment_bytes=256 << 10, max_bytes=64 << 20)
    writer.publish(writer.last_seq)
    sizes = random.Random(epoch)
    while True:
        for _ in range(sizes.randrange(1, 10)):
            support.prepare(writer)
            support.append(writer, *(sizes.randrange(4097) for _ in range(sizes.randrange(1, 41))))
        print(support.sync(writer), flush=True)
        writer.release()
        support.prepare(writer)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
