"""What methods and formats cost in accuracy, on a real model and a text.

The model is calibrated on the first half of the text and scored on the second, in windows that are
predicted independently, against its float self. Each row is compiled in a process of its own, so
that its peak memory is its own; `cpu min` bears the load of the machine better than `minutes`.
Finished rows are kept in a file: what was measured is not measured again, and a run that was ended
goes on where it stood. `accuracy_rows.py` says what the rows are; `peers.py` adds those of others.

    python benchmarks/accuracy.py --text valid.txt
    python benchmarks/accuracy.py --text valid.txt --only 'gptq*' --settings w4 w3-g64
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

from accuracy_results import Measured, Results, cells, digest, tables
from accuracy_rows import ROWS, SETTINGS
from scoring import Protocol, Scorer, smollm2

from qcompile.calibration.settings import Calibration
from qcompile.passes.infra import Context, PassManager
from qcompile.passes.quantize.bits import count_bits
from qcompile.pipeline import recipe_phases
from qcompile.recipe import load_recipe
from qcompile.report import peak_memory_bytes
from qcompile.tables import print_tables


def measure(protocol: Protocol, kept: Path, method: str, setting: str) -> Measured:
    """Quantizes and scores, in this process."""
    row = ROWS[method]
    scorer = Scorer(protocol, kept)
    context = Context(calibration=Calibration(scorer.calibration()))
    steps = row.recipe(setting)
    if protocol.blocks is not None:
        later = [name for name in scorer.program.weights if block_of(name) >= protocol.blocks]
        for step in steps["steps"]:
            if "quantize_weights" in step:
                step["quantize_weights"]["ignore"] = later
    recipe = load_recipe(steps)
    started, cpu = time.perf_counter(), time.process_time()
    quantized = PassManager(recipe_phases(recipe)).run(scorer.program, context)[0]
    minutes, cpu = (time.perf_counter() - started) / 60, (time.process_time() - cpu) / 60
    peak = peak_memory_bytes() / 2**30
    found = scorer.score(quantized)
    return Measured(
        method,
        setting,
        row.formats[setting],
        count_bits(quantized).quantized,
        found.perplexity,
        found.kl or 0.0,
        found.top1_agreement or 0.0,
        found.reference_perplexity or 0.0,
        minutes,
        cpu,
        peak,
        made_by(method, setting),
    )


def block_of(weight: str) -> int:
    """The decoder block that a weight belongs to: the first number in its name, or -1."""
    return next((int(part) for part in weight.split(".") if part.isdecimal()), -1)


def made_by(method: str, setting: str) -> str:
    """Hash of a row's recipe."""
    return digest(ROWS[method].recipe(setting))


def measure_apart(options: argparse.Namespace, method: str, setting: str) -> Measured:
    """Quantizes and scores in a process of its own."""
    command = [sys.executable, __file__, "--one", method, setting]
    for name in ("text", "model", "samples", "length", "windows", "kept"):
        command += [f"--{name}", str(getattr(options, name))]
    if options.blocks is not None:
        command += ["--blocks", str(options.blocks)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measures every row that was asked for and prints the table."""
    options = parse_arguments()
    protocol = protocol_of(options)
    if options.one:
        print(json.dumps(asdict(measure(protocol, options.kept, *options.one))))
        return
    results = Results(options.output, protocol.identity)
    for setting in options.settings:
        for method, row in ROWS.items():
            wanted = any(fnmatchcase(method, pattern) for pattern in options.only)
            if not wanted or setting not in row.formats:
                continue
            if results.find(method, setting, made_by(method, setting)) is None:
                results.add(measured := measure_apart(options, method, setting))
                print(setting, *cells(measured), file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps([asdict(row) for row in results.rows()], indent=1))
    else:
        print_tables(list(tables(results.rows(), dict(SETTINGS))))


def protocol_of(options: argparse.Namespace) -> Protocol:
    """What the arguments say is measured."""
    return Protocol(
        options.model,
        str(options.text),
        options.samples,
        options.length,
        options.windows,
        options.blocks,
    )


def add_protocol_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured, and where results stand."""
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text; halved")
    parser.add_argument("--model", help="default: SmolLM2-135M-Instruct from its wheel")
    parser.add_argument("--samples", type=int, default=128, help="windows to calibrate on")
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    parser.add_argument("--windows", type=int, default=16, help="windows to score")
    parser.add_argument("--blocks", type=int, help="quantize the first of them only; default: all")
    parser.add_argument("--output", type=Path, default=Path("accuracy.json"), help="results")
    parser.add_argument("--kept", type=Path, help="float logits; default: beside --output")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")


def fill_defaults(options: argparse.Namespace) -> argparse.Namespace:
    """The model, and a directory of float logits that no other protocol shares."""
    options.model = options.model or smollm2()
    if options.kept is None:
        name = f"{options.output.stem}-logits-{digest(protocol_of(options).identity)}"
        options.kept = options.output.with_name(name)
    return options


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_protocol_arguments(parser)
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns on rows")
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "SETTING"), help=argparse.SUPPRESS)
    return fill_defaults(parser.parse_args())


if __name__ == "__main__":
    main()
