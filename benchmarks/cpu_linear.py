"""Times a quantized linear layer on the CPU kernels beside the operators of other engines.

Every variant is a chain of equal layers with different weights, more of them than the caches
hold, so that a single row streams its weights from memory. Variants take turns, round by round,
next to probes of the memory's bandwidth and of the rate of byte products: compare figures of one
run only.

    python benchmarks/cpu_linear.py --n 4096 --k 4096 --rows 1 4 16 128 --threads 2
    python benchmarks/cpu_linear.py --rows 1 16 512 --roofline roofline.svg
    python benchmarks/cpu_linear.py --peer-python PEERS/bin/python

OpenVINO runs in a process of its own, of an interpreter that has it: this one, or `--peer-python`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import numpy as np
import onnx
from line_process import LineProcess
from linear_layers import VARIANTS, Shape, chain, onnxruntime
from probes import Probes
from roofline import Point, roofline

GIGA = 1e9


@dataclass(frozen=True)
class Setting:
    n: int
    k: int
    threads: int
    rounds: int
    working_set: int  # bytes of weights that one pass streams, at least
    cpu_time: bool = False  # instead of wall-clock time
    peer_python: str = sys.executable


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


@dataclass(frozen=True)
class Limits:
    """What the probes found between the rounds, one figure each."""

    bandwidth: list[float]  # bytes per second
    byte_products: list[float]  # operations per second; 0 without AVX-512 VNNI


class Chain(Protocol):
    """Equal layers, one after the other."""

    weight_bytes: int  # of a layer

    def seconds_per_layer(self, x: np.ndarray) -> float: ...


class OnnxRuntimeChain:
    def __init__(self, name: str, setting: Setting) -> None:
        shape = Shape(setting.n, setting.k)
        model, self.layers, self.weight_bytes = chain(name, shape, setting.working_set)
        self._run = onnxruntime(model, setting.threads)
        # CPU time is what one thread would take if nobody else ran.
        self._clock = time.process_time if setting.cpu_time else time.perf_counter

    def seconds_per_layer(self, x: np.ndarray) -> float:
        start = self._clock()
        self._run(x)
        return (self._clock() - start) / self.layers


class OpenVinoChain:
    def __init__(self, name: str, setting: Setting) -> None:
        shape = Shape(setting.n, setting.k)
        model, self.layers, self.weight_bytes = chain(name, shape, setting.working_set)
        self._clock = "cpu" if setting.cpu_time else "wall"
        with TemporaryDirectory() as folder:
            path = Path(folder) / "chain.onnx"
            onnx.save(model, path)
            program = str(Path(__file__).with_name("openvino_chain.py"))
            command = [setting.peer_python, program, str(path), "--columns", str(setting.k)]
            command += ["--threads", str(setting.threads), "--group", str(VARIANTS[name].group)]
            self._process = LineProcess(command)

    def seconds_per_layer(self, x: np.ndarray) -> float:
        seconds = json.loads(self._process.ask(str(len(x))))
        return float(seconds[self._clock]) / self.layers


ENGINES: dict[str, Callable[[str, Setting], Chain]] = {
    "onnxruntime": OnnxRuntimeChain,
    "openvino": OpenVinoChain,
}


def runnable_variants(peer_python: str) -> list[str]:
    """All variants but those of an engine that is not there."""
    query = [peer_python, "-c", "import openvino"]
    found = subprocess.run(query, capture_output=True, check=False).returncode == 0
    return [name for name, variant in VARIANTS.items() if found or variant.engine != "openvino"]


def measure(setting: Setting, names: list[str], all_rows: list[int]) -> tuple[list[Result], Limits]:
    chains: dict[str, Chain] = {
        name: ENGINES[VARIANTS[name].engine](name, setting) for name in names
    }
    probes = Probes(setting.threads)
    limits = Limits([], [])
    results = []
    for rows in all_rows:
        x = np.random.default_rng(0).standard_normal((rows, setting.k)).astype(np.float32)
        times: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(setting.rounds + 1):
            limits.bandwidth.append(probes.bandwidth())
            limits.byte_products.append(probes.byte_products())
            first = turn % len(names)  # so that no variant always follows the same other
            for name in names[first:] + names[:first]:
                seconds = chains[name].seconds_per_layer(x)
                if turn > 0:  # the first turn warms up
                    times[name].append(seconds)
        for name in names:
            weight_bytes = chains[name].weight_bytes
            results.append(summarize(setting, name, rows, times[name], weight_bytes))
    return results, limits


def summarize(
    setting: Setting, name: str, rows: int, times: list[float], weight_bytes: int
) -> Result:
    median = statistics.median(times)
    return Result(
        variant=name,
        rows=rows,
        microseconds=round(median * 1e6, 1),
        least=round(min(times) * 1e6, 1),
        most=round(max(times) * 1e6, 1),
        weight_bytes=weight_bytes,
        gigabytes_per_second=round(weight_bytes / median / GIGA, 2),
        gigaflops=round(2 * rows * setting.n * setting.k / median / GIGA, 1),
    )


def print_table(results: list[Result], limits: Limits) -> None:
    for what, unit, figures in (
        ("memory", "GB/s", limits.bandwidth),
        ("byte products", "Gop/s", limits.byte_products),
    ):
        low, middle, high = (f(figures) / GIGA for f in (min, statistics.median, max))
        print(f"{what}: {middle:.1f} {unit} ({low:.1f}-{high:.1f})")
    bandwidth = statistics.median(limits.bandwidth) / GIGA
    peak = statistics.median(limits.byte_products) / GIGA
    header = f"{'variant':28} {'rows':>5} {'us':>9} {'range':>17} {'GB/s':>7} {'':>5}"
    print(f"{header} {'Gop/s':>8}")
    for r in results:
        spread = f"{r.least:.0f}-{r.most:.0f}"
        read = f"{r.gigabytes_per_second:7.2f} {r.gigabytes_per_second / bandwidth:5.0%}"
        share = f" {r.gigaflops / peak:5.0%}" if peak > 0 else ""
        print(
            f"{r.variant:28} {r.rows:5} {r.microseconds:9.1f} {spread:>17} {read} "
            f"{r.gigaflops:8.1f}{share}"
        )


def picture(results: list[Result], limits: Limits) -> str:
    points = [
        Point(r.variant, r.gigaflops / r.gigabytes_per_second, r.gigaflops * GIGA) for r in results
    ]
    bandwidth, peak = map(statistics.median, (limits.bandwidth, limits.byte_products))
    return roofline(points, bandwidth, peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=4096, help="output features")
    parser.add_argument("--k", type=int, default=4096, help="input features")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 128])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--megabytes", type=float, default=160, help="weights per chain")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), help="default: all")
    parser.add_argument("--peer-python", default=sys.executable, help="has openvino")
    parser.add_argument("--cpu-time", action="store_true", help="for a busy machine; one thread")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--roofline", type=Path, help="write an SVG picture")
    arguments = parser.parse_args()
    if arguments.cpu_time and arguments.threads != 1:
        parser.error("--cpu-time adds up over threads: it needs --threads 1")
    setting = Setting(
        arguments.n,
        arguments.k,
        arguments.threads,
        arguments.rounds,
        int(arguments.megabytes * 2**20),
        arguments.cpu_time,
        arguments.peer_python,
    )
    names = arguments.variants or runnable_variants(arguments.peer_python)
    results, limits = measure(setting, names, arguments.rows)
    if arguments.roofline is not None:
        arguments.roofline.write_text(picture(results, limits), encoding="utf-8")
    if arguments.json:
        rows = [asdict(r) for r in results]
        found = {"setting": asdict(setting), "limits": asdict(limits), "results": rows}
        print(json.dumps(found))
    else:
        print_table(results, limits)


if __name__ == "__main__":
    main()
