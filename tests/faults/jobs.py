"""What the children of `warm_process.py` do."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"


def warm_up(checkpoint: Path) -> None:
    """Does once what every child does, so that it finds everything imported and traced before."""
    import torch

    import qcompile as qc

    torch.set_num_threads(1)
    for target in ("cpu", "cuda"):
        with tempfile.TemporaryDirectory() as folder:
            qc.compile(checkpoint, target=target, output=Path(folder) / "out", threads=1)


def command_line(arguments: list[str]) -> None:
    """``qcompile ARGUMENTS``: ends with its exit code."""
    from qcompile.cli import main

    sys.exit(main(arguments))


def use(path: str) -> str:
    """Loads an artifact, every byte of it verified, and lets it generate."""
    import qcompile as qc

    return qc.load(Path(path), threads=1).generate("hello", max_new_tokens=2)


def capture(path: str) -> str | None:
    """Captures a model and reads all that a compilation reads of it."""
    from qcompile.compiler import open_model, tokenizer_of
    from qcompile.packaging import generation_info

    def read() -> None:
        program = open_model(path, example_inputs=None, dequantize=False)
        generation_info(program.provenance)
        tokenizer_of(program)
        for name in program.weights:
            program.weights.materialize(name)

    return _error_of(read)


def use_artifact(path: str) -> str | None:
    """Loads an artifact and uses all that is in it."""
    import qcompile as qc

    def read() -> None:
        artifact = qc.load(path, threads=1)
        artifact.report  # noqa: B018 -- reads the file
        artifact.generate("hello", max_new_tokens=2)
        artifact.chat([{"role": "user", "content": "hello"}], max_new_tokens=2)

    return _error_of(read)


def read_recipe(path: str) -> str | None:
    """Reads a recipe."""
    from qcompile.recipe import load_recipe

    return _error_of(lambda: load_recipe(Path(path)))


def _error_of(read: Callable[[], object]) -> str | None:
    """The error of qcompile by which something ends, with its class; any other one escapes."""
    from qcompile.errors import QCompileError

    try:
        read()
    except QCompileError as error:
        return f"{type(error).__name__}: {error}"
    return None
