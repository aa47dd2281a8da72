"""The committed position: whole or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from cdp.errors import CorruptionError
from cdp.replica import position, restart
from cdp.replica.position import Position


def test_comes_back_as_it_was(tmp_path: Path) -> None:
    kept = Position("ab" * 16, 7, 1 << 31, 3, 1 << 60, [(1, "db", "db.raw", 4096)], {"gaps": {}}, [(5, 1, 0, 4096)])
    position.store(str(tmp_path), kept)
    assert position.load(str(tmp_path)) == kept


def test_any_changed_byte_is_corruption(tmp_path: Path) -> None:
    position.store(str(tmp_path), Position("ab" * 16, 7))
    path = tmp_path / position.FILE_NAME
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(CorruptionError):
            position.load(str(tmp_path))
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptionError):
            position.load(str(tmp_path))


def test_a_lost_position_is_not_a_new_group(tmp_path: Path) -> None:
    """Promise 4: what stands there already is never taken for the state at seq 0."""
    assert restart.open_position(str(tmp_path)) == Position()
    (tmp_path / "replica").mkdir()
    (tmp_path / "replica" / "db.raw").write_bytes(b"data")
    assert restart.open_position(str(tmp_path)) == Position()
    (tmp_path / position.FILE_NAME).unlink()
    with pytest.raises(CorruptionError, match="missing"):
        restart.open_position(str(tmp_path))
