"""How long ONNX Runtime takes for one layer that the `onnx` target wrote, and how far it is off.

    python benchmarks/onnx_layers.py [--size 1024] [--threads 1]

One linear layer of `size` x `size` per format, for one token and for 64; ONNX Runtime's accuracy
levels for fused low-bit weights are 1 (float32 activations, as `qcompile.load` sets it) and 4
(int8 activations, its default). Errors are max |difference| over max |output| of the program.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from qcompile.backends.onnx.target import OnnxTarget
from qcompile.frontends.torch_export import capture_module
from qcompile.ir.program import Program
from qcompile.passes.canonicalize import canonicalize
from qcompile.passes.infra import Context, run_passes
from qcompile.passes.quantize.quantize_activations import QuantizeActivations
from qcompile.passes.quantize.quantize_weights import QuantizeWeights
from qcompile.progress import NullProgress

FORMATS = ("int4-g16", "int4-g32", "int4-g64", "int4-g128", "int4", "int4-g48", "int8-g64", "int8")
REPEATS = 30


def main() -> None:
    """Prints a row per format and accuracy level."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.manual_seed(0)
    layer = nn.Linear(options.size, options.size, bias=False)
    captured = canonicalize(capture_module(layer, torch.randn(2, options.size)))
    print(f"{'format':20} level  {'error':>8} {'1 token':>9} {'64 tokens':>10}  run as")
    for name in FORMATS:
        program = run_passes(captured, [QuantizeWeights(name)])
        for level in ("1", "4"):
            _row(name, program, level, options.threads)
    program = run_passes(captured, [QuantizeWeights("int8"), QuantizeActivations()])
    _row("int8, int8 inputs", program, "1", options.threads)
    _row("float32", captured, "1", options.threads)


def _row(name: str, program: Program, level: str, threads: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        target = OnnxTarget()
        target.pack(target.lower(program, Context()), directory, NullProgress())
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.log_severity_level = 3
        settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
        settings.optimized_model_filepath = str(directory / "optimized.onnx")
        session = onnxruntime.InferenceSession(directory / "model.onnx", settings)
        run_as = onnx.load(directory / "optimized.onnx", load_external_data=False).graph.node
    size = int(session.get_inputs()[0].shape[1])
    x = torch.randn(64, size)
    error, seconds = 0.0, []
    for rows in (x[:1], x):
        feeds = {session.get_inputs()[0].name: rows.numpy()}
        found, expected = session.run(None, feeds)[0], program(rows).numpy()
        error = max(error, float(np.abs(found - expected).max() / np.abs(expected).max()))
        seconds.append(_best(session, feeds))
    times = f"{1e6 * seconds[0]:6.0f} us {1e6 * seconds[1]:7.0f} us"
    kernels = ", ".join(dict.fromkeys(node.op_type for node in run_as))
    print(f"{name:20} {level:5}  {error:8.1e} {times}  {kernels}")


def _best(session: onnxruntime.InferenceSession, feeds: dict[str, np.ndarray]) -> float:
    best = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        session.run(None, feeds)
        best = min(best, time.perf_counter() - started)
    return best


if __name__ == "__main__":
    main()
