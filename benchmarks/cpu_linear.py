"""Times a quantized linear layer on the CPU kernels beside ONNX Runtime's own operators.

Every variant is a chain of equal layers with different weights, more of them than the caches
hold, so that a single row streams its weights from memory. Variants take turns, round by round,
next to a probe of the memory's bandwidth: compare figures of one run only.

    python benchmarks/cpu_linear.py --n 4096 --k 4096 --rows 1 4 16 128 --threads 2
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper

from qcompile.backends.cpu.packable import layout_of
from qcompile.formats import LookupFormat, parse_format
from qcompile.kernels.cpu import OPERATOR_DOMAIN, library_path
from qcompile.kernels.cpu.layout import pack_linear

GIGA = 1e9
Initializers = list[onnx.TensorProto]
Layer = tuple[list[onnx.NodeProto], Initializers, int]


@dataclass(frozen=True)
class Setting:
    n: int
    k: int
    threads: int
    rounds: int
    working_set: int  # bytes of weights that one pass streams, at least
    cpu_time: bool = False  # instead of wall-clock time


@dataclass(frozen=True)
class Result:
    variant: str
    rows: int
    microseconds: float  # per layer, median of the rounds
    least: float
    most: float
    weight_bytes: int
    gigabytes_per_second: float
    gigaflops: float


def codes_and_scale(setting: Setting, bits: int, group: int, seed: int) -> tuple[np.ndarray, ...]:
    """Random codes, and a scale that keeps activations of order one along the chain."""
    rng = np.random.default_rng(seed)
    groups = 1 if group == 0 else setting.k // group
    codes = rng.integers(0, 1 << bits, (setting.n, setting.k), dtype=np.uint8)
    deviation = (1 << bits) / 12**0.5
    scale = np.full((setting.n, groups), np.float16(1 / (deviation * setting.k**0.5)), np.float32)
    # Codes lie half a step below zero in the mean. Rows of both signs keep that from adding up.
    scale[1::2] *= -1
    return codes, scale


def ours(bits: int, group: int, act: str) -> Callable[[Setting, int, str, str], Layer]:
    def make(setting: Setting, index: int, source: str, target: str) -> Layer:
        codes, scale = codes_and_scale(setting, bits, group, index)
        packed = pack_linear(codes, scale, bits=bits, group_size=group)
        node = helper.make_node(
            "QLinear",
            [source, f"w{index}"],
            [target],
            domain=OPERATOR_DOMAIN,
            N=setting.n,
            K=setting.k,
            bits=bits,
            group_size=group,
            scale_dtype=1,
            act=act,
        )
        return [node], [onnx.numpy_helper.from_array(packed, f"w{index}")], packed.nbytes

    return make


def ours_in_format(name: str, act: str) -> Callable[[Setting, int, str, str], Layer]:
    """Our product with a weight in any format that the kernels read."""

    def make(setting: Setting, index: int, source: str, target: str) -> Layer:
        format = parse_format(name)
        layout = layout_of(format)
        generator = torch.Generator().manual_seed(index)
        deviation = 1 / setting.k**0.5
        # A few rows over and over: encoding takes longer than all the rest.
        rows = torch.randn(64, setting.k, generator=generator) * deviation
        quantized = format.encode(rows.repeat(setting.n // 64, 1))
        tensors = {
            part: (tensor.float() if tensor.is_floating_point() else tensor).numpy()
            for part, tensor in quantized.tensors.items()
        }
        outer = tensors.get("outer_scale")
        in_table = isinstance(format, LookupFormat) and layout.coding == "table"
        packed = pack_linear(
            tensors["codes"],
            tensors["scale"],
            bits=layout.bits,
            group_size=layout.group_size,
            scale_dtype=layout.scale_dtype,
            coding=layout.coding,
            levels=np.array(format.levels, np.float32) if in_table else None,
            outer_scale=None if outer is None else outer.reshape(-1),
        )
        node = helper.make_node(
            "QLinear",
            [source, f"w{index}"],
            [target],
            domain=OPERATOR_DOMAIN,
            N=setting.n,
            K=setting.k,
            **layout.attributes(),
            act=act,
        )
        return [node], [onnx.numpy_helper.from_array(packed, f"w{index}")], packed.nbytes

    return make


def matmul_nbits(bits: int, group: int) -> Callable[[Setting, int, str, str], Layer]:
    """ONNX Runtime's weight-only matrix product, with int8 arithmetic (accuracy level 4)."""

    def make(setting: Setting, index: int, source: str, target: str) -> Layer:
        codes, scale = codes_and_scale(setting, bits, group, index)
        blocks = codes.reshape(setting.n, setting.k // group, group)
        if bits == 4:
            blocks = blocks[..., 0::2] | blocks[..., 1::2] << 4
        weights = [
            onnx.numpy_helper.from_array(np.ascontiguousarray(blocks), f"w{index}"),
            onnx.numpy_helper.from_array(scale.reshape(-1), f"s{index}"),
        ]
        node = helper.make_node(
            "MatMulNBits",
            [source, f"w{index}", f"s{index}"],
            [target],
            domain="com.microsoft",
            N=setting.n,
            K=setting.k,
            bits=bits,
            block_size=group,
            accuracy_level=4,
        )
        return [node], weights, blocks.nbytes + scale.nbytes

    return make


def matmul_integer() -> Callable[[Setting, int, str, str], Layer]:
    """ONNX's dynamically quantized product: one scale per tensor of activations."""

    def make(setting: Setting, index: int, source: str, target: str) -> Layer:
        codes, scale = codes_and_scale(setting, 8, 0, index)
        weight = np.ascontiguousarray((codes.T.astype(np.int16) - 128).astype(np.int8))
        q, s, z, i, f, t = (f"{name}{index}" for name in "qszift")
        nodes = [
            helper.make_node("DynamicQuantizeLinear", [source], [q, s, z]),
            helper.make_node("MatMulInteger", [q, f"w{index}", z], [i]),
            helper.make_node("Cast", [i], [f], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f, s], [t]),
            helper.make_node("Mul", [t, f"c{index}"], [target]),
        ]
        weights = [
            onnx.numpy_helper.from_array(weight, f"w{index}"),
            onnx.numpy_helper.from_array(np.float32(scale[0, 0]), f"c{index}"),
        ]
        return nodes, weights, weight.nbytes

    return make


