"""What `import qcompile` promises: names, documentation, and that it is light."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import qcompile

PROMISED = (
    "Artifact",
    "Pass",
    "Program",
    "QCompileError",
    "Recipe",
    "Rule",
    "Target",
    "capture",
    "compile",
    "evaluate",
    "load",
    "run_passes",
)
"""Names that users build on: removing one is a breaking change."""


@pytest.mark.parametrize("name", PROMISED)
def test_promised_name_is_public(name: str) -> None:
    assert name in qcompile.__all__


@pytest.mark.parametrize("name", [name for name in qcompile.__all__ if name != "__version__"])
def test_public_name_can_be_imported_and_is_documented(name: str) -> None:
    value = getattr(qcompile, name)
    documentation = inspect.getdoc(value)
    assert documentation
    assert documentation.split("\n")[0].endswith((".", ":"))
    if inspect.isclass(value):
        # A class without a docstring of its own would show that of its base.
        assert value.__doc__


@pytest.mark.parametrize("name", ["capture", "compile", "evaluate", "load", "run_passes"])
def test_public_function_documents_what_it_raises_and_types_every_argument(name: str) -> None:
    function = getattr(qcompile, name)
    assert "Raises:" in inspect.getdoc(function)
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty


def test_public_names_are_sorted_and_listed_once() -> None:
    names = list(qcompile.__all__)
    assert names == sorted(set(names))
    assert dir(qcompile) == names


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'compil'"):
        _ = qcompile.compil  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "statement",
    [
        "import qcompile",
        "from qcompile import QCompileError",
        "from qcompile import Artifact, load",
    ],
)
def test_import_is_light(statement: str) -> None:
    code = f"{statement}\nimport sys\nprint(*sorted({{m.partition('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "onnx", "sympy"} & set(done.stdout.split())
