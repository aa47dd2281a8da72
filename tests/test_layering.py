"""Imports go one way, and the processes that do the work carry no libraries of the control plane."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A package imports only packages of a lower rank; nbd and journal know no sibling at all.
RANK = {"nbd": 0, "journal": 0, "history": 1, "replica": 2, "collector": 3, "recovery": 4}
# They cost start-up time and memory in every child, and belong to the parents and the CLI.
CONTROL_PLANE = {"pydantic", "fastapi", "starlette", "uvicorn", "typer", "rich", "httpx"}
CHILDREN = ("collector_child", "replayer_child", "relay_child", "rollback_child")


def imports(path: Path) -> Iterator[str]:
    """Every absolute module name that a file imports, relative ones resolved."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", sources("cdp"), ids=lambda p: str(p.relative_to(ROOT)))
def test_library_imports_only_downwards(path: Path) -> None:
    parts = path.relative_to(ROOT).parts
    own = parts[1] if len(parts) > 2 else None
    for name in imports(path):
        head = name.split(".")
        assert head[0] not in ("appliance", "tests"), f"{path}: the library imports {name}"
        if head[0] != "cdp" or len(head) < 2 or head[1] not in RANK or head[1] == own:
            continue
        assert own is not None, f"{path}: a top-level module imports {name}"
        assert RANK[head[1]] < RANK[own], f"{path}: {own} imports {name}, which is not below it"


@pytest.mark.parametrize("path", sources("appliance"), ids=lambda p: str(p.relative_to(ROOT)))
def test_product_imports_no_tests(path: Path) -> None:
    assert not [name for name in imports(path) if name.split(".")[0] == "tests"]


@pytest.mark.parametrize("module", CHILDREN)
def test_children_carry_no_control_plane(module: str) -> None:
    code = f"import sys, appliance.{module}; print(*{{m.split('.')[0] for m in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert not CONTROL_PLANE & set(done.stdout.split())
