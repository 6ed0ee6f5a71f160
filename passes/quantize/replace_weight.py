"""Stored codes take the place of a float weight."""

from __future__ import annotations

from torch import fx

from qcompile.formats import QuantizedWeight
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.passes.quantize.layers import LayerWeight


def replace_weight(program: Program, weight: LayerWeight, quantized: QuantizedWeight) -> fx.Node:
    """Stores a quantized weight as ``<name>.<tensor>`` and lets all users of the float one use it.

    Args:
        program: The program to edit.
        weight: The float weight.
        quantized: What stands for it; its format writes the nodes that decode it.

    Returns:
        The one node whose value is the decoded weight.
    """
    for part, tensor in quantized.tensors.items():
        program.weights.put(f"{weight.name}.{part}", tensor)
    editor = Editor(program)
    first, *others = weight.references
    with editor.before(first):
        tensors = {part: editor.weight(f"{weight.name}.{part}") for part in quantized.tensors}
        value = quantized.format.emit(editor, tensors)
    for reference in (first, *others):
        editor.replace(reference, value)
    return value
