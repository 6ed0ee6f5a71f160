"""The shape of an 8 B Llama on meta: captured, raised, verified, analysed, inspected and checked.

No weight exists anywhere, so nothing may read one. Prints the seconds of each step and how much
memory the process gained after its imports:

    python benchmarks/capture_8b.py [--layers 32] [--recipe w4a8-rtn]
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import transformers
from torch import Tensor

import qcompile.backends.cpu.target
import qcompile.inspection  # noqa: F401  (its imports are no growth)
from qcompile.analysis.sites import find_sites
from qcompile.frontends.huggingface import build_shell, capture_shell
from qcompile.inspection import inspect
from qcompile.inspection_records import Inspection
from qcompile.inspection_tables import inspection_tables, preflight_tables
from qcompile.ir.program import Program
from qcompile.ir.weights import TensorSpec
from qcompile.legality import preflight
from qcompile.passes.infra import PassManager
from qcompile.pipeline import front_phases
from qcompile.tables import print_tables

SECONDS = 60.0
GROWTH_BYTES = 1e9

Result = TypeVar("Result")


class SpecsOnly:
    """A checkpoint that has names and shapes, and no numbers."""

    identity = "specs only"

    def __init__(self, specs: Mapping[str, TensorSpec]) -> None:
        self._specs = specs

    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    def read(self, name: str) -> Tensor:
        raise AssertionError(f"'{name}' was read")

    def fingerprint(self) -> str:
        return ""


def capture_8b(layers: int) -> Program:
    """Llama 3 8 B's shape as captured, before any pass."""
    config = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        tie_word_embeddings=False,
    )
    shell = build_shell(config, transformers.LlamaForCausalLM)
    state = shell.model.state_dict(keep_vars=True)
    specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in state.items()}
    return capture_shell(shell, SpecsOnly(specs), name=f"llama-8b-{layers}-layers", assets={})


def timed(name: str, work: Callable[[], Result]) -> tuple[Result, float]:
    started, busy = time.perf_counter(), time.process_time()
    result = work()
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    memory = peak_bytes() / 1e9
    print(f"{name:10} {seconds:6.1f} s   (CPU {busy:6.1f} s)   peak {memory:.2f} GB", flush=True)
    return result, seconds


def peak_bytes() -> int:
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--recipe", default="w4a8-rtn")
    options = parser.parse_args()
    before = peak_bytes()
    captured, seconds = timed("capture", lambda: capture_8b(options.layers))
    raised, spent = timed("raise", lambda: PassManager(front_phases()).run(captured)[0])
    seconds += spent
    seconds += timed("verify", lambda: raised.verify(shapes=True))[1]
    sites, spent = timed("sites", lambda: find_sites(raised))
    seconds += spent
    print(f"{len(sites)} sites")
    verdict, spent = timed("check", lambda: preflight(raised, options.recipe))
    seconds += spent
    inspection, spent = timed("inspect", lambda: inspect(captured, options.recipe))
    seconds += spent
    growth = peak_bytes() - before
    assert isinstance(inspection, Inspection)
    print_tables(inspection_tables(inspection, ("summary", "stages", "barriers")))
    print_tables(preflight_tables(verdict))
    print(f"\n{seconds:.1f} s of {SECONDS:.0f}, {growth / 1e9:.2f} GB of {GROWTH_BYTES / 1e9:.0f}")
    return 0 if seconds <= SECONDS and growth <= GROWTH_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
