"""Reductions, sorting, softmax, and tensors made from sizes, against torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

Inputs = Callable[[int], tuple[Tensor, ...]]


def floats(n: int) -> tuple[Tensor, ...]:
    return (torch.randn(n, 6, 4),)


def distinct(n: int) -> tuple[Tensor, ...]:
    return (torch.randperm(n * 24).reshape(n, 6, 4).float(),)


def integers(n: int) -> tuple[Tensor, ...]:
    return (torch.randint(-5, 5, (n, 6)),)


def flags(n: int) -> tuple[Tensor, ...]:
    return (torch.rand(n, 6) > 0.5,)


CASES: dict[str, tuple[Callable[..., Any], Inputs]] = {
    "sum": (lambda x: x.sum(), floats),
    "sum_axis": (lambda x: x.sum(-1), floats),
    "sum_axes_kept": (lambda x: x.sum((0, 2), keepdim=True), floats),
    "sum_of_bools": (lambda x: x.sum(1), flags),
    "sum_of_ints": (lambda x: x.sum(0), integers),
    "sum_in_float": (lambda x: x.sum(0, dtype=torch.float32), integers),
    "mean": (lambda x: x.mean(), floats),
    "mean_axes": (lambda x: x.mean((1, 2)), floats),
    "prod": (lambda x: x.prod(1), floats),
    "amax": (lambda x: x.amax(1), floats),
    "amin_kept": (lambda x: x.amin((1, 2), keepdim=True), floats),
    "max": (lambda x: x.max(), floats),
    "max_axis": (lambda x: tuple(x.max(1)), distinct),
    "min_axis": (lambda x: tuple(x.min(2, keepdim=True)), distinct),
    "argmax": (lambda x: x.argmax(-1), distinct),
    "argmax_flat": (lambda x: x.argmax(), distinct),
    "argmin_kept": (lambda x: x.argmin(1, keepdim=True), distinct),
    "any": (lambda x: x.any(), flags),
    "any_axis": (lambda x: (x > 1).any(1), floats),
    "all_axis": (lambda x: x.all(1, keepdim=True), flags),
    "var": (lambda x: x.var(), floats),
    "var_axis": (lambda x: x.var(-1), floats),
    "var_biased": (lambda x: x.var((1, 2), correction=0, keepdim=True), floats),
    "var_over_varying_axis": (lambda x: x.var(0), floats),
    "std": (lambda x: x.std(1), floats),
    "var_mean": (lambda x: torch.var_mean(x, -1), floats),
    "cumsum": (lambda x: x.cumsum(0), integers),
    "cumsum_of_bools": (lambda x: x.cumsum(1), flags),
    "cumsum_float": (lambda x: x.cumsum(-1), floats),
    "topk": (lambda x: tuple(x.topk(3, 1)), distinct),
    "topk_smallest": (lambda x: tuple(x.topk(2, largest=False)), distinct),
    "topk_varying": (lambda x: tuple(x.topk(x.shape[0] - 1, 0)), distinct),
    "sort": (lambda x: tuple(x.sort(1)), distinct),
    "sort_descending": (lambda x: tuple(x.sort(dim=2, descending=True)), distinct),
    "sort_stable": (lambda x: tuple(x.sort(stable=True)), integers),
    "argsort": (lambda x: x.argsort(1), distinct),
    "softmax": (lambda x: x.softmax(-1), floats),
    "softmax_in_float": (lambda x: F.softmax(x, 1, dtype=torch.float32), floats),
    "log_softmax": (lambda x: x.log_softmax(1), floats),
    "logsumexp": (lambda x: x.logsumexp((1, 2)), floats),
    "norm": (lambda x: x.norm(dim=-1), floats),
    "vector_norm_1": (lambda x: torch.linalg.vector_norm(x, 1, 1), floats),
    "vector_norm_inf": (lambda x: torch.linalg.vector_norm(x, float("inf"), 1), floats),
    "vector_norm_3": (lambda x: torch.linalg.vector_norm(x, 3, 1, keepdim=True), floats),
    "normalize": (lambda x: F.normalize(x, dim=1), floats),
    "cosine_similarity": (lambda x: F.cosine_similarity(x, x + 1, dim=1), floats),
    "count_nonzero": (lambda x: x.count_nonzero(1), integers),
    "aminmax": (lambda x: tuple(x.aminmax(dim=1)), floats),
    "arange": (lambda x: torch.arange(x.shape[0]) + 0, floats),
    "arange_from": (lambda x: torch.arange(3, x.shape[0] + 5, 2) + 0, floats),
    "arange_fixed": (lambda x: x + torch.arange(4), floats),
    "arange_float": (lambda x: torch.arange(0, x.shape[0], dtype=torch.float32) * 0.5, floats),
    "zeros": (lambda x: torch.zeros(x.shape[0], 3) + x.sum(), floats),
    "ones_like": (lambda x: torch.ones_like(x) + x, floats),
    "full": (lambda x: torch.full((2, x.shape[0]), 1.5) + x.sum(), floats),
    "full_of_size": (lambda x: torch.full((3,), x.shape[0]) + 1, floats),
    "full_like": (lambda x: torch.full_like(x, 3) + x, integers),
    "new_zeros": (lambda x: x.new_zeros(x.shape[0], 2) + 1, floats),
    "new_full": (lambda x: x.new_full((3, x.shape[0]), 7.0) + 1, floats),
    "eye": (lambda x: torch.eye(6) + x[0, 0, 0], floats),
    "eye_varying": (lambda x: torch.eye(x.shape[0]) * 2, floats),
    "linspace": (lambda x: x + torch.linspace(0, 1, 4), floats),
    "scalar_tensor": (lambda x: torch.where(x > 0, x, torch.tensor(-1.0)), floats),
    "causal_mask": (
        lambda x: torch.full((x.shape[0], x.shape[0]), float("-inf")).triu(1) + x[0, 0, 0],
        floats,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_reduction_equals_torch(onnx: Any, name: str) -> None:
    onnx.check_case(CASES, name, atol=1e-5)
