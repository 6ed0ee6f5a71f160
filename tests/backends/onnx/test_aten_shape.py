"""Views, concatenation, slices, padding, indexing: what moves elements, against torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qcompile.frontends.torch_export import export, unlifted_graph
from qcompile.ir.program import Program
from qcompile.ir.types import Port, Signature
from qcompile.ir.weights import WeightStore

Inputs = Callable[[int], tuple[Tensor, ...]]


def cube(n: int) -> tuple[Tensor, ...]:
    return (torch.randn(n, 6, 4),)


def two_varying(n: int) -> tuple[Tensor, ...]:
    return (torch.randn(n, n + 3, 8),)


def matrix(n: int) -> tuple[Tensor, ...]:
    return torch.randn(n, 5), torch.randn(n + 2, 5)


def image(n: int) -> tuple[Tensor, ...]:
    return (torch.randn(n, 8, 6, 5),)


def with_index(n: int) -> tuple[Tensor, ...]:
    return torch.randn(n, 6, 4), torch.randint(-6, 6, (n,))


def with_two_indices(n: int) -> tuple[Tensor, ...]:
    return torch.randn(n, 6, 4), torch.randint(0, n, (n, 1)), torch.randint(0, 4, (1, 5))


def with_mask(n: int) -> tuple[Tensor, ...]:
    return torch.randn(n, 6, 4), (torch.arange(n * 6) % 3 == 1).reshape(n, 6)


def with_gather(n: int) -> tuple[Tensor, ...]:
    return torch.randn(n, 6), torch.randint(0, 6, (n, 3)), torch.randn(n, 3)


def with_rows(n: int) -> tuple[Tensor, ...]:
    return torch.randn(n, 3), torch.tensor([1, 0, 1]), torch.randn(3, 3)


def ids(n: int) -> tuple[Tensor, ...]:
    return (torch.randint(0, 5, (n, 3)),)


def flags(n: int) -> tuple[Tensor, ...]:
    return (torch.rand(n, n) > 0.3,)


CASES: dict[str, tuple[Callable[..., Any], Inputs]] = {
    "view_split_heads": (lambda x: x.view(x.shape[0], x.shape[1], 2, 4), two_varying),
    "view_merge": (lambda x: x.view(x.shape[0] * x.shape[1], 8), two_varying),
    "view_merge_after_transpose": (
        lambda x: x.transpose(1, 2).reshape(x.shape[0], -1),
        two_varying,
    ),
    "view_three_varying": (
        lambda x: x.permute(1, 2, 0).reshape(x.shape[1], 4, 2, x.shape[0]).flatten(2),
        two_varying,
    ),
    "view_to_product_and_sum": (
        lambda x: torch.cat((x, x), 1).reshape(x.shape[0] * 2, x.shape[1], 8),
        two_varying,
    ),
    "flatten": (lambda x: x.flatten(1), cube),
    "flatten_all": (torch.flatten, cube),
    "unflatten": (lambda x: x.unflatten(1, (2, 3)), cube),
    "transpose": (lambda x: x.transpose(-1, -2), cube),
    "permute": (lambda x: x.permute(2, 0, 1), cube),
    "t": (lambda x, y: x.t(), matrix),
    "movedim": (lambda x: x.movedim(0, 2), cube),
    "movedim_list": (lambda x: x.movedim((0, 1), (2, 0)), cube),
    "unsqueeze": (lambda x: x.unsqueeze(1).unsqueeze(-1), cube),
    "squeeze": (lambda x: x[:, :1].squeeze(1), cube),
    "squeeze_all": (lambda x: x[:, :1].squeeze(), cube),
    "expand": (lambda x: x[:, :, None].expand(-1, -1, 3, -1), cube),
    "expand_varying": (lambda x: x[:1].expand(x.shape[0] * 2, -1, -1), cube),
    "expand_new_axis": (lambda x: x.expand(2, *x.shape), cube),
    "expand_as": (lambda x: x[:1].expand_as(x), cube),
    "repeat": (lambda x: x.repeat(1, 2, 1), cube),
    "repeat_new_axis": (lambda x: x.repeat(2, 1, 1, 3), cube),
    "repeat_interleave": (lambda x: x.repeat_interleave(3, dim=1), cube),
    "tile": (lambda x: x.tile(2), cube),
    "broadcast_tensors": (lambda x: torch.broadcast_tensors(x, x[:1, :, :1]), cube),
    "meshgrid": (
        lambda x: torch.meshgrid(x[:, 0, 0], x[0, :, 0], indexing="ij"),
        cube,
    ),
    "meshgrid_xy": (
        lambda x: torch.meshgrid(x[:, 0, 0], x[0, :, 0], indexing="xy"),
        cube,
    ),
    "cat": (lambda x, y: torch.cat((x, y), 0), matrix),
    "cat_types": (lambda x, y: torch.cat((x, y.int()), 0), matrix),
    "cat_empty": (lambda x: torch.cat((torch.zeros(0), x), 1), cube),
    "stack": (lambda x: torch.stack((x, x + 1), 1), cube),
    "split": (lambda x: x.split(4, 1), cube),
    "split_sizes": (lambda x: x.split([1, 3, 2], 1), cube),
    "split_varying": (
        lambda x: x.split([1, x.shape[0] - 1], 0),
        cube,
    ),
    "chunk": (lambda x: x.chunk(4, 1), cube),
    "unbind": (lambda x: x[:, :2].unbind(1), cube),
    "slice": (lambda x: x[1:, :-2, ::2], cube),
    "slice_varying_end": (lambda x: x[: x.shape[0] - 1], cube),
    "slice_from_end": (lambda x: x[:, -3:-1], cube),
    "select": (lambda x: x[:, 2], cube),
    "select_last": (lambda x: x[:, -1], cube),
    "select_varying": (lambda x: x[x.shape[0] - 1], cube),
    "narrow": (lambda x: x.narrow(1, 2, 3), cube),
    "roll": (lambda x: x.roll(1, 0), cube),
    "roll_axes": (lambda x: x.roll((-2, 7), (1, 2)), cube),
    "roll_flat": (lambda x: x.roll(5), cube),
    "flip": (lambda x: x.flip(0, 2), cube),
    "pad": (lambda x: F.pad(x, (1, 2)), cube),
    "pad_value": (lambda x: F.pad(x, (0, 0, 1, 1), value=-2.0), cube),
    "pad_negative": (lambda x: F.pad(x, (-1, 2)), cube),
    "pad_bool": (lambda x: F.pad(x, (1, 0), value=True), flags),
    "pad_reflect": (lambda x: F.pad(x, (1, 2), mode="reflect"), cube),
    "pad_replicate": (lambda x: F.pad(x, (1, 2), mode="replicate"), cube),
    "pad_circular": (lambda x: F.pad(x, (1, 2), mode="circular"), cube),
    "tril": (torch.tril, cube),
    "triu": (lambda x: x.triu(1), cube),
    "tril_bool": (lambda x: x.tril(), flags),
    "triu_int": (lambda x: x.int().triu(-1), cube),
    "unfold": (lambda x: x.unfold(1, 3, 2), cube),
    "unfold_varying": (lambda x: x.unfold(0, 2, 1), cube),
    "diagonal": (lambda x: x.diagonal(1, 1, 2), cube),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), image),
    "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x[:, :, :, :4], 2), image),
    "index_select": (lambda x, i: x.index_select(1, i % 6), with_index),
    "index_first": (lambda x, i: x[i % x.shape[0]], with_index),
    "index_middle": (lambda x, i: x[:, i], with_index),
    "index_with_none": (lambda x, i: x[None, :, i], with_index),
    "index_two_apart": (lambda x, i, j: x[i, :, j], with_two_indices),
    "index_two_together": (lambda x, i, j: x[:, j % 6, j], with_two_indices),
    "index_first_two": (lambda x, i, j: x[i, j], with_two_indices),
    "index_last": (lambda x, i, j: x[..., j], with_two_indices),
    "index_mask_put_scalar": (
        lambda x, m: torch.where(m[..., None], x, x.masked_fill(m[..., None], 3.0)),
        with_mask,
    ),
    "gather": (lambda x, i, s: x.gather(1, i), with_gather),
    "scatter": (lambda x, i, s: x.scatter(1, i.sort(1)[0][:, :1], s), with_gather),
    "scatter_value": (lambda x, i, s: x.scatter(1, i, 5.0), with_gather),
    "scatter_add": (lambda x, i, s: x.scatter_add(1, i, s), with_gather),
    "scatter_reduce": (
        lambda x, i, s: x.scatter_reduce(1, i, s, "amax"),
        with_gather,
    ),
    "index_add": (lambda x, i, s: x.index_add(0, i, s), with_rows),
    "index_copy": (lambda x, i, s: x.index_copy(0, i[:2], s[:2]), with_rows),
    "index_fill": (lambda x, i, s: x.index_fill(1, i, 9.0), with_rows),
    "index_put": (lambda x, i, s: x.index_put((i[:2],), s[:2]), with_rows),
    "index_put_broadcast": (lambda x, i, s: x.index_put((i[:2],), s[0]), with_rows),
    "index_put_accumulate": (
        lambda x, i, s: x.index_put((i,), s, accumulate=True),
        with_rows,
    ),
    "index_put_two": (
        lambda x, i, s: x.index_put((i[:2], i[:2]), s[0, :2]),
        with_rows,
    ),
    "slice_scatter": (lambda x: x.slice_scatter(x[:, :2] * 2, 1, 1, 5, 2), cube),
    "select_scatter": (lambda x: x.select_scatter(x[:, 0] * 2, 1, -1), cube),
    "one_hot": (lambda x: F.one_hot(x, 5), ids),
    "embedding": (lambda x: F.embedding(x, torch.eye(5)), ids),
}


@pytest.mark.parametrize("name", CASES)
def test_shape_operator_equals_torch(onnx: Any, name: str) -> None:
    onnx.check_case(CASES, name)


def test_boolean_index_gives_rows_that_depend_on_the_data(onnx: Any) -> None:
    onnx.check(lambda x, mask: x[mask] * 2, with_mask)


def test_take_along_dim_broadcasts(onnx: Any) -> None:
    # torch itself fixes the sizes of this one when it traces.
    onnx.check(lambda x: x.take_along_dim(x[:, :1].argsort(2), 2), cube, sizes=(4,))


def test_nonzero_gives_positions(onnx: Any) -> None:
    onnx.check(lambda x: torch.nonzero(x) + 1, flags)


def test_size_of_what_depends_on_the_data_is_computed(onnx: Any) -> None:
    def function(x: Tensor, mask: Tensor) -> Tensor:
        rows = x[mask]
        return rows.reshape(rows.shape[0] * 2, 2) + torch.ones(rows.shape[0] * 2, 1)

    onnx.check(function, with_mask)


class Heads(nn.Module):
    """Joins the heads of a cache, which is empty at first, and of what is new."""

    def forward(self, past: Tensor, new: Tensor) -> Tensor:
        batch, heads, length, width = past.shape
        joined = past.transpose(1, 2).reshape(batch, length, heads * width)
        return torch.cat((joined, new.transpose(1, 2).flatten(2)), 1)


def test_axis_of_size_zero_is_kept(onnx: Any) -> None:
    """What remains of an empty tensor cannot be found by dividing: sizes are computed instead."""
    past, new = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 6, 5)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", min=0)
    shapes = ({0: batch, 2: length}, {0: batch, 2: torch.export.Dim("query")})
    exported = export(Heads(), (past, new), {}, shapes, "Heads")
    store = WeightStore()
    graph = unlifted_graph(exported, store, str)
    signature = Signature((Port("past"), Port("new")), (Port("all"),))
    session = onnx.session(Program(graph, store, signature))
    for size in (4, 0, 1):
        inputs = torch.randn(3, 3, size, 5), torch.randn(3, 3, 2, 5)
        (found,) = onnx.run(session, *inputs)
        assert (found == Heads()(*inputs).numpy()).all()
