"""Groups are stopped at the same time: each may wait for a broker that does not answer, and a stop has one limit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence


def together(calls: Sequence[Callable[[], None]]) -> None:
    """Makes all calls, each in a thread of its own, and waits for all. Raises the first call's error, if any."""
    errors: list[BaseException | None] = [None] * len(calls)

    def run(number: int, call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as e:  # raised again below, in the thread that asked
            errors[number] = e

    threads = [threading.Thread(target=run, args=(i, call), name=f"stop-{i}") for i, call in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if error is not None:
            raise error
