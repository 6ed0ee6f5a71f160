"""What equivalent transforms are worth: perplexity of a small model at low bits, with and without.

Rows are methods, columns precisions; `transform_rows.py` says what they are. The embedding and the
projection to the vocabulary stay float. The last column takes a model with artificial outliers:
some gains of norms times 64, what reads them over 64, the same function; it must come back to
within 2 % of the clean model. The model is scored on the first tokens of the text and calibrated
on those behind them. Finished cells are kept in a file, so that a run that was ended goes on where
it stood.

    python benchmarks/transforms.py --text valid.txt
    python benchmarks/transforms.py --text valid.txt --tokens 4096 --methods none smoothquant quarot
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accuracy_results import Measured, Results, digest
from scoring import KeptLogits, scoring_parser, smollm2
from transform_rows import METHODS, OUTLIERS, PRECISIONS, Step, precision_of

import qcompile as qc
from qcompile.analysis.families import Family, PortRole
from qcompile.analysis.sites import find_sites
from qcompile.calibration.data import load_text, windows
from qcompile.calibration.samples import TokenWindows
from qcompile.calibration.settings import Calibration
from qcompile.compiler import tokenizer_of
from qcompile.evaluation.evaluate import evaluate
from qcompile.evaluation.models import as_logits_model, tokenize
from qcompile.ir.program import Program
from qcompile.passes.infra import Context, PassManager
from qcompile.passes.quantize.bits import count_bits
from qcompile.passes.transform.absorb import absorb
from qcompile.passes.transform.values import Diagonal
from qcompile.pipeline import recipe_phases
from qcompile.recipe import load_recipe
from qcompile.report import peak_memory_bytes
from qcompile.tables import Table, print_tables

OUTLIER_FACTOR = 64.0
OUTLIER_CHANNELS = 8


@dataclass(frozen=True)
class Spent:
    """Time, by the clock and on the processor.

    Attributes:
        seconds: Wall clock.
        cpu_seconds: Of this process.
    """

    seconds: float
    cpu_seconds: float

    @staticmethod
    def now() -> Spent:
        """Since some moment that is always the same."""
        return Spent(time.perf_counter(), time.process_time())

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds)

    def __sub__(self, other: Spent) -> Spent:
        return Spent(self.seconds - other.seconds, self.cpu_seconds - other.cpu_seconds)


class Bench:
    """A model, a text in two parts, and the figures that are known already.

    Args:
        options: Of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        text = options.text.read_bytes()
        identity: dict[str, str | int] = {
            "model": Path(options.model).name,
            "text": f"{options.text.name} (sha256 {hashlib.sha256(text).hexdigest()[:16]})",
            "tokens": options.tokens,
            "window": options.window,
            "samples": options.samples,
        }
        self.results = Results(options.output, identity)
        self._options = options
        self._clean = qc.capture(options.model, dequantize=True)
        self._spoiled = with_artificial_outliers(self._clean)
        self._tokenizer = tokenizer_of(self._clean)
        ids = tokenize(self._tokenizer, load_text(options.text))
        behind = windows(ids[options.tokens :], options.window, options.samples * options.window)
        self._calibration = Calibration(TokenWindows(behind, "what stands behind the scored text"))
        kept = options.output.with_name(f"{options.output.stem}-logits-{digest(identity)}")
        self._reference = KeptLogits(as_logits_model(self._clean), kept)

    def measure(self, method: str, columns: Iterable[str]) -> None:
        """Adds the cells of a row that are missing; what columns share is done once."""
        transformed: dict[str, tuple[Program, Spent]] = {}
        row = METHODS[method]
        for column in columns:
            precision = precision_of(column)
            transforms, rounding = row.transforms(precision), row.quantization(precision)
            made_by = digest([*transforms, *rounding])
            if self.results.find(method, column, made_by) is not None:
                continue
            program = self._spoiled if column == OUTLIERS else self._clean
            key = digest([program is self._clean, *transforms])
            if key not in transformed:
                transformed[key] = self._run(program, transforms)
            before, spent = transformed[key]
            quantized, more = self._run(before, rounding)
            self.results.add(self._score(quantized, method, column, made_by, spent + more))

    def _run(self, program: Program, steps: Sequence[Step]) -> tuple[Program, Spent]:
        """A program behind some steps, and the time that they took."""
        started = Spent.now()
        recipe = load_recipe({"name": "transforms", "steps": list(steps)})
        context = Context(calibration=self._calibration)
        after, _ = PassManager(recipe_phases(recipe)).run(program, context)
        return after, Spent.now() - started

    def _score(
        self, quantized: Program, method: str, column: str, made_by: str, spent: Spent
    ) -> Measured:
        found = evaluate(
            quantized,
            self._options.text,
            reference=self._reference,
            tokenizer=self._tokenizer,
            window=self._options.window,
            max_tokens=self._options.tokens,
        )
        precision = precision_of(column)
        measured = Measured(
            method,
            column,
            f"{precision.weights}, {precision.activations} ({precision.meaning})",
            count_bits(quantized).quantized,
            found.perplexity,
            found.kl or 0.0,
            found.top1_agreement or 0.0,
            found.reference_perplexity or 0.0,
            spent.seconds / 60,
            spent.cpu_seconds / 60,
            peak_memory_bytes() / 2**30,
            made_by,
        )
        print(
            method,
            column,
            cell(measured),
            f"{spent.cpu_seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        return measured


def with_artificial_outliers(program: Program) -> Program:
    """The same function, with a few channels of every norm's output 64 times as large."""
    changed = program.copy()
    generator = torch.Generator().manual_seed(0)
    for site in find_sites(changed):
        is_norm = any(p.role is PortRole.SOURCE and "norm" in p.weight for p in site.ports)
        if Family.DIAGONAL in site.families and is_norm and len(site.blocks) == 1:
            scale = torch.ones(site.size, dtype=torch.float64)
            chosen = torch.randperm(site.size, generator=generator)[:OUTLIER_CHANNELS]
            scale[chosen] = OUTLIER_FACTOR
            absorb(changed, site, [Diagonal(scale)])
    return changed


def table(rows: Sequence[Measured]) -> Table:
    """Perplexity and, behind it, divergence, by method and precision."""
    found = {(row.method, row.setting): row for row in rows}
    columns = [name for name in COLUMNS if any(row.setting == name for row in rows)]
    lines = [
        (method, *(cell(found.get((method, column))) for column in columns))
        for method in METHODS
        if any(row.method == method for row in rows)
    ]
    float_perplexity = f"{rows[0].float_perplexity:.2f}" if rows else "?"
    title = f"perplexity (KL); the float model has {float_perplexity}"
    aligned = frozenset(range(1, len(columns) + 1))
    return Table(title, ("method", *columns), tuple(lines), aligned)


def cell(row: Measured | None) -> str:
    """Perplexity and divergence, or nothing."""
    return "" if row is None else f"{row.perplexity:.2f} ({row.kl:.3f})"


COLUMNS = (*PRECISIONS, OUTLIERS)


def main() -> None:
    """Measures the cells that were asked for and prints the table."""
    parser = scoring_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=16384, help="tokens to score, from the start")
    parser.add_argument("--window", type=int, default=512, help="tokens per window")
    parser.add_argument("--samples", type=int, default=16, help="windows to calibrate on")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS))
    parser.add_argument("--output", type=Path, default=Path("transforms.json"), help="results")
    options = parser.parse_args()
    options.model = options.model or smollm2()
    bench = Bench(options)
    for method in options.methods:
        bench.measure(method, options.columns)
    print_tables([table(bench.results.rows())])


if __name__ == "__main__":
    main()
