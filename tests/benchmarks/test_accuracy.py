"""The accuracy table: its rows are recipes, and its results outlive a run that was ended."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from qcompile.recipe import load_recipe

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


ROWS = _module("accuracy_rows")
RESULTS = _module("accuracy_results")


@pytest.mark.parametrize(
    ("method", "setting"), [(m, s) for m, row in ROWS.ROWS.items() for s in row.formats]
)
def test_rows_are_recipes_that_keep_the_vocabulary_float(method: str, setting: str) -> None:
    assert setting in ROWS.SETTINGS
    recipe = load_recipe(ROWS.ROWS[method].recipe(setting))
    options = next(s.options for s in recipe.steps if s.name == "quantize_weights")
    assert (options.embedding, options.lm_head) == ("float", "float")


def test_formats_reach_the_steps_before() -> None:
    row = ROWS.weights({"w4": "int4"}, before=({"smooth": {"weights": ROWS.FORMAT}},))
    assert row.recipe("w4")["steps"][0] == {"smooth": {"weights": "int4"}}


def _measured(method: str, perplexity: float = 20.0, made_by: str = "a") -> object:
    return RESULTS.Measured(
        method, "w4", "int4", 4.0, perplexity, 0.1, 0.9, 18.0, 1.0, 1.0, 2.0, made_by
    )


def test_finished_rows_are_found_again_unless_their_recipe_changed(tmp_path: Path) -> None:
    protocol = {"windows": 4}
    RESULTS.Results(tmp_path / "r.json", protocol).add(_measured("gptq"))
    again = RESULTS.Results(tmp_path / "r.json", protocol)
    assert again.find("gptq", "w4", "a") == _measured("gptq")
    assert again.find("gptq", "w4", "b") is None
    again.add(_measured("gptq", 19.0, "b"))
    assert again.rows() == [_measured("gptq", 19.0, "b")]


def test_results_of_another_protocol_are_refused(tmp_path: Path) -> None:
    RESULTS.Results(tmp_path / "r.json", {"windows": 4}).add(_measured("gptq"))
    with pytest.raises(SystemExit, match="measured differently"):
        RESULTS.Results(tmp_path / "r.json", {"windows": 8})


def test_tables_put_the_best_first(tmp_path: Path) -> None:
    rows = [_measured("rtn", 30.0), _measured("gptq", 20.0)]
    (table,) = RESULTS.tables(rows, {"w4": "4 bit"})
    assert [row[0] for row in table.rows] == ["gptq", "rtn"]
