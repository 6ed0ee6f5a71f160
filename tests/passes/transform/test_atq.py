from __future__ import annotations

import pytest
import torch
from tests.passes.transform.methods import (
    EQUIVALENT,
    apply,
    function_error,
    tiny,
    with_outliers,
)

from qcompile.passes.transform.atq import Atq, TriangleBound
from qcompile.passes.transform.smoothing.objective import Objective

UP, DOWN = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "down"))


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_atq_keeps_the_function(name: str) -> None:
    before = tiny(name)
    after, result = apply(before, Atq())
    assert result.rewrites > 0
    assert function_error(before, after) < EQUIVALENT


def test_bound_falls_where_channels_stand_out() -> None:
    program = with_outliers(tiny("llama"), UP, [5, 17], 100.0)
    _, result = apply(program, Atq())
    (detail,) = [detail for detail in result.details if DOWN in detail["sinks"]]
    assert detail["strength"] is not None
    assert detail["error"] < 0.7 * detail["error_unscaled"]


def test_bound_is_not_below_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []

    class Both(TriangleBound):
        def __call__(self, scales: list[torch.Tensor]) -> float:
            bound = super().__call__(scales)
            error = Objective(self._site, self._samples, self._rounding)(scales)
            # Norms over norms against squares over squares, of one reader or several.
            assert error**0.5 <= bound * (1 + 1e-5)
            checked.append(bound)
            return bound

    monkeypatch.setattr(Atq, "objective", Both)
    apply(tiny("llama"), Atq("int4", "int4"))
    assert len(checked) > 10
