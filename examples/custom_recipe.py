"""A recipe of one's own: written in YAML, changed in Python, and read back from the report.

Run it with ``python examples/custom_recipe.py MODEL [OUTPUT]``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import qcompile as qc

RECIPE = """\
name: careful-4-bit
description: 4-bit weights, more for what is sensitive, none for the output
steps:
  - quantize_weights:
      format: int4-g32-asym       # 4 bits in groups of 32, with zero points
      embedding: int8             # 8 bits, one scale per row
      ignore: ["lm_head"]         # stays float
      overrides:                  # by name; the last match wins
        - {match: "*.down_proj", format: int8-g64}
        - {match: "model.layers.0.*", format: int8-g64}
  - quantize_activations: {format: int8, granularity: token}
"""


def main() -> None:
    """Compiles a model twice: with the recipe as it is written, and with a change to it."""
    model = sys.argv[1]
    output = Path(sys.argv[2] if len(sys.argv) > 2 else "out/custom-recipe")

    # As a file. `qcompile compile MODEL --recipe careful.yaml` does the same.
    output.mkdir(parents=True, exist_ok=True)
    file = output / "careful.yaml"
    file.write_text(RECIPE)
    artifact = qc.compile(model, recipe=file, output=output / "careful", overwrite=True)
    print(f"{artifact.manifest.recipe['name']}: {bits_per_weight(artifact):.2f} bits per weight")

    # The report tells what became of every weight.
    for tensor in artifact.report["tensors"]:
        if tensor["quantized"]:
            print(f"  {tensor['name']:<48} {tensor['format']:<14} {tensor['bits_per_weight']:.2f}")

    # In Python a recipe is a value. Options are set on top of it by name, as with --set.
    changes = {"quantize_weights.format": "int3-g32-asym", "quantize_weights.scale_search": "mse"}
    smaller = qc.load_recipe(file, changes)
    artifact = qc.compile(model, recipe=smaller, output=output / "smaller", overwrite=True)
    print(f"with 3 bits in most layers: {bits_per_weight(artifact):.2f} bits per weight")


def bits_per_weight(artifact: qc.Artifact) -> float:
    """Bits that are stored for each weight of the model, with scales and zero points."""
    return float(str(artifact.manifest.bits["stored_bits_per_weight"]))


if __name__ == "__main__":
    try:
        main()
    except qc.QCompileError as error:
        sys.exit(f"error: {error}")
