"""A sparse image and a server of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nbd.memory_export import FileExport, OneExport
from tests.nbd.serving import SIZE, Server, serving


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "image.raw"
    path.touch()
    os.truncate(path, SIZE)
    return str(path)


@pytest.fixture
def server(tmp_path: Path, image: str) -> Iterator[Server]:
    with serving(OneExport(FileExport(image)), tmp_path) as running:
        yield running
