"""The import rule of docs/design.md: serving may import actors, actors may import sharding, never
backwards and in no circle, and each heavy library has its homes.

Imports inside functions count, those under TYPE_CHECKING do not. Not here: what a module does.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("sharding", "actors", "serving")
"""From the lowest up: a layer may import itself and those before it."""

HTTP = ("app", "gate", "http", "sse", "completions", "chat", "errors")
HOMES = {
    "torch": ("sharding.kernels*", "sharding.model.*", "sharding.stage", "actors.transport"),
    "ray": (
        "actors.placement",
        "actors.spares",
        "actors.stage_actor",
        "serving.app",
        "serving.cluster",
        "serving.metrics",
    ),
    "prometheus_client": ("serving.metrics",),
    **dict.fromkeys(("grafana_api", "requests"), ("serving.grafana",)),
    "llguidance": ("actors.grammar", "actors.vetting"),
    "triton": ("sharding.kernels.triton*",),
    "fastapi": tuple(f"serving.{name}" for name in HTTP),
    "starlette": tuple(f"serving.{name}" for name in HTTP),
    # Installed with the test extra only: a user's installation does not have them.
    **dict.fromkeys(("httpx", "hypothesis", "openai", "pytest", "transformers", "xllamacpp"), ()),
}
LIGHT = (
    "sharding.errors",
    "sharding.gguf.reader",
    "sharding.gguf.tokenizer",
    "sharding.model.arch",
    "sharding.cost",
    "sharding.planner",
    "actors.*",
)
"""Modules that start neither torch nor Ray, not even through others: `longspan plan` answers at
once."""
NOT_LIGHT = ("actors.placement", "actors.spares", "actors.stage_actor", "actors.transport")

INITS_WITH_CODE = ("sharding.kernels",)
"""The one package whose `__init__.py` holds more than a docstring: the kernel contract."""


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {
    _name(path): path
    for layer in LAYERS
    for suffix in ("py", "pyi")  # a stub stands for a compiled module
    for path in (ROOT / layer).rglob(f"*.{suffix}")
}
TREES = {name: ast.parse(path.read_text(), path) for name, path in PATHS.items()}


def _is_light(module: str) -> bool:
    return module not in NOT_LIGHT and any(fnmatch(module, pattern) for pattern in LIGHT)


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below, but for what only a type checker runs."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from _nodes(child)


def _imported(module: str) -> Iterator[str]:
    """Dotted names that a module imports; the names of a `from` import may be attributes."""
    path = PATHS[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in _nodes(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _own_module(dotted: str) -> str | None:
    """The module of ours that an imported name is, or is an attribute of."""
    return next((name for name in (dotted, dotted.rpartition(".")[0]) if name in PATHS), None)


@pytest.mark.parametrize("module", sorted(PATHS))
def test_no_layer_imports_the_one_above_it(module: str) -> None:
    allowed = LAYERS[: LAYERS.index(module.partition(".")[0]) + 1]
    tops = {name.partition(".")[0] for name in _imported(module)}
    assert tops.isdisjoint(set(LAYERS) - set(allowed)), f"{module} may import only {allowed}"


@pytest.mark.parametrize("module", sorted(PATHS))
def test_heavy_libraries_stay_in_their_homes(module: str) -> None:
    tops = {name.partition(".")[0] for name in _imported(module)}
    for library in tops & set(HOMES):
        home = any(fnmatch(module, pattern) for pattern in HOMES[library])
        light = library in ("torch", "ray") and _is_light(module)
        assert home and not light, f"{module} imports {library}, whose homes are {HOMES[library]}"


def test_imports_form_no_circle() -> None:
    graph = {
        module: {
            own for name in _imported(module) if (own := _own_module(name)) not in (None, module)
        }
        for module in PATHS
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("import circle: " + " <- ".join(map(str, error.args[1])))


@pytest.mark.parametrize(
    "module", sorted(m for m, path in PATHS.items() if path.name == "__init__.py")
)
def test_package_files_hold_a_docstring_only(module: str) -> None:
    if module in INITS_WITH_CODE:
        assert ast.get_docstring(TREES[module])
    else:
        (only,) = TREES[module].body
        assert isinstance(only, ast.Expr) and ast.get_docstring(TREES[module])


def test_light_modules_start_neither_torch_nor_ray() -> None:
    """Guards the way round the tables: a light module that imports a heavy one of ours."""
    light = sorted(module for module in PATHS if _is_light(module))
    code = (
        "import importlib, sys\n"
        f"for module in {light}:\n"
        "    importlib.import_module(module)\n"
        "    heavy = {'torch', 'ray'} & set(sys.modules)\n"
        "    if heavy: sys.exit(f'{module} starts {heavy}')\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert child.returncode == 0, child.stderr
