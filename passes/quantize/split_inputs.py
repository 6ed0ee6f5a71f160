"""Inputs of layers over split weights, part by part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompile.formats import Format, SplitFormat, StoredWeight, stored_weight
from qcompile.formats.dense import DenseFormat
from qcompile.formats.split import PLACES, index_dtype, side_by_side
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.weights import TensorSpec

aten = torch.ops.aten


@dataclass(frozen=True)
class Read:
    """A value that a layer multiplies with codes.

    Attributes:
        reader: The layer, or what puts the parts of its input together.
        value: What it reads.
        group_size: Of the codes.
        stem: What stored tensors that concern the value are named after.
    """

    reader: fx.Node
    value: fx.Node
    group_size: int
    stem: str


def coded_reads(program: Program, linear: fx.Node, weight: StoredWeight) -> Iterator[Read]:
    """What a layer multiplies with codes: its input, or where columns stay floats the others.

    Args:
        program: The input of a layer with such columns is regrouped in it; see `regroup_input`.
        linear: The layer.
        weight: Its weight.
    """
    format = weight.format
    stem = weight.name.removesuffix(".weight")
    if not isinstance(format, SplitFormat) or not any(map(_is_float, format.formats)):
        source = linear.args[0]
        assert isinstance(source, fx.Node)
        yield Read(linear, source, format.group_size, stem)
        return
    parts = regroup_input(Editor(program), linear)
    regrouped = linear.args[0]
    assert isinstance(regrouped, fx.Node)
    joined = regrouped.args[0]
    assert isinstance(joined, fx.Node)
    for index, (part, value) in enumerate(zip(format.formats, parts, strict=True)):
        if not _is_float(part):
            yield Read(joined, value, part.group_size, f"{stem}.part{index}")


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


def _is_float(format: Format) -> bool:
    return isinstance(format, DenseFormat)
