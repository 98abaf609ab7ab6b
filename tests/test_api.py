"""The package's surface: its public names, one tree of errors, and imports that point one way."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import files
from importlib.resources import files as resources
from pathlib import Path

import pytest

import vtexport
from vtexport import errors

PACKAGE = Path(vtexport.__file__).parent
MODULES = {
    ".".join(("vtexport", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def ran(code: str) -> str:
    """What a fresh Python that runs `code` prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


# Names


def test_the_distribution_has_one_import_name() -> None:
    installed = {path.parts[0] for path in files("vtexport") or []}
    modules = {name for name in installed if not name.startswith("_") and not name.endswith(".dist-info")}
    assert modules - {"..", "__pycache__"} == {"vtexport"}


def test_public_names_are_sorted_and_there() -> None:
    assert vtexport.__all__ == sorted(vtexport.__all__)
    assert {"build", "BuildOptions", "Bundle", "Runner", "Answer"} <= set(vtexport.__all__)
    assert dir(vtexport) == vtexport.__all__
    for name in vtexport.__all__:
        public = getattr(vtexport, name)
        assert public.__name__ == name
        assert inspect.getdoc(public), f"{name} has no docstring"


def test_every_error_is_public() -> None:
    every = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert every
    assert every <= set(vtexport.__all__)


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Compiled'"):
        vtexport.Compiled  # noqa: B018 - looked up, that is all


def test_types_are_published() -> None:
    assert resources("vtexport").joinpath("py.typed").is_file()


def test_every_error_is_in_the_tree_its_docstring_draws() -> None:
    tree = errors.__doc__ or ""
    every = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, Exception)]
    assert len(every) >= 8
    for error in every:
        assert issubclass(error, errors.VtexportError)
        assert error.__name__ in tree


@pytest.mark.parametrize(
    "code", ["import vtexport", "import vtexport.cli.main", "import vtexport.pruning, vtexport.targets"]
)
def test_what_is_imported_at_once_leaves_torch_alone(code: str) -> None:
    heavy = ("torch", "transformers", "onnx", "onnxruntime", "matplotlib")
    assert ran(f"{code}; import sys; print([name for name in {heavy} if name in sys.modules])") == "[]\n"


# Imports


def imports(module: str, *, typed: bool) -> Iterator[str]:
    """The modules of the package that `module` imports, wherever in it; with `typed` those for type checking too."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not typed:
            skipped |= {id(inner) for part in node.body for inner in ast.walk(part)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "") in MODULES:
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else str(node.module) for name in submodules)


def test_no_imports_run_in_a_circle() -> None:
    """Not even those inside functions, which only put a circle off."""
    edges = {module: set(imports(module, typed=False)) - {module} for module in MODULES}
    done: set[str] = set()

    def follow(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above[above.index(module) :], module))
        if module not in done:
            for other in sorted(edges[module]):
                follow(other, (*above, module))
            done.add(module)

    for module in sorted(edges):
        follow(module, ())
    assert len(done) == len(MODULES) > 100


#: what each package imports besides itself, so that a new dependency is a decision; types alone are none
IMPORTS = {
    "arrays": "",
    "errors": "",
    "progress": "",
    "options": "errors",
    "figures": "",
    "reading": "errors",
    "stopping": "",
    "writing": "errors stopping",
    "native": "errors",
    "models": "arrays errors options reading",
    "pruning": "arrays errors models native options reading writing",
    "graph": "arrays errors models pruning",
    "targets": "arrays errors graph models native options pruning reading stopping",
    "bundle": "errors figures models options pruning reading stopping targets writing",
    "runtime": "arrays bundle errors models pruning targets",
    "check": "arrays bundle errors models pruning runtime targets",
    "builder": "bundle check errors figures graph models options progress pruning targets",
    "deploy": "arrays bundle errors graph models pruning reading runtime targets",
    "serve": "errors models pruning runtime targets",
    "micro": "arrays errors",
    "measure": "arrays builder check errors figures micro models native options progress pruning reading runtime stopping targets writing",
    "cli": "builder bundle deploy errors figures measure models options pruning runtime serve stopping targets writing",
    "vtexport": "",
    "__main__": "cli",
}


def test_dependencies_point_one_way() -> None:
    used: dict[str, set[str]] = {name: set() for name in IMPORTS}
    for module in MODULES:
        own = module.split(".")[1] if "." in module else module
        used[own] |= {name.split(".")[1] for name in imports(module, typed=False) if "." in name} - {own}
    assert {name: " ".join(sorted(others)) for name, others in used.items()} == IMPORTS


def test_files_and_functions_stay_small() -> None:
    for module, path in MODULES.items():
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 320, module
        for node in ast.walk(ast.parse(text)):
            # An ONNX function body is one expression after another, and cannot call a helper.
            if isinstance(node, ast.FunctionDef) and not module.endswith("_functions"):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= 60, f"{module}: {node.name} has {lines} lines"
