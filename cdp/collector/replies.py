"""What a client hears of a request that was answered later than it came."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cdp.nbd.connection import Connection


def reply(connection: Connection, cookie: bytes, error: OSError | None) -> None:
    """Done, or the errno of `error`."""
    if error is None:
        connection.done(cookie)
    else:
        connection.fail(cookie, error.errno or errno.EIO)
