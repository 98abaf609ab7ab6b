"""The package's surface: one import name, errors in one tree, and dependencies that point one way."""

from __future__ import annotations

import ast
from importlib.metadata import packages_distributions
from pathlib import Path

import vtexport
from vtexport import errors

PACKAGE = Path(vtexport.__file__).parent


def test_the_distribution_has_one_import_name() -> None:
    names = {name for name, owners in packages_distributions().items() if "vtexport" in owners}
    assert {name for name in names if not name.startswith(("_", "__"))} <= {"vtexport"}


def test_every_error_is_in_the_tree_its_docstring_draws() -> None:
    found = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert all(name in (errors.__doc__ or "") for name in found)
    assert all(issubclass(getattr(errors, name), errors.VtexportError) for name in found)


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "vtexport"}
    return found


def test_dependencies_point_one_way() -> None:
    allowed = {
        "pruning": {"pruning", "errors", "models", "native"},
        "models": {"models", "errors"},
        "graph": {"graph", "pruning", "models", "errors", "targets"},
        "targets": {"targets", "graph", "pruning", "models", "errors", "plugins"},
    }
    for layer, may in allowed.items():
        for path in (PACKAGE / layer).rglob("*.py"):
            used = {name.split(".")[1] for name in imports(path) if name.startswith("vtexport.")}
            assert used <= may, f"{path.name} imports {used - may}"


def test_pruning_is_listed_without_torch() -> None:
    import subprocess
    import sys

    code = "import sys, vtexport.pruning; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_files_stay_small() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 500, path
