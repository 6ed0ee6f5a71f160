"""The attention node of the CPU library over caches of every format.

Times of one layer, caches bound as in a decoding loop. Decoding runs over as many layers as a small
model has, so that their caches come from where they would: not from the first-level cache. CPU time
counts all threads; with one thread it is the time that a quiet machine would take.

    python benchmarks/cpu_attention.py --heads 9 --kv-heads 3 --width 64 --threads 1
    python benchmarks/cpu_attention.py --heads 32 --kv-heads 8 --width 128 --layers 4 --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper

from qcompile.kernels.cpu import OPERATOR_DOMAIN, library_path
from qcompile.kernels.kv_append.rows import CACHE_FORMATS, FLOAT_CACHE, encode_rows

CASES = ((1, 64), (1, 1024), (1, 4096), (512, 0), (512, 1536))
"""New tokens, and how many stand in the cache."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a layer's attention."""

    heads: int
    kv_heads: int
    width: int


@dataclass(frozen=True)
class Row:
    """CPU microseconds of one layer."""

    tokens: int
    past: int
    format: str
    best: float
    median: float


def arrays(shape: Shape, tokens: int, past: int, format: str) -> list[np.ndarray | None]:
    """Inputs of the node in its order."""
    generator = np.random.default_rng(0)

    def gaussian(*sizes: int) -> np.ndarray:
        return generator.standard_normal(sizes).astype(np.float32)

    kv, width = shape.kv_heads, shape.width
    caches = [gaussian(1, kv, past + tokens, width) for _ in range(2)]
    if format != FLOAT_CACHE:
        caches = [encode_rows(torch.from_numpy(cache), format, 0).numpy() for cache in caches]
    angles = gaussian(1, tokens, width // 2)
    return [
        gaussian(1, tokens, shape.heads * width),
        *(gaussian(1, tokens, kv * width) for _ in range(2)),
        *caches,
        np.ones((1, past + tokens), np.int64),
        None,
        np.cos(angles),
        np.sin(angles),
    ]


def make_session(
    shape: Shape, inputs: list[np.ndarray | None], format: str, threads: int
) -> onnxruntime.InferenceSession:
    """A model of the one node."""
    attributes: dict[str, Any] = {
        "num_heads": shape.heads,
        "num_kv_heads": shape.kv_heads,
        "causal": 1,
        "rotary_dim": shape.width,
    }
    if format != FLOAT_CACHE:
        attributes |= {"key_format": format, "value_format": format}
    names = ["" if array is None else f"x{i}" for i, array in enumerate(inputs)]
    outputs = ["y0", "y1", "y2"]
    kind = "Attention" if format == FLOAT_CACHE else "QAttention"
    node = helper.make_node(kind, names, outputs, domain=OPERATOR_DOMAIN, **attributes)
    declared = [
        helper.make_tensor_value_info(
            f"x{i}", helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim
        )
        for i, array in enumerate(inputs)
        if array is not None
    ]
    results = [helper.make_empty_tensor_value_info(name) for name in outputs]
    graph = helper.make_graph([node], "attention", declared, results)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(OPERATOR_DOMAIN, 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library_path()))
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def bind(
    session: onnxruntime.InferenceSession, inputs: list[np.ndarray | None]
) -> tuple[onnxruntime.IOBinding, list[onnxruntime.OrtValue]]:
    """One layer's buffers: caches of its own, and the values that keep all alive."""
    binding, kept = session.io_binding(), []
    for i, array in enumerate(inputs):
        if array is None:
            continue
        value = onnxruntime.OrtValue.ortvalue_from_numpy(array.copy())
        kept.append(value)
        binding.bind_ortvalue_input(f"x{i}", value)
        if i in (3, 4):
            binding.bind_ortvalue_output(f"y{i - 2}", value)
    binding.bind_output("y0")
    return binding, kept


def measure(
    shape: Shape, tokens: int, past: int, format: str, *, layers: int, threads: int, seconds: float
) -> Row:
    """Rounds over all layers, for some seconds."""
    inputs = arrays(shape, tokens, past, format)
    session = make_session(shape, inputs, format, threads)
    bound = [bind(session, inputs) for _ in range(layers if tokens == 1 else 1)]
    times: list[float] = []
    end = time.monotonic() + seconds
    while len(times) < 3 or time.monotonic() < end:
        start = time.process_time()
        for binding, _ in bound:
            session.run_with_iobinding(binding)
        times.append((time.process_time() - start) / len(bound) * 1e6)
    return Row(tokens, past, format, min(times), statistics.median(times))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    shape = Shape(options.heads, options.kv_heads, options.width)
    rows = []
    for tokens, past in CASES:
        for format in (FLOAT_CACHE, *CACHE_FORMATS):
            row = measure(
                shape,
                tokens,
                past,
                format,
                layers=options.layers,
                threads=options.threads,
                seconds=options.seconds,
            )
            rows.append(row)
            if not options.json:
                print(
                    f"{tokens:4d} tokens over {past:5d}  {format:6s}"
                    f"{row.best:10.1f} us  (median {row.median:.1f})",
                    flush=True,
                )
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))


if __name__ == "__main__":
    main()
