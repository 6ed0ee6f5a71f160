from __future__ import annotations

import torch

from qcompile.passes.transform.values import random_orthogonal
from qcompile.passes.tune.cayley import cayley_step


def random_rotation(n: int, seed: int) -> torch.Tensor:
    return random_orthogonal(n, torch.Generator().manual_seed(seed)).rotation


def test_steps_stay_orthogonal() -> None:
    rotation = random_rotation(12, 0)
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        rotation = cayley_step(rotation, torch.randn(12, 12, generator=generator), 1.5)
    one = torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(rotation @ rotation.T, one, rtol=0, atol=1e-12)


def test_small_step_goes_down_the_gradient() -> None:
    rotation, target = random_rotation(6, 0), random_rotation(6, 1)

    def loss(r: torch.Tensor) -> torch.Tensor:
        return (r - target).square().sum()

    leaf = rotation.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    rate = 1e-4
    moved = cayley_step(rotation, gradient, rate)
    # To first order the loss falls by the rate times the squared length of the direction, which
    # is that of the gradient less its normal part: half of the skew part's square.
    skew = gradient @ rotation.T
    skew = (skew - skew.T) / 2
    assert loss(moved) < loss(rotation)
    fall = float(loss(rotation) - loss(moved)) / (rate * float(skew.square().sum()))
    assert 0.5 < fall < 2


def test_descent_finds_a_rotation_of_the_same_determinant() -> None:
    # Rotations are connected, reflections are another part: the target must be reachable.
    rotation = torch.eye(5, dtype=torch.float64)
    target = random_rotation(5, 2)
    target[0] *= torch.linalg.det(target).sign()
    for _ in range(300):
        leaf = rotation.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((leaf - target).square().sum(), leaf)
        rotation = cayley_step(rotation, gradient, 0.1)
    torch.testing.assert_close(rotation, target, rtol=0, atol=1e-4)


def test_zero_gradient_changes_nothing() -> None:
    rotation = random_rotation(4, 0)
    assert cayley_step(rotation, torch.zeros(4, 4), 1.0) is rotation
