"""Models as the `onnx` target writes them, checked and run in plain ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from qcompile.backends.onnx.target import OnnxTarget
from qcompile.frontends.torch_export import capture_module
from qcompile.ir.program import Program
from qcompile.passes.canonicalize import canonicalize
from qcompile.passes.infra import Context
from qcompile.progress import NullProgress

EXACT = 1e-5
"""Of max |difference| over max |value|: float32 sums in other orders."""


def relative(found: Any, expected: Any) -> float:
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    return float((found - expected).abs().max() / expected.abs().max())


def write(program: Program, directory: Path, **options: Any) -> onnx.ModelProto:
    """The model that the target writes, checked."""
    target = OnnxTarget(**options)
    target.pack(target.lower(program, Context()), directory, NullProgress())
    path = directory / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    return onnx.load(path)


def session(directory: Path, **entries: str) -> onnxruntime.InferenceSession:
    """Plain ONNX Runtime, exact: by default it rounds activations of fused low-bit weights."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    for name, value in entries.items():
        setattr(options, name, value)
    path = directory / "model.onnx"
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(directory: Path, *inputs: Tensor) -> list[np.ndarray]:
    runtime = session(directory)
    names = [value.name for value in runtime.get_inputs()]
    feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    found: list[np.ndarray] = runtime.run(None, feeds)
    return found


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def capture(module: nn.Module, *inputs: Tensor) -> Program:
    return canonicalize(capture_module(module, inputs))


class Tied(nn.Module):
    """A table of `n` rows that is looked up and multiplied with."""

    def __init__(self, n: int = 21, k: int = 40) -> None:
        super().__init__()
        self.table = nn.Embedding(n, k)
        self.head = nn.Linear(k, n)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


def capture_tied() -> Program:
    """`Tied` with seeded weights."""
    torch.manual_seed(0)
    return capture(Tied(), torch.zeros(2, 5, dtype=torch.int64))
