"""What a compilation takes and gives, foretold from shapes.

The size is exact where the target can lay out its files without numbers. Memory and time are
estimates for a compilation with all checks: a handful of rates measured on one machine (two cores
of a 2024 server CPU, local disk), good to a factor of two on a machine like it. They tell
"seconds" from "an hour" and "fits" from "does not", before anything is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qcompile.analysis.stages import stages
from qcompile.ir.program import Program
from qcompile.ir.weights import sources
from qcompile.passes.quantize.bits import BitsReport
from qcompile.recipe import QuantizeWeights, Recipe


@dataclass(frozen=True)
class Rates:
    """How fast a machine compiles, and what it needs for it at least.

    Attributes:
        seconds_per_node: Capturing, raising and lowering, for each node of the raised graph.
        read_bytes_per_second: Reading and widening a checkpoint's tensors.
        absmax_weights_per_second: Rounding to nearest with scales from the extremes.
        mse_weights_per_second: Rounding to nearest with searched scales.
        write_bytes_per_second: Packing and writing the artifact.
        base_bytes: The process with all libraries loaded.
        bytes_per_node: The trace and the graph.
        transient_weights: How many float32 copies of the largest weight exist at one time.
        check_seconds_per_node: Proving rewrites on small inputs.
        check_weights_per_second: Running the weights in float64, over all checked phases.
        check_stages: How many stages' weights exist in float64 while whole programs are compared.
    """

    seconds_per_node: float = 0.012
    read_bytes_per_second: float = 400e6
    absmax_weights_per_second: float = 20e6
    mse_weights_per_second: float = 6e6
    write_bytes_per_second: float = 300e6
    base_bytes: int = 450_000_000
    bytes_per_node: int = 120_000
    transient_weights: float = 1.5
    check_seconds_per_node: float = 0.015
    check_weights_per_second: float = 10e6
    check_stages: int = 2


@dataclass(frozen=True)
class Estimate:
    """What a compilation takes and gives.

    Attributes:
        files: Bytes of the artifact's files, by name, without manifest and report.
        exact: Whether these are exact; else they are the bits of the weights.
        seconds: Time by part of the work: an estimate.
        peak_memory_bytes: The most memory that the process needs: an estimate. Pages of the
            mapped checkpoint, which the system takes back when it is short, do not count.
    """

    files: Mapping[str, int]
    exact: bool
    seconds: Mapping[str, float]
    peak_memory_bytes: int

    @property
    def artifact_bytes(self) -> int:
        """Size of the artifact."""
        return sum(self.files.values())

    @property
    def total_seconds(self) -> float:
        """Time of the whole compilation."""
        return sum(self.seconds.values())

    def to_dict(self) -> dict[str, Any]:
        """A JSON document."""
        return {
            "artifact_bytes": self.artifact_bytes,
            "artifact_bytes_exact": self.exact,
            "files": dict(self.files),
            "peak_memory_bytes": self.peak_memory_bytes,
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
            "total_seconds": round(self.total_seconds, 2),
        }


def estimate(
    program: Program,
    planned: Program,
    recipe: Recipe,
    *,
    bits: BitsReport,
    files: Mapping[str, int] | None,
    rates: Rates | None = None,
) -> Estimate:
    """Foretells a compilation.

    Args:
        program: The captured program.
        planned: What the recipe makes of it, without numbers.
        recipe: The recipe.
        bits: The accounting of `planned`.
        files: What the target foretells of its files, or None.
        rates: Those of the machine.
    """
    rates = rates or Rates()
    weights = {"weights": bits.bytes} if files is None else dict(files)
    assets = {name: len(content) for name, content in program.provenance.assets.items()}
    written = sum(weights.values())
    return Estimate(
        {**weights, **assets},
        files is not None,
        _seconds(program, recipe, bits, written, rates),
        _peak_memory(program, planned, rates),
    )


def _seconds(
    program: Program, recipe: Recipe, bits: BitsReport, written: int, rates: Rates
) -> dict[str, float]:
    searched = any(
        isinstance(step.options, QuantizeWeights) and step.options.scale_search == "mse"
        for step in recipe.steps
    )
    rounding = rates.mse_weights_per_second if searched else rates.absmax_weights_per_second
    quantized = sum(tensor.weights for tensor in bits.tensors if tensor.quantized)
    weights = sum(tensor.weights for tensor in bits.tensors)
    nodes = len(program.graph.nodes)
    return {
        "graph": nodes * rates.seconds_per_node,
        "check": nodes * rates.check_seconds_per_node + weights / rates.check_weights_per_second,
        "read": program.provenance.stored_bytes / rates.read_bytes_per_second,
        "quantize": quantized / rounding,
        "write": written / rates.write_bytes_per_second,
    }


def _peak_memory(program: Program, planned: Program, rates: Rates) -> int:
    """The codes of all weights are kept, one byte each; floats are read weight by weight, or, for
    checks, stage by stage.
    """
    store = planned.weights
    kept = sum(store.spec(name).bytes for name in store if not any(sources(store.expression(name))))
    elements = {name: program.weights.spec(name).elements for name in program.weights}
    by_stage = [sum(elements[name] for name in stage.weights) for stage in stages(program)]
    rounding = 4 * rates.transient_weights * max(elements.values(), default=0)
    checking = 8 * rates.check_stages * max(by_stage, default=0)
    graph = len(program.graph.nodes) * rates.bytes_per_node
    return int(rates.base_bytes + graph + kept + max(rounding, checking))
