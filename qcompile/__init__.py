"""qcompile: a graph-rewriting compiler that turns a float model into a deployable low-bit one.

    import qcompile as qc

    artifact = qc.compile("path/to/model", recipe="w4a8-rtn", target="cpu", output="out/")
    artifact = qc.load("out/")
    print(artifact.generate("The capital of France is", max_new_tokens=32))

Names are imported when they are first used: `load` and what it returns need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qcompile.errors import QCompileError

if TYPE_CHECKING:
    from qcompile.analysis.sites import Site, find_sites
    from qcompile.artifact import Artifact, load
    from qcompile.backends.base import Target
    from qcompile.compiler import capture, compile, evaluate
    from qcompile.evaluation.evaluate import Evaluation
    from qcompile.evaluation.parity import Parity, parity
    from qcompile.inspection import inspect
    from qcompile.ir.program import Program
    from qcompile.legality import preflight
    from qcompile.passes.infra import Pass, run_passes
    from qcompile.passes.rule import Rule
    from qcompile.passes.transform.randomize_sites import randomize_sites
    from qcompile.recipe import Recipe, load_recipe

__version__ = "0.1.0"

__all__ = [
    "Artifact",
    "Evaluation",
    "Parity",
    "Pass",
    "Program",
    "QCompileError",
    "Recipe",
    "Rule",
    "Site",
    "Target",
    "__version__",
    "capture",
    "compile",
    "evaluate",
    "find_sites",
    "inspect",
    "load",
    "load_recipe",
    "parity",
    "preflight",
    "randomize_sites",
    "run_passes",
]

_HOMES = {
    "Artifact": "qcompile.artifact",
    "Evaluation": "qcompile.evaluation.evaluate",
    "Parity": "qcompile.evaluation.parity",
    "Pass": "qcompile.passes.infra",
    "Program": "qcompile.ir.program",
    "Recipe": "qcompile.recipe",
    "Rule": "qcompile.passes.rule",
    "Site": "qcompile.analysis.sites",
    "Target": "qcompile.backends.base",
    "capture": "qcompile.compiler",
    "compile": "qcompile.compiler",
    "evaluate": "qcompile.compiler",
    "find_sites": "qcompile.analysis.sites",
    "inspect": "qcompile.inspection",
    "load": "qcompile.artifact",
    "load_recipe": "qcompile.recipe",
    "parity": "qcompile.evaluation.parity",
    "preflight": "qcompile.legality",
    "randomize_sites": "qcompile.passes.transform.randomize_sites",
    "run_passes": "qcompile.passes.infra",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qcompile' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
