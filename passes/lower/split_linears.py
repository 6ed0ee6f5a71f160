"""Linear layers over split weights become one layer per part."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qcompile.formats.base import StoredWeight
from qcompile.formats.split import PLACES, SplitFormat, index_dtype, side_by_side
from qcompile.formats.stored import stored_weight
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.weights import TensorSpec
from qcompile.passes.infra import Context, Equivalent, Pass, PassResult

aten = torch.ops.aten


class SplitLinears(Pass):
    """Multiplies each part of a split weight with the inputs that it is for.

    Before::

        %w = index_select(cat([dequantize(W0), _to_copy(W1)], -1), -1, @places)
        linear(%x, %w, %b)

    After::

        %0 = linear(index_select(%x, -1, @columns0), dequantize(W0), %b)
        %1 = add(linear(index_select(%x, -1, @columns1), _to_copy(W1)), %0)

    Where the input is itself put together from parts by the same places (`regroup_input`), each
    layer reads its part. The weight as a whole is never made.
    """

    numerics = Equivalent()

    def run(self, program: Program, context: Context) -> PassResult:
        """Rewrites every linear layer over a split weight."""
        del context
        result = PassResult()
        editor = Editor(program)
        for linear in program.calls(aten.linear.default):
            weight = side_by_side(linear.args[1])
            if weight is not None and stored_weight(linear.args[1]) is not None:
                _split(editor, linear, weight[0])
                result.rewrites += 1
        if result.rewrites:
            program.graph.eliminate_dead_code()
        return result


def regroup_input(editor: Editor, linear: fx.Node) -> list[fx.Node]:
    """The input of a layer over a split weight, part by part.

    Before::

        linear(%x, %w)

    After, with the places of the weight::

        %0, %1 = index_select(%x, -1, @columns0), index_select(%x, -1, @columns1)
        linear(index_select(cat([%0, %1], -1), -1, @places), %w)

    Args:
        editor: Of the program.
        linear: The layer; its input is replaced unless it is regrouped already.

    Returns:
        For each part of the weight, the node with its inputs. What replaces one of them in the
        `cat` changes what that part reads alone.
    """
    source = linear.args[0]
    weight = stored_weight(linear.args[1])
    assert isinstance(source, fx.Node)
    assert weight is not None
    places = weight.tensors[PLACES]
    regrouped = side_by_side(source)
    if regrouped is not None and regrouped[1].target == places.target:
        return regrouped[0]
    with editor.before(linear):
        parts = [
            editor.call(aten.index_select.default, source, -1, _index(editor, name))
            for name in _columns(editor.program, weight)
        ]
        joined = editor.call(aten.cat.default, list(parts), -1)
        again = editor.weight(str(places.target))
        linear.update_arg(0, editor.call(aten.index_select.default, joined, -1, again))
    return parts


def _split(editor: Editor, linear: fx.Node, weights: list[fx.Node]) -> None:
    inputs = regroup_input(editor, linear)
    bias = linear.args[2] if len(linear.args) > 2 else None
    with editor.before(linear):
        total = editor.call(aten.linear.default, inputs[0], weights[0], bias)
        for value, weight in zip(inputs[1:], weights[1:], strict=True):
            part = editor.call(aten.linear.default, value, weight)
            total = editor.call(aten.add.Tensor, part, total)
    editor.replace(linear, total)


def _columns(program: Program, weight: StoredWeight) -> list[str]:
    """Names of the columns of each part, made from the weight's places."""
    assert isinstance(weight.format, SplitFormat)
    width = weight.shape[-1]
    dtype = index_dtype(width)
    source = str(weight.tensors[PLACES].target)
    names = []
    start = 0
    for index, size in enumerate(weight.format.widths(width)):

        def choose(places: Tensor, start: int = start, size: int = size) -> Tensor:
            return torch.argsort(places)[start : start + size].to(dtype)

        names.append(f"{weight.name}.part{index}.columns")
        spec = TensorSpec((size,), dtype)
        program.weights.derive(names[-1], (source,), choose, spec, exact=True, label="columns")
        start += size
    return names


def _index(editor: Editor, name: str) -> fx.Node:
    """Columns as operators read them: run times widen a constant when they load the model."""
    node = editor.weight(name)
    if node.meta["val"].dtype == torch.int32:
        return node
    return editor.call(aten._to_copy.default, node, dtype=torch.int32)
