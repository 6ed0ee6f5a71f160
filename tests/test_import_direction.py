"""Imports point one way, and what loads an artifact never needs torch.

Every module is parsed, not imported; imports inside functions count like any other. Those under
``if TYPE_CHECKING:`` do not exist at run time and are free.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

EVERYWHERE = frozenset({"errors", "folding", "progress"})
"""Entries of the package that any module may import, and that import none themselves."""

LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split())
    for names in (
        "kernels",
        "ir",
        "formats",
        "analysis",
        "calibration",
        "passes",
        # What an artifact consists of, which backends write and read.
        "manifest atomic_directory text generation",
        "backends",
        "recipe recipe_schema recipe_yaml artifact evaluation report packaging pipeline compiler "
        "planned_transforms planning estimates legality inspection inspection_records "
        "inspection_sites artifact_inspection",
        "__main__ cli cli_inspect cli_parity cli_options console conversation tables "
        "inspection_tables",
    )
)
"""Entries of the package from the bottom to the top; a module imports its own layer or lower."""

EXCEPTIONS: dict[str, frozenset[str]] = {"frontends": frozenset({"ir"})}
"""Entries beside the layers and all that they may import; `compiler` and what is above may
import them."""

WITHOUT_TORCH = (
    "qcompile/artifact.py",
    "qcompile/atomic_directory.py",
    "qcompile/errors.py",
    "qcompile/generation.py",
    "qcompile/manifest.py",
    "qcompile/progress.py",
    "qcompile/text.py",
    "backends/cpu/runtime.py",
    "backends/onnx/runtime.py",
    "kernels/cpu/__init__.py",
    "kernels/cpu/layout.py",
)
"""Files on the path of `qcompile.load`: they and all they import at load time avoid `HEAVY`."""

HEAVY = frozenset({"torch", "transformers", "triton"})

FOLDERS = ("qcompile", "passes", "backends", "kernels")


@dataclass(frozen=True)
class Import:
    """One imported module; ``deferred`` when it stands inside a function."""

    module: str
    line: int
    deferred: bool


def sources() -> list[Path]:
    """All modules of the package, relative to the root."""
    found = []
    for folder in FOLDERS:
        for directory, _, files in os.walk(ROOT / folder):
            found += [Path(directory, f).relative_to(ROOT) for f in files if f.endswith(".py")]
    return sorted(found)


def module_name(path: Path) -> str:
    """``passes/lower/match.py`` as ``qcompile.passes.lower.match``."""
    parts = list(path.with_suffix("").parts)
    if parts[0] != "qcompile":
        parts.insert(0, "qcompile")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, text: str | None = None) -> list[Import]:
    """What a module imports at run time, with relative imports resolved.

    ``from a import b`` counts as ``a.b``, since ``b`` may be a module.
    """
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8") if text is None else text)
    package = module_name(path)
    if path.name != "__init__.py":
        package = package.rpartition(".")[0]
    return [
        Import(module, node.lineno, deferred)
        for node, deferred in _import_nodes(tree, deferred=False)
        for module in _modules(node, package)
    ]


def _import_nodes(
    tree: ast.AST, *, deferred: bool
) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, deferred
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for alternative in child.orelse:
                yield from _import_nodes(ast.Module([alternative], []), deferred=deferred)
        else:
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _import_nodes(child, deferred=deferred or inside)


def _modules(node: ast.Import | ast.ImportFrom, package: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        parent = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*parent, *([base] if base else [])])
    return [f"{base}.{alias.name}" for alias in node.names]


def entry_of(module: str) -> str | None:
    """The entry directly under the package, None for other packages' modules."""
    parts = module.split(".")
    if parts[0] != "qcompile":
        return None
    return parts[1] if len(parts) > 1 else "__init__"


def layer_of(entry: str) -> int | None:
    return next((i for i, names in enumerate(LAYERS) if entry in names), None)


