"""Rotations of queries and keys are recognized by what they compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompile.passes.raise_ops.raise_rope import RaiseRope

HEADS, WIDTH = 2, 8


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def rotate_pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)


def halves(x: Tensor, angle: Tensor) -> Tensor:
    full = torch.cat((angle, angle), -1).unsqueeze(1)
    return x * full.cos() + rotate_half(x) * full.sin()


def halves_backwards(x: Tensor, angle: Tensor) -> Tensor:
    full = torch.cat((angle, angle), -1).unsqueeze(1)
    return x * full.cos() - rotate_half(x) * full.sin()


def halves_apart(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def pairs(x: Tensor, angle: Tensor) -> Tensor:
    full = angle.repeat_interleave(2, -1).unsqueeze(1)
    return rotate_pairs(x) * full.sin() + x * full.cos()


def pairs_put_apart(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def complex_pairs(x: Tensor, angle: Tensor) -> Tensor:
    turn = torch.polar(torch.ones_like(angle), angle).unsqueeze(1)
    planes = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(planes * turn).flatten(3)


def scaled(x: Tensor, angle: Tensor) -> Tensor:
    full = torch.cat((angle, angle), -1).unsqueeze(1)
    return x * (full.cos() * 1.3) + rotate_half(x) * (full.sin() * 1.3)


def partial(x: Tensor, angle: Tensor) -> Tensor:
    return torch.cat((halves(x[..., :4], angle[..., :2]), x[..., 4:]), -1)


def not_orthogonal(x: Tensor, angle: Tensor) -> Tensor:
    full = torch.cat((angle, angle), -1).unsqueeze(1)
    return x * full.cos() + rotate_half(x) * full.cos()


def reflected(x: Tensor, angle: Tensor) -> Tensor:
    full = torch.cat((angle, angle), -1).unsqueeze(1)
    a, b = x.chunk(2, -1)
    return x * full.cos() + torch.cat((b, a), -1) * full.sin()


def unpaired(x: Tensor, angle: Tensor) -> Tensor:
    full = torch.cat((angle, 2 * angle), -1).unsqueeze(1)  # another angle for each channel
    return x * full.cos() + rotate_half(x) * full.sin()


Rotation = Callable[[Tensor, Tensor], Tensor]


class Rotated(nn.Module):
    """A projection to heads, and what `rotation` makes of it."""

    def __init__(self, rotation: Rotation, heads_first: bool = True) -> None:
        super().__init__()
        self.rotation = rotation
        self.heads_first = heads_first
        self.proj = nn.Linear(6, HEADS * WIDTH)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        frequencies = 10.0 ** (-torch.arange(WIDTH // 2) / 2.0)
        angle = positions.unsqueeze(-1) * frequencies
        heads = self.proj(x).unflatten(-1, (HEADS, WIDTH))
        return self.rotation(heads.transpose(1, 2), angle)


def program_of(rotation: Rotation, after: Any) -> tuple[Any, nn.Module]:
    model = Rotated(rotation)
    example = (torch.randn(2, 3, 6), torch.arange(6).reshape(2, 3))
    return after(RaiseRope(), model, example), model


@pytest.mark.parametrize(
    ("rotation", "interleaved"),
    [
        (halves, False),
        (halves_backwards, False),
        (halves_apart, False),
        (pairs, True),
        (pairs_put_apart, True),
        (complex_pairs, True),
        (scaled, False),
        (partial, False),
    ],
)
def test_rotation_becomes_one_operator(rotation: Rotation, interleaved: bool, after: Any) -> None:
    program, model = program_of(rotation, after)

    (node,) = program.calls(torch.ops.qc.rope.default)
    assert node.args[3] is interleaved
    x, positions = torch.randn(3, 5, 6), torch.randint(50, (3, 5))
    torch.testing.assert_close(program(x, positions), model(x, positions), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rotation", [not_orthogonal, reflected, unpaired])
def test_what_is_almost_a_rotation_is_left(rotation: Rotation, after: Any) -> None:
    program, model = program_of(rotation, after)

    assert not list(program.calls(torch.ops.qc.rope.default))
    x, positions = torch.randn(3, 5, 6), torch.randint(50, (3, 5))
    torch.testing.assert_close(program(x, positions), model(x, positions))


class SharedKey(nn.Module):
    """One head for all queries, whose channels become heads and complex pairs in one reshape."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, WIDTH)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        angle = positions.unsqueeze(-1) * 10.0 ** (-torch.arange(WIDTH // 2) / 2.0)
        turn = torch.polar(torch.ones_like(angle), angle).unsqueeze(1)
        planes = self.proj(x).reshape(x.shape[0], 1, x.shape[1], WIDTH // 2, 2)
        return torch.view_as_real(torch.view_as_complex(planes) * turn).flatten(3)


def test_heads_and_pairs_split_by_one_reshape_are_rotated(after: Any) -> None:
    model = SharedKey()
    program = after(RaiseRope(), model, (torch.randn(2, 3, 6), torch.arange(6).reshape(2, 3)))

    (node,) = program.calls(torch.ops.qc.rope.default)
    assert node.args[3] is True
    x, positions = torch.randn(3, 5, 6), torch.randint(50, (3, 5))
    torch.testing.assert_close(program(x, positions), model(x, positions), rtol=1e-5, atol=1e-6)


def test_partial_rotation_takes_the_whole_head(after: Any) -> None:
    program, _ = program_of(partial, after)

    (node,) = program.calls(torch.ops.qc.rope.default)
    assert node.args[0].meta["val"].shape[-1] == WIDTH
    assert node.args[1].meta["val"].shape[-1] == 2
    assert node in program.results
