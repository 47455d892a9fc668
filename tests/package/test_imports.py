"""No circle among the files of the package, and no compiler imported with it."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import torch
from paths import ROOT

from dcconv.tracing import constant_for_tracing

PACKAGE = ROOT / "dcconv"


def module_of(file: Path, root: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: Path, known: set[str]) -> set[str]:
    """Return the package's modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= parts & known or {node.module} & known
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & known
    return found


def order_of(package: Path) -> list[str]:
    """Return the modules, each after those that it imports; CycleError if that cannot be."""
    files = {module_of(file, package.parent): file for file in package.rglob("*.py")}
    graph = {name: imports_of(file, set(files)) - {name} for name, file in files.items()}
    return list(TopologicalSorter(graph).static_order())


def test_no_file_of_the_package_imports_itself_by_way_of_others() -> None:
    order = order_of(PACKAGE)
    assert order.index("dcconv.operator.records") < order.index("dcconv.modules")
    assert len(order) > 60


def test_a_circle_is_found(tmp_path: Path) -> None:
    package = tmp_path / "ring"
    package.mkdir()
    (package / "__init__.py").write_text("from ring import first\n")
    (package / "first.py").write_text("def f():\n    from ring.second import g\n")
    (package / "second.py").write_text("from ring.first import f\n")
    with pytest.raises(CycleError):
        order_of(package)


def test_a_call_imports_neither_the_compiler_nor_its_algebra() -> None:
    """They take longer than all else of dcconv."""
    code = """
import sys, torch, dcconv
dcconv.DecoupledConv2d(3, 4, 3)(torch.ones(1, 3, 5, 5)).sum().backward()
print(*sorted({"torch._dynamo", "torch._inductor", "sympy"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.split() == []


def test_the_mark_of_a_constant_is_the_compilers_own() -> None:
    def ours() -> int:
        return 1

    def own() -> int:
        return 1

    assert constant_for_tracing(ours) is ours
    torch.compiler.assume_constant_result(own)
    assert vars(ours) == vars(own) != {}
