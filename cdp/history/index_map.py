"""The sorted map behind index and timeline: RocksDB, or whatever else keeps this contract.

Keys and values are bytes, keys in byte order. Writes need not be durable before `flush` returns, but become so in
order and each batch whole: the map carries its own position, and what it lost is made again from the undo log.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from rocksdict import (
    BlockBasedOptions,
    Cache,
    DBCompressionType,
    Options,
    Rdict,
    WriteBatch,
    WriteOptions,
)

from cdp.errors import CorruptionError

log = logging.getLogger(__name__)

# The memory that index and timeline may take: one memtable being written, one being flushed, and the cache for
# blocks, filters and indexes of the files.
_MEMTABLE_BYTES = 16 << 20
_CACHE_BYTES = 64 << 20
_MAX_OPEN_FILES = 128


class Cursor(Protocol):
    """A place in a snapshot of the map, taken when the cursor was made."""

    def seek(self, key: bytes, /) -> None: ...
    def seek_for_prev(self, key: bytes, /) -> None: ...
    def valid(self) -> bool:
        """False at the end, and where the map cannot be read: `status` tells them apart."""

    def status(self) -> None:
        """Raises Exception when what was sought could not be read."""

    def key(self) -> bytes: ...
    def value(self) -> bytes: ...
    def next(self) -> None: ...
    def prev(self) -> None: ...


class SortedMap(Protocol):
    """One writer; cursors and `get` from any thread."""

    def get(self, key: bytes) -> bytes | None: ...
    def cursor(self) -> Cursor: ...
    def write(self, puts: Iterable[tuple[bytes, bytes]], deletes: Iterable[bytes] = ()) -> None:
        """Deletes, then puts, all or none of them after a crash. Raises OSError (no space: nothing was written)."""

    def flush(self) -> None:
        """What was written is durable. Raises OSError."""

    def bytes(self) -> int:
        """Space on disk."""

    def close(self) -> None: ...


class RocksMap:
    """RocksDB without a log of its own."""

    def __init__(self, folder: str) -> None:
        """Opens or makes it. Raises CorruptionError, OSError (no space)."""
        options = Options(raw_mode=True)
        options.create_if_missing(True)
        options.set_write_buffer_size(_MEMTABLE_BYTES)
        options.set_max_write_buffer_number(3)
        # Uncompressed: a look-up took 25 µs so and 39 µs with LZ4, which saved 10 of 34 bytes an entry.
        options.set_compression_type(DBCompressionType.none())
        options.set_max_background_jobs(2)
        options.set_max_open_files(_MAX_OPEN_FILES)
        options.set_keep_log_file_num(2)
        options.set_max_log_file_size(1 << 20)
        options.set_level_compaction_dynamic_level_bytes(True)
        table = BlockBasedOptions()
        table.set_block_cache(Cache(_CACHE_BYTES))
        table.set_cache_index_and_filter_blocks(True)
        table.set_pin_l0_filter_and_index_blocks_in_cache(True)
        table.set_format_version(5)
        options.set_block_based_table_factory(table)
        try:
            with _no_space_is_oserror():
                self._map = Rdict(folder, options)
        except Exception as e:
            if not str(e).startswith("Corruption"):
                raise
            hint = "Stop the replayer and remove that folder: it is made again from the undo log."
            raise CorruptionError(f"The index {folder} is damaged: {e}.", hint) from e
        self._closed = False
        self._write_options = WriteOptions()
        self._write_options.disable_wal = True  # type: ignore[method-assign,assignment]

    def get(self, key: bytes) -> bytes | None:
        return self._map.get(key)

    def cursor(self) -> Cursor:
        cursor: Any = self._map.iter()
        found: Cursor = cursor
        return found

    def write(self, puts: Iterable[tuple[bytes, bytes]], deletes: Iterable[bytes] = ()) -> None:
        batch = WriteBatch(raw_mode=True)
        delete, put = batch.delete, batch.put
        for key in deletes:
            delete(key)
        for key, value in puts:
            put(key, value)
        with _no_space_is_oserror():
            self._map.write(batch, self._write_options)

    def flush(self) -> None:
        with _no_space_is_oserror():
            self._map.flush(True)

    def bytes(self) -> int:
        return self._map.property_int_value("rocksdb.total-sst-files-size") or 0

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            for step in (self.flush, self._map.close):
                try:
                    step()
                except Exception as e:  # RocksDB's own, whose class is not exported, or no space
                    log.warning("What the index did not write down is made again from the undo log: %s", e)


@contextlib.contextmanager
def _no_space_is_oserror() -> Iterator[None]:
    """RocksDB says everything by one class; a full disk can be waited for. It goes on by itself once there is room."""
    try:
        yield
    except Exception as e:
        if "No space left on device" in str(e):
            raise OSError(errno.ENOSPC, str(e)) from e
        raise
