"""What a reader may rely on in every file: its length, its docstring, nothing unfinished, nothing slept for."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_FILE_LINES = 350  # more than one idea
FILES = sorted(p for folder in ("cdp", "appliance", "tests") for p in (ROOT / folder).rglob("*.py"))
PRODUCT = [p for p in FILES if p.relative_to(ROOT).parts[0] != "tests"]
# Put together here so that this file does not contain them.
UNFINISHED = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "NotImplemented" + "Error", "XX" + "X")) + r")\b")
MOCKS = re.compile("unittest" + r"\.mock|Magic" + "Mock")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_file_is_one_idea(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    assert not UNFINISHED.findall(text)
    assert not MOCKS.findall(text)


@pytest.mark.parametrize("path", [p for p in FILES if name(p) != "cdp/storage.py"], ids=name)
def test_nothing_sleeps_for_luck(path: Path) -> None:
    """The door to clocks is the one place that may: a file lock of another process has no event to wait for."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "time.sleep":
            raise AssertionError(f"{name(path)}:{node.lineno}: wait for the condition instead")


@pytest.mark.parametrize("path", PRODUCT, ids=name)
def test_module_says_what_it_owns(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or not tree.body, "no docstring"


def test_repository_stands_alone() -> None:
    outside = re.compile("/" + r"work/|\.\./" + "shared")
    patterns = ("*.md", "*.toml", "*.yml", "Makefile", "appliance/Dockerfile", "appliance/compose/*", "grafana/**/*.*")
    texts = [p for pattern in patterns for p in ROOT.glob(pattern)]
    texts += [p for folder in ("cdp", "appliance") for p in (ROOT / folder).rglob("*.md")] + FILES
    found = [name(p) for p in texts if p != Path(__file__) and outside.search(p.read_text())]
    assert not found
