"""Profiles of the model tests, and peers: programs of others that a test needs.

On a developer's machine a test whose peer is missing is skipped, with the reason; with CI=true it fails.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings

# Administrative programs live outside an ordinary user's PATH on Debian.
PEER_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))

_COMMON = {
    "deadline": None,  # a shared machine decides how long an example takes
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
    "print_blob": True,
}
settings.register_profile("fast", max_examples=40, **_COMMON)
settings.register_profile("soak", max_examples=5000, **_COMMON)
settings.load_profile(os.environ.get("CDP_PROFILE", "fast"))


def find_peer(program: str) -> str:
    """The path of a peer; skips the test if it is missing, fails it if CI=true."""
    path = shutil.which(program, path=PEER_PATH)
    if path is None:
        reason = f"{program} is not installed (`scripts/peers` says which package has it)"
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI=true, and {reason}")
        pytest.skip(reason)
    return path


@pytest.fixture(scope="session")
def peer() -> Callable[[str], str]:
    """`peer("nbdinfo")` is that program's path."""
    return find_peer
