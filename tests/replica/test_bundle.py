"""Planning bundles: pre-images, the overlay of the pending bundle, and zeros that cost by what they discard."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cdp.errors import CorruptionError
from cdp.history.blobs import Extent
from cdp.journal import batch as fmt
from cdp.replica import bundle as bundle_module
from cdp.replica.bundle import Bundle, Planner
from cdp.replica.replica import BLOCK_BYTES, Replica

IDENTITY = fmt.Identity(b"g" * 16, 1, b"i" * 16)
Op = tuple[int, int, int, int, int, bytes]  # kind, flags, volume, offset, length, data


def batch(first_seq: int, ops: list[Op]) -> fmt.Batch:
    descriptors = b"".join(fmt.DESCRIPTOR.pack(k, f, v, len(d), o, n) for k, f, v, o, n, d in ops)
    data = [op[5] for op in ops]
    head, _ = fmt.encode(IDENTITY, first_seq, 0, 0, first_seq, 0, descriptors, data, sum(map(len, data)))
    return fmt.decode(head + b"".join(data))


def planner(folder: Path, sizes: dict[int, int]) -> tuple[Replica, Planner]:
    replica = Replica(str(folder))
    for volume, size in sizes.items():
        replica.declare(volume, f"v{volume}", size)
    return replica, Planner(replica, lambda record, target: None)


def kept(bundle: Bundle) -> list[Extent]:
    """Extents with copies of their pre-images: the pool is used again for the next bundle."""
    extents = [Extent(*e) for e in bundle.extents]
    return [e._replace(before=None if e.before is None else memoryview(bytes(e.before))) for e in extents]


def run(replica: Replica, planned: Planner, batches: list[fmt.Batch]) -> list[Extent]:
    """Plans all batches, applying each bundle only when the next one has been planned over it."""
    undo: list[Extent] = []
    pending = None
    for bundle in planned.plan(batches):
        undo += kept(bundle)
        if pending is not None:
            apply(replica, planned, pending)
        pending = bundle
    assert pending is not None
    apply(replica, planned, pending)
    return undo


def apply(replica: Replica, planned: Planner, bundle: Bundle) -> None:
    for volume, blocks in bundle.results.items():
        replica.files[volume].write_blocks(blocks)
    planned.settled(bundle)


def put_back(replica: Replica, undo: list[Extent], after_seq: int) -> None:
    for e in reversed(undo):
        if e.seq > after_seq:
            replica.files[e.volume].write_range(e.block, e.count, e.before)


def content(replica: Replica, volume: int) -> bytes:
    return Path(replica.files[volume].path).read_bytes()


SIZES = {1: 40 * BLOCK_BYTES, 2: 23 * BLOCK_BYTES + 1000}


@st.composite
def operations(draw: st.DrawFn) -> Op:
    volume = draw(st.sampled_from((1, 2)))
    size = SIZES[volume]
    aligned = draw(st.booleans())
    offset = draw(st.integers(0, size - 1))
    length = draw(st.one_of(st.integers(1, 9000), st.integers(1, size)))
    if aligned:
        offset, length = offset & ~4095, 4096
    length = min(length, size - offset)
    kind, flags = draw(st.sampled_from(((fmt.WRITE, 0), (fmt.WRITE, 0), (fmt.ZERO, fmt.PUNCH), (fmt.SYNC, fmt.ZEROS))))
    data = b""
    if kind == fmt.WRITE:
        data = (bytes([draw(st.integers(0, 255))]) * length)
    return kind, flags, volume, offset, length, data


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.lists(operations(), min_size=1, max_size=12), min_size=1, max_size=6), st.sampled_from((3, 8, 2048)))
def test_every_seq_can_be_put_back(tmp_path_factory, batches_of_ops, blocks) -> None:
    """Promise 5: whatever the bundles' borders, the pre-images lead back to every record's state exactly."""
    folder = tmp_path_factory.mktemp("replica")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle_module, "BUNDLE_BLOCKS", blocks)
        replica, planned = planner(folder, SIZES)
        models = [{v: bytes(n) for v, n in SIZES.items()}]
        batches, seq = [], 1
        for ops in batches_of_ops:
            batches.append(batch(seq, ops))
            seq += len(ops)
            for _, _, volume, offset, length, data in ops:
                new = bytearray(models[-1][volume])
                new[offset : offset + length] = data or bytes(length)
                models.append({**models[-1], volume: bytes(new)})
        undo = run(replica, planned, batches)
        covered = [(e.volume, block, e.seq) for e in undo for block in range(e.block, e.block + e.count)]
        assert len(covered) == len(set(covered)), "two pre-images of one block at one seq"
        for at in range(len(models) - 1, -1, -1):
            put_back(replica, [e for e in undo if e.seq == at + 1], at)
            for volume in SIZES:
                assert content(replica, volume) == models[at][volume], at
        replica.close()


def test_trim_of_a_huge_sparse_volume_is_quick_and_small(tmp_path: Path) -> None:
    size = 1 << 40
    replica, planned = planner(tmp_path, {1: size})
    places = [0, 5 << 30, (1 << 40) - BLOCK_BYTES]
    run(replica, planned, [batch(1, [(fmt.WRITE, 0, 1, p, 4096, os.urandom(4096)) for p in places])])
    began = time.monotonic()
    undo = run(replica, planned, [batch(4, [(fmt.ZERO, fmt.PUNCH, 1, 0, size, b"")])])
    assert time.monotonic() - began < 1
    assert sorted((e.block, e.count) for e in undo) == [(p // BLOCK_BYTES, 1) for p in places]
    assert os.stat(replica.files[1].path).st_blocks == 0


def test_zeroing_what_reads_as_zeros_costs_no_history(tmp_path: Path) -> None:
    replica, planned = planner(tmp_path, {1: 1 << 20})
    undo = run(replica, planned, [batch(1, [(fmt.ZERO, 0, 1, 100, 5000, b""), (fmt.ZERO, 0, 1, 0, 1 << 20, b"")])])
    assert undo == []


def test_a_batch_larger_than_a_bundle_goes_on_in_the_next(tmp_path: Path) -> None:
    size = 24 << 20
    replica, planned = planner(tmp_path, {1: size})
    first = batch(1, [(fmt.WRITE, 0, 1, 0, size, os.urandom(size))])
    second = batch(2, [(fmt.ZERO, 0, 1, 0, size, b"")])
    run(replica, planned, [first])
    parts = []
    for bundle in planned.plan([second]):
        parts.append((len(bundle.batches), sum(count for _, _, count, _, _ in bundle.extents)))
        apply(replica, planned, bundle)
    assert [p[0] for p in parts] == [0, 0, 1]
    assert sum(p[1] for p in parts) == size // BLOCK_BYTES
    assert max(p[1] for p in parts) <= bundle_module.BUNDLE_BLOCKS


def test_a_write_beyond_its_volume_or_to_none_is_refused(tmp_path: Path) -> None:
    replica, planned = planner(tmp_path, {1: 8192})
    with pytest.raises(CorruptionError, match="beyond"):
        run(replica, planned, [batch(1, [(fmt.WRITE, 0, 1, 8192, 4096, bytes(4096))])])
    replica, planned = planner(tmp_path / "b", {1: 8192})
    with pytest.raises(CorruptionError, match="beyond"):
        run(replica, planned, [batch(1, [(fmt.WRITE, 0, 1, 8190, 4, b"abcd")])])
    replica, planned = planner(tmp_path / "c", {1: 8192})
    with pytest.raises(CorruptionError, match="never declared"):
        run(replica, planned, [batch(1, [(fmt.WRITE, 0, 7, 0, 4096, bytes(4096))])])


def test_a_volume_shrinks_and_grows_with_its_undo(tmp_path: Path) -> None:
    replica, planned = planner(tmp_path, {1: 3 * 4096})
    undo = run(replica, planned, [batch(1, [(fmt.WRITE, 0, 1, 0, 12288, b"x" * 12288)])])
    undo += run(replica, planned, [batch(2, [(fmt.RESIZE, 0, 1, 0, 5000, b"v1")])])
    assert content(replica, 1)[:5000] == b"x" * 5000
    assert not any(content(replica, 1)[5000:])
    put_back(replica, undo, 1)
    assert content(replica, 1) == b"x" * 12288