VARIANTS = {
    "qcompile int4 g32": ours(4, 32, "int8_token"),
    "qcompile int4 g64": ours(4, 64, "int8_token"),
    "qcompile int4 g128": ours(4, 128, "int8_token"),
    "qcompile int4 g32 float": ours(4, 32, "float"),
    "qcompile int8": ours(8, 0, "int8_token"),
    **{f"qcompile int{bits} g64": ours(bits, 64, "int8_token") for bits in (1, 2, 3, 5, 6, 7, 8)},
    "qcompile ternary": ours_in_format("ternary", "int8_token"),
    "qcompile ternary g64": ours_in_format("ternary-g64", "int8_token"),
    "qcompile ternary float": ours_in_format("ternary", "float"),
    "qcompile nf4 g64 float": ours_in_format("nf4-g64", "float"),
    "qcompile mxfp4": ours_in_format("mxfp4", "int8_token"),
    "qcompile mxfp4 float": ours_in_format("mxfp4", "float"),
    "qcompile nvfp4": ours_in_format("nvfp4", "int8_token"),
    "qcompile fp8 float": ours_in_format("fp8", "float"),
    "MatMulNBits int4 g32": matmul_nbits(4, 32),
    "MatMulNBits int4 g64": matmul_nbits(4, 64),
    "MatMulNBits int4 g128": matmul_nbits(4, 128),
    "MatMulInteger int8": matmul_integer(),
}


