"""What the children of `warm_process.py` do."""

from __future__ import annotations

import os
import sys
import tempfile
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
