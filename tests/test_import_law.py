"""Who may import whom, read from the source."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import quantkit

PACKAGE = Path(quantkit.__file__).parent
ORDER = [
    "errors",
    "versions",
    "progress",
    "jit",
    "threads",
    "metrics",
    "passk",
    "formats",
    "kernels",
    "encoders",
    "checkpoint",
    "modeling",
    "analysis",
    "planning",
    "quantizer",
    "evaluation",
    "session",
    "plans",
    "rl",
    "api",
    "cli",
]
LATE = ("loops_", "programs_", "plugin_")  # compiled code, and classes of heavy packages
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path):
    """(module, inside a function) of every import of a file; TYPE_CHECKING blocks count too."""
    tree = ast.parse(path.read_text())
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, id(node) in inside
            if node.module == "quantkit":
                yield from ((f"quantkit.{alias.name}", id(node) in inside) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_package_imports_only_from_those_before_it(path):
    here = room(path)
    if here == "__init__":
        return
    for module, _ in imports(path):
        parts = module.split(".")
        if parts[0] == "quantkit" and len(parts) > 1 and parts[1] != here:
            assert ORDER.index(parts[1]) < ORDER.index(here), f"{path.name} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_packages_are_imported_inside_functions(path):
    if path.name.startswith(LATE):  # these modules are themselves imported inside functions
        return
    for module, inside in imports(path):
        heavy = module.split(".")[0] in {"numba", "triton", "transformers", "matplotlib", "scipy", "llama_cpp"}
        late = module.split(".")[-1].startswith(LATE)
        assert inside or not (heavy or late), f"{path.name} imports {module} when it is imported"


def test_every_submodule_imports_and_the_five_functions_remain():
    for info in pkgutil.walk_packages([str(PACKAGE)], "quantkit."):
        importlib.import_module(info.name)
    for name in quantkit.__all__:
        assert callable(getattr(quantkit, name)), name
    assert set(quantkit.__all__) == {"analyze", "plan", "quantize", "compare", "load"}


def test_help_imports_nothing_heavy():
    code = "import sys; from quantkit.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n" \
           "print(sorted({'torch','numpy','transformers','numba','scipy','rich'} & set(sys.modules)))"  # fmt: skip
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip().endswith("[]")
