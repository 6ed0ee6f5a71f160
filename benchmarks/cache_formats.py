"""What few bits for keys and values cost in accuracy, with float weights.

python benchmarks/cache_formats.py --text valid.txt
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from scoring import KeptLogits, scoring_parser, smollm2

import qcompile as qc
from qcompile.compiler import tokenizer_of
from qcompile.evaluation.evaluate import evaluate
from qcompile.evaluation.models import as_logits_model
from qcompile.passes.infra import Context, PassManager
from qcompile.pipeline import recipe_phases
from qcompile.recipe import load_recipe
from qcompile.tables import Table, print_tables

_ROTATED = {"rotate": {"residual": "none", "online": ["query_key"]}}

ROWS = {
    "bf16": [{"quantize_cache": {"format": "bf16"}}],
    "int8": [{"quantize_cache": {"format": "int8"}}],
    "int8 keys, int4 values": [{"quantize_cache": {"keys": "int8", "values": "int4"}}],
    "int4, queries, keys and values rotated": [_ROTATED, {"quantize_cache": {"format": "int4"}}],
    "int4, groups of 32": [{"quantize_cache": {"format": "int4", "group_size": 32}}],
    "int4 keys, int8 values": [{"quantize_cache": {"keys": "int4", "values": "int8"}}],
    "int4": [{"quantize_cache": {"format": "int4"}}],
}
"""The steps of each row's recipe."""


def main() -> None:
    """Scores every row and prints the table."""
    parser = scoring_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens to score, from the start")
    options = parser.parse_args()
    program = qc.capture(options.model or smollm2(), dequantize=True)
    lines = []
    with TemporaryDirectory() as folder:
        reference = KeptLogits(as_logits_model(program), Path(folder))
        for name, steps in ROWS.items():
            recipe = load_recipe({"name": "caches", "steps": steps})
            changed = PassManager(recipe_phases(recipe)).run(program, Context())[0]
            found = evaluate(
                changed,
                options.text,
                reference=reference,
                tokenizer=tokenizer_of(program),
                max_tokens=options.tokens,
            )
            lines.append((name, f"{found.perplexity:.2f}", f"{found.kl:.4f}"))
    title = f"caches; the float model has {found.reference_perplexity:.2f}"
    print_tables([Table(title, ("format", "perplexity", "KL"), tuple(lines), frozenset({1, 2}))])


if __name__ == "__main__":
    main()