class Chain:
    """A session of equal layers, one after the other."""

    def __init__(self, name: str, setting: Setting) -> None:
        make = VARIANTS[name]
        nodes: list[onnx.NodeProto] = []
        initializers: Initializers = []
        index = total = 0
        while total < setting.working_set:
            layer, weights, self.weight_bytes = make(setting, index, f"x{index}", f"x{index + 1}")
            nodes += layer
            initializers += weights
            index, total = index + 1, total + self.weight_bytes
        self.layers = index
        shape: list[str | int | None] = ["rows", setting.k]
        graph = helper.make_graph(
            nodes,
            "chain",
            [helper.make_tensor_value_info("x0", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(f"x{index}", TensorProto.FLOAT, shape)],
            initializers,
        )
        domains = [("", 20), (OPERATOR_DOMAIN, 1), ("com.microsoft", 1)]
        opsets = [helper.make_opsetid(domain, version) for domain, version in domains]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = ort.SessionOptions()
        options.register_custom_ops_library(str(library_path()))
        options.intra_op_num_threads = setting.threads
        # CPU time is what one thread would take if nobody else ran.
        self.clock = time.process_time if setting.cpu_time else time.perf_counter
        self.session = ort.InferenceSession(model.SerializeToString(), options)

    def seconds_per_layer(self, x: np.ndarray) -> float:
        start = self.clock()
        self.session.run(None, {"x0": x})
        return (self.clock() - start) / self.layers


def memory_bandwidth(threads: int, buffer: np.ndarray) -> float:
    """Bytes per second of reading `buffer` once, split over threads."""

    def read(part: np.ndarray) -> None:
        np.einsum("i,i->", part, part)  # vectorized, and never threaded by itself

    parts = np.array_split(buffer, threads)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, parts))
        start = time.perf_counter()
        list(pool.map(read, parts))
        return buffer.nbytes / (time.perf_counter() - start)


def measure(
    setting: Setting, names: list[str], all_rows: list[int]
) -> tuple[list[Result], list[float]]:
    chains = {name: Chain(name, setting) for name in names}
    buffer = np.ones(128 * 2**20, np.float32)
    bandwidth = []
    results = []
    for rows in all_rows:
        x = np.random.default_rng(0).standard_normal((rows, setting.k)).astype(np.float32)
        times: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(setting.rounds + 1):
            bandwidth.append(memory_bandwidth(setting.threads, buffer))
            first = turn % len(names)  # so that no variant always follows the same other
            for name in names[first:] + names[:first]:
                seconds = chains[name].seconds_per_layer(x)
                if turn > 0:  # the first turn warms up
                    times[name].append(seconds)
        for name, chain in chains.items():
            median = statistics.median(times[name])
            results.append(
                Result(
                    variant=name,
                    rows=rows,
                    microseconds=round(median * 1e6, 1),
                    least=round(min(times[name]) * 1e6, 1),
                    most=round(max(times[name]) * 1e6, 1),
                    weight_bytes=chain.weight_bytes,
                    gigabytes_per_second=round(chain.weight_bytes / median / GIGA, 2),
                    gigaflops=round(2 * rows * setting.n * setting.k / median / GIGA, 1),
                )
            )
    return results, bandwidth


def print_table(results: list[Result], bandwidth: list[float]) -> None:
    low, middle, high = min(bandwidth), statistics.median(bandwidth), max(bandwidth)
    print(f"memory: {middle / GIGA:.1f} GB/s ({low / GIGA:.1f}-{high / GIGA:.1f})")
    print(f"{'variant':26} {'rows':>5} {'us':>9} {'range':>17} {'GB/s':>7} {'GFLOP/s':>8}")
    for r in results:
        spread = f"{r.least:.0f}-{r.most:.0f}"
        print(
            f"{r.variant:26} {r.rows:5} {r.microseconds:9.1f} {spread:>17} "
            f"{r.gigabytes_per_second:7.2f} {r.gigaflops:8.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=4096, help="output features")
    parser.add_argument("--k", type=int, default=4096, help="input features; chained, so N = K")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 128])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--megabytes", type=float, default=160, help="weights per chain")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--cpu-time", action="store_true", help="for a busy machine; one thread")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    arguments = parser.parse_args()
    if arguments.n != arguments.k:
        parser.error("layers are chained, so --n and --k must be equal")
    if arguments.cpu_time and arguments.threads != 1:
        parser.error("--cpu-time adds up over threads: it needs --threads 1")
    setting = Setting(
        arguments.n,
        arguments.k,
        arguments.threads,
        arguments.rounds,
        int(arguments.megabytes * 2**20),
        arguments.cpu_time,
    )
    results, bandwidth = measure(setting, arguments.variants, arguments.rows)
    if arguments.json:
        rows = [asdict(r) for r in results]
        print(json.dumps({"setting": asdict(setting), "bandwidth": bandwidth, "results": rows}))
    else:
        print_table(results, bandwidth)


if __name__ == "__main__":
    main()
