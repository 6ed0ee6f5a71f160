from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from qcompile.passes.quantize.methods.block import Descent, Learnable
from qcompile.passes.tune.descent import Descended, descend


class Distances:
    """Half the squared distance of some numbers from a target per micro-batch."""

    def __init__(self, rate: float, targets: Tensor, low: float = -torch.inf) -> None:
        self.targets = targets
        self.batches = len(targets)
        self.learnables = [Learnable(torch.zeros(targets.shape[1]), rate, low=low)]
        self.seen: list[int] = []

    @property
    def values(self) -> Tensor:
        return self.learnables[0].value.detach()

    def losses(self) -> list[float]:
        return [float((self.values - target).square().sum() / 2) for target in self.targets]

    def gradients(self, batches: Sequence[int]) -> tuple[list[float], list[Tensor]]:
        self.seen += batches
        losses = self.losses()
        gradient = torch.stack([self.values - self.targets[batch] for batch in batches]).sum(0)
        return [losses[batch] for batch in batches], [gradient]


def run(problem: Distances, descent: Descent, seed: int = 0) -> Descended:
    return descend(problem, descent, torch.Generator().manual_seed(seed))


def targets() -> Tensor:
    """Of four micro-batches, around (1, -2)."""
    generator = torch.Generator().manual_seed(3)
    return torch.tensor([1.0, -2.0]) + 0.1 * torch.randn(4, 2, generator=generator)


@pytest.mark.parametrize("rule", ["sign", "adam"])
def test_both_rules_find_the_minimum(rule: str) -> None:
    problem = Distances(0.1, targets())
    found = run(problem, Descent(rule, 100, 2, decay=True))  # type: ignore[arg-type]
    # The last steps are a hundredth of the first.
    torch.testing.assert_close(problem.values, targets().mean(0), rtol=0, atol=0.05)
    assert found.before == pytest.approx(targets().square().sum(1).mean() / 2)
    assert found.after == pytest.approx(sum(problem.losses()) / 4)
    assert found.after < 0.01 * found.before
    assert found.steps == 100


def test_steps_of_signs_that_fall_to_nothing_add_up_to_half_of_all() -> None:
    problem = Distances(1 / 50, torch.full((2, 1), 9.0))
    run(problem, Descent("sign", 50, 1, decay=True))
    assert float(problem.values) == pytest.approx(0.51)


def test_steps_that_lead_up_leave_the_start() -> None:
    problem = Distances(50.0, targets())
    found = run(problem, Descent("sign", 3, 4))
    assert problem.values.tolist() == [0.0, 0.0]
    assert found.after == found.before


def test_numbers_stay_in_their_range() -> None:
    problem = Distances(0.1, targets(), low=-0.5)
    run(problem, Descent("sign", 60, 4, decay=True))
    assert float(problem.values[1]) == -0.5


def test_every_window_comes_once_before_any_comes_again() -> None:
    problem = Distances(0.01, targets())
    run(problem, Descent("adam", 6, 2))
    assert [sorted(problem.seen[i : i + 4]) for i in (0, 4, 8)] == [[0, 1, 2, 3]] * 3
    other = Distances(0.01, targets())
    run(other, Descent("adam", 6, 2), seed=1)
    assert other.seen != problem.seen


def test_minibatch_larger_than_the_data_takes_all_of_it() -> None:
    problem = Distances(0.01, targets())
    run(problem, Descent("adam", 2, 9))
    assert sorted(problem.seen[:4]) == [0, 1, 2, 3]
    assert len(problem.seen) == 8


def test_patience_ends_what_does_not_get_better() -> None:
    problem = Distances(5.0, targets())
    assert run(problem, Descent("sign", 100, 4, patience=4)).steps < 10


def test_block_without_error_is_left_as_it_is() -> None:
    problem = Distances(0.1, torch.zeros(3, 2))
    assert run(problem, Descent("sign", 5, 1)) == Descended(0.0, 0.0, 0)
