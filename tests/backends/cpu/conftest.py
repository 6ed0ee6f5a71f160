"""Tiny models as programs, quantized programs and artifacts, each made once per session."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qcompile.artifact import Artifact
from qcompile.compiler import capture, compile
from qcompile.ir.program import Program
from qcompile.passes.infra import PassManager
from qcompile.pipeline import recipe_phases
from qcompile.recipe import load_recipe

if TYPE_CHECKING:
    from tests.conftest import TinyCheckpoint

CAUSAL_MODELS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "llama-tied": {"tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True},
    "mistral": {"tie_word_embeddings": False, "sliding_window": 6},
}
"""What the tiny models are called here, and their configurations."""

Models = Callable[[str], Program]
QuantizedModels = Callable[[str, Any], Program]
Artifacts = Callable[[str, Any], Artifact]


@pytest.fixture(scope="session")
def checkpoint(tiny_checkpoint: TinyCheckpoint) -> Callable[[str], Path]:
    """The directory of a tiny model by its name here."""

    def find(name: str) -> Path:
        return tiny_checkpoint(name.split("-")[0], **CAUSAL_MODELS[name])

    return find


@pytest.fixture(scope="session")
def program(checkpoint: Callable[[str], Path]) -> Models:
    """The raised float program of a tiny model."""
    return functools.cache(lambda name: capture(checkpoint(name)))


@pytest.fixture(scope="session")
def quantized(program: Models) -> QuantizedModels:
    """The program of a tiny model after a recipe, before lowering."""

    @functools.cache
    def make(name: str, recipe: str) -> Program:
        return PassManager(recipe_phases(load_recipe(recipe))).run(program(name))[0]

    return make


@pytest.fixture(scope="session")
def artifact(program: Models, tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """A tiny model compiled for the CPU, to run on one thread."""

    @functools.cache
    def make(name: str, recipe: str) -> Artifact:
        output = tmp_path_factory.mktemp(name) / "artifact"
        return compile(program(name), recipe=recipe, output=output, threads=1)

    return make
