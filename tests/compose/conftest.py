"""One project of containers for all tests that need them; without a Docker engine they are skipped, everywhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.compose.stack import Stack, why_not


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """Built, up and healthy; gone with all its volumes afterwards."""
    if why := why_not():
        pytest.skip(f"the containers are not tested: {why}")
    made = Stack()
    try:
        made.up()
        yield made
    finally:
        made.down()