def may_import(importer: str, imported: str) -> bool:
    """Whether entry ``importer`` may import entry ``imported``."""
    if importer in ("__init__", imported) or imported in EVERYWHERE:
        return True
    if importer in EVERYWHERE:
        return False
    if importer in EXCEPTIONS:
        return imported in EXCEPTIONS[importer]
    own, other = layer_of(importer), layer_of(imported)
    if own is None:
        return False
    if imported in EXCEPTIONS:
        return own >= (layer_of("compiler") or 0)
    if other is None:  # names of qcompile/__init__.py, which may come from anywhere
        return own >= (layer_of("compiler") or 0)
    return other <= own


def violations(path: Path, text: str | None = None) -> list[str]:
    """The imports of a module that point the wrong way, as ``file:line: why``."""
    importer = entry_of(module_name(path))
    assert importer is not None
    wrong = []
    for found in imports_of(path, text):
        if found.module.split(".")[0] in FOLDERS[1:]:
            wrong.append(f"{path}:{found.line}: import it as qcompile.{found.module}")
        imported = entry_of(found.module)
        if imported is not None and not may_import(importer, imported):
            wrong.append(f"{path}:{found.line}: {importer} must not import {found.module}")
    return wrong


def test_every_entry_of_the_package_has_a_place() -> None:
    entries = {entry_of(module_name(path)) for path in sources()} - {"__init__"}
    placed = EVERYWHERE.union(*LAYERS, EXCEPTIONS)
    assert sorted(str(e) for e in entries if e not in placed) == []


def test_imports_point_one_way() -> None:
    assert [line for path in sources() for line in violations(path)] == []


@pytest.mark.parametrize("start", WITHOUT_TORCH)
def test_path_of_load_avoids_heavy_packages(start: str) -> None:
    modules = {module_name(path): path for path in sources()}
    first = Path(start)
    assert (ROOT / first).is_file()
    assert [f"{first}:{i.line}" for i in imports_of(first) if _top(i.module) in HEAVY] == []

    seen: set[str] = set()
    queue = _with_packages(module_name(first), modules)
    reached: list[str] = []
    while queue:
        module = queue.pop()
        if module in seen:
            continue
        seen.add(module)
        for found in imports_of(modules[module]):
            if found.deferred:
                continue
            if _top(found.module) in HEAVY:
                reached.append(f"{modules[module]}:{found.line} imports {found.module}")
            queue += _with_packages(found.module, modules)
    assert reached == []


def _top(module: str) -> str:
    return module.partition(".")[0]


def _with_packages(module: str, known: dict[str, Path]) -> list[str]:
    """The modules that importing ``module`` executes: itself, if it is one, and its packages."""
    parts = module.split(".")
    names = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return [name for name in names if name in known]


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("kernels/a/reference.py", "from qcompile.ir import types", "kernels must not import"),
        ("qcompile/ir/a.py", "def f():\n  import qcompile.passes.infra", "a.py:2: ir must not"),
        ("passes/a.py", "from .. import compiler", "passes must not import qcompile.compiler"),
        ("passes/a.py", "from qcompile import compile", "passes must not import qcompile.compile"),
        ("passes/a.py", "import passes.infra", "import it as qcompile.passes.infra"),
        ("qcompile/frontends/a.py", "from qcompile.formats import b", "frontends must not"),
        ("passes/a.py", "from qcompile.frontends import b", "passes must not import"),
        ("qcompile/errors.py", "from qcompile.ir import b", "errors must not import"),
    ],
)
def test_wrong_direction_is_found(path: str, text: str, expected: str) -> None:
    (found,) = violations(Path(path), text)
    assert expected in found


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("passes/lower/a.py", "from . import b\nfrom ..infra import Pass"),
        ("passes/a.py", "from qcompile.ir.program import Program\nimport torch"),
        ("kernels/a/reference.py", "from qcompile.errors import QCompileError"),
        ("qcompile/ir/a.py", "if TYPE_CHECKING:\n  from qcompile.passes import infra"),
        ("qcompile/compiler.py", "from qcompile.frontends import huggingface"),
        ("qcompile/cli.py", "from qcompile import compile"),
    ],
)
def test_right_direction_is_accepted(path: str, text: str) -> None:
    assert violations(Path(path), text) == []
