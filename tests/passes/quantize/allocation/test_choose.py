"""The dynamic program against trying everything."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.passes.quantize.allocation.choose import choose


def _best(costs: list[list[int]], losses: list[list[float]], budget: int) -> float:
    choices = product(*(range(len(item)) for item in costs))
    return min(
        sum(item[i] for item, i in zip(losses, choice, strict=True))
        for choice in choices
        if sum(item[i] for item, i in zip(costs, choice, strict=True)) <= budget
    )


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[int]], list[list[float]], int]:
    options = draw(st.integers(1, 4))
    items = draw(st.integers(1, 5))
    cost, loss = st.integers(0, 40), st.floats(0, 10, allow_nan=False)
    costs = [draw(st.lists(cost, min_size=options, max_size=options)) for _ in range(items)]
    losses = [draw(st.lists(loss, min_size=options, max_size=options)) for _ in range(items)]
    budget = sum(min(item) for item in costs) + draw(st.integers(0, 80))
    return costs, losses, budget


@given(problems())
@settings(max_examples=150, deadline=None)
def test_choice_is_the_best_of_all(problem) -> None:
    costs, losses, budget = problem
    chosen = choose(costs, losses, budget)
    assert sum(item[i] for item, i in zip(costs, chosen, strict=True)) <= budget
    found = sum(item[i] for item, i in zip(losses, chosen, strict=True))
    assert found == pytest.approx(_best(costs, losses, budget), abs=1e-9)


def test_budgets_of_many_units_are_kept_and_nearly_used() -> None:
    costs = [[2_000_003, 3_000_017, 4_000_037]] * 50
    losses = [[4.0 * w, 2.0 * w, 1.0 * w] for w in range(1, 51)]
    budget = 150_000_000
    chosen = choose(costs, losses, budget)
    used = sum(item[i] for item, i in zip(costs, chosen, strict=True))
    assert budget - 1_100_000 < used <= budget  # one step of one item may not fit
    assert chosen == sorted(chosen)  # what weighs more gets more


def test_budgets_below_the_cheapest_are_refused() -> None:
    with pytest.raises(ValueError, match="cheapest options cost 4, more than 3"):
        choose([[2, 5], [2, 3]], [[1.0, 0.0]] * 2, 3)
