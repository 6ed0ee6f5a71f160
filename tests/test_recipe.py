"""Recipes: named, from files, overridden, and refused with the line and what was meant."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcompile.errors import QCompileError, RecipeError
from qcompile.recipe import (
    DEFAULT_RECIPE,
    STEPS,
    QuantizeActivations,
    QuantizeWeights,
    Recipe,
    load_recipe,
    parse_setting,
    recipe_names,
)
from qcompile.recipe_yaml import MAX_BYTES, MAX_DEPTH, parse_yaml


def weights_of(recipe: Recipe) -> QuantizeWeights:
    options = recipe.steps[0].options
    assert isinstance(options, QuantizeWeights)
    return options


def write(directory: Path, text: str, name: str = "mine.yaml") -> Path:
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return path


# --- named recipes ---


@pytest.mark.parametrize("name", recipe_names())
def test_named_recipe_is_valid_named_as_its_file_and_described(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert 20 < len(recipe.description) <= 100


def test_default_recipe_quantizes_weights_to_4_and_activations_to_8_bit() -> None:
    recipe = load_recipe(DEFAULT_RECIPE)
    weights, activations = (step.options for step in recipe.steps)
    assert isinstance(weights, QuantizeWeights)
    assert isinstance(activations, QuantizeActivations)
    assert (weights.format, weights.embedding, weights.lm_head) == (
        "int4-g32-asym",
        "int8-g64",
        "int8-g64",
    )
    assert activations.granularity == "group"


def test_float_recipe_has_no_steps() -> None:
    assert load_recipe("float").steps == ()


def test_unknown_name_is_refused_with_the_closest() -> None:
    with pytest.raises(RecipeError, match="no recipe named 'w4a8-rnt'") as caught:
        load_recipe("w4a8-rnt")
    assert caught.value.remedy is not None
    assert caught.value.remedy.startswith("did you mean 'w4a8-rtn'? (known: float, ")


# --- files, mappings, objects ---


def test_file_is_read_and_named_after_itself(tmp_path: Path) -> None:
    path = write(tmp_path, "steps:\n  - quantize_weights: {format: int8, ignore: ['a.*']}\n")
    recipe = load_recipe(path)
    assert recipe.name == "mine"
    assert weights_of(recipe).ignore == ("a.*",)
    assert load_recipe(str(path)) == recipe


def test_file_without_yaml_suffix_is_read_when_it_exists(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, "steps: []", name="plain")).name == "plain"


@pytest.mark.parametrize("step", ["- quantize_activations", "- quantize_activations:"])
def test_step_without_options_has_the_defaults(tmp_path: Path, step: str) -> None:
    recipe = load_recipe(
        write(tmp_path, f"steps:\n  - quantize_weights: {{format: int8}}\n  {step}\n")
    )
    assert recipe.steps[1].options == QuantizeActivations()


@pytest.mark.parametrize("name", recipe_names())
def test_dictionary_and_yaml_forms_round_trip(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert load_recipe(recipe.to_dict()) == recipe
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe
    assert load_recipe(recipe) is recipe


def test_format_is_kept_in_its_canonical_spelling() -> None:
    spelled = load_recipe({"steps": [{"quantize_weights": {"format": "int4-asym-g64"}}]})
    assert weights_of(spelled).format == "int4-g64-asym"


def test_recipe_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe("float").name = "other"


def test_every_step_has_frozen_options_that_forbid_extras() -> None:
    for options in STEPS.values():
        assert options.model_config["frozen"]
        assert options.model_config["extra"] == "forbid"


# --- what is wrong, on which line, and what was meant ---

WEIGHTS = "steps:\n  - quantize_weights:\n      format: int8\n"

WRONG = {
    "top-level key": (
        "name: a\nstep:\n  - float\n",
        "line 2: unknown key 'step'",
        "did you mean 'steps'?",
    ),
    "step": (
        "steps:\n  - quantize_weight: {format: int8}\n",
        "line 2: unknown step 'quantize_weight'",
        "did you mean 'quantize_weights'?",
    ),
    "option": (
        "steps:\n  - quantize_weights:\n      fromat: int8\n",
        "line 3: unknown key 'fromat' in quantize_weights",
        "did you mean 'format'?",
    ),
    "missing option": (
        "name: a\nsteps:\n  - quantize_weights:\n      method: rtn\n",
        "line 3: quantize_weights.format: this key is required",
        None,
    ),
    "nested option": (
        WEIGHTS + "      overrides:\n        - {match: a, format: float}\n        - {mach: b}\n",
        "line 6: unknown key 'mach' in quantize_weights.overrides[1]",
        "did you mean 'match'?",
    ),
    "method": (
        WEIGHTS + "      method: magic\n",
        "line 4: quantize_weights.method: unknown method 'magic'",
        None,
    ),
    "option of a method": (
        WEIGHTS + "      method: gptq\n      options: {actorder: true}\n",
        "line 2: quantize_weights: method 'gptq' has no option 'actorder'",
        "did you mean 'act_order'?",
    ),
    "type": (
        WEIGHTS + "      ignore: lm_head\n",
        "line 4: quantize_weights.ignore: must be a valid tuple, not 'lm_head'",
        None,
    ),
    "number for a format": (
        "steps:\n  - quantize_weights: {format: 4}\n",
        "line 2: quantize_weights.format: must be a valid string, not 4",
        None,
    ),
    "empty pattern": (
        WEIGHTS + "      ignore:\n        - lm_head\n        - ''\n",
        "line 6: quantize_weights.ignore[1]: an empty pattern",
        "leave it out",
    ),
    "two steps in one": (
        "steps:\n  - quantize_weights: {format: int8}\n    quantize_activations: {}\n",
        "line 2: a step is one name and its options, not 2 keys",
        "list item of its own",
    ),
    "order": (
        "steps:\n  - quantize_activations\n  - quantize_weights: {format: int8}\n",
        "quantize_activations needs a quantize_weights step before it",
        "before it",
    ),
    "twice": (
        "steps:\n  - quantize_weights: {format: int8}\n  - quantize_weights: {format: int8}\n",
        "step 'quantize_weights' stands 2 times",
        "keep one",
    ),
    "name": ("name: ../evil\n", "line 1: name: '../evil' is not a name", None),
    "duplicate key": ("name: a\nname: b\n", "line 2: key 'name' stands twice, first on line 1", ""),
    "syntax": ("name: a\nsteps: [\n", "not valid YAML", None),
    "tab": ("name: a\n\tsteps: 1\n", "line 2: not valid YAML", None),
    "scalar": ("hello\n", "is not a mapping", "qcompile recipes"),
    "empty": ("", "is not a mapping", "qcompile recipes"),
    "two documents": ("name: a\n---\nname: b\n", "not valid YAML", None),
    "object": ("name: !!python/object:os.system x\n", "line 1: not valid YAML", None),
    "impossible date": ("name: 2001-99-99\n", "cannot be read", None),
    "alias": ("name: &a x\ndescription: *a\n", "line 2: YAML aliases", "write the value out"),
    "depth": ("name: " + "[" * (MAX_DEPTH + 1), "nested more than", None),
    "abyss": ("[" * 100_000, "nested more than", None),
    "size": ("#" * (MAX_BYTES + 1), "KiB", None),
    "NUL": ("name: a\0b\n", "not valid YAML", None),
}


@pytest.mark.parametrize(("text", "message", "remedy"), WRONG.values(), ids=WRONG.keys())
def test_mistake_in_a_file_is_named_with_line_and_remedy(
    tmp_path: Path, text: str, message: str, remedy: str | None
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert caught.value.message.startswith(f"recipe '{path}'")
    assert message in caught.value.message
    assert caught.value.exit_code == 2
    if remedy is not None:
        assert remedy in (caught.value.remedy or "")


def test_unknown_format_is_refused_where_it_stands(tmp_path: Path) -> None:
    path = write(tmp_path, WEIGHTS + "      lm_head: imt8\n")
    with pytest.raises(RecipeError, match=r"line 4: quantize_weights.lm_head: .*imt8"):
        load_recipe(path)


def test_several_mistakes_name_the_first_and_count_the_rest(tmp_path: Path) -> None:
    path = write(tmp_path, WEIGHTS + "      method: x\n      scale_search: y\n")
    with pytest.raises(RecipeError, match=r"line 4: .*method.*\(and 1 more\)"):
        load_recipe(path)


def test_mapping_without_lines_still_names_the_key() -> None:
    with pytest.raises(RecipeError, match="the recipe: unknown key 'fromat' in quantize_weights"):
        load_recipe({"steps": [{"quantize_weights": {"fromat": "int8"}}]})


def test_braces_in_a_message_are_kept() -> None:
    with pytest.raises(RecipeError, match=r"unknown step '\{x\}'"):
        load_recipe({"steps": ["{x}"]})


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"absent.yaml' cannot be read: No such file"):
        load_recipe(tmp_path / "absent.yaml")


def test_directory_is_not_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe named"):
        load_recipe(tmp_path)


def test_binary_file_is_not_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(path)


def test_other_objects_are_not_recipes() -> None:
    with pytest.raises(RecipeError, match="cannot be made from int"):
        load_recipe(4)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_mutated_recipe_loads_or_is_refused_by_name(data: st.DataObject) -> None:
    text = bytearray(load_recipe(DEFAULT_RECIPE).to_yaml().encode())
    for _ in range(data.draw(st.integers(1, 6))):
        position = data.draw(st.integers(0, len(text) - 1))
        text[position] = data.draw(st.sampled_from(b"\n\t :-[]{}&*!'\"%@,ax0#|>?\0"))
    with contextlib.suppress(QCompileError):  # anything else fails the test
        load_recipe(parse_yaml(text.decode(), source="a mutant").data)  # type: ignore[arg-type]


# --- overrides ---


def test_override_sets_an_option_and_leaves_the_rest() -> None:
    recipe = load_recipe("w8a8-rtn", {"quantize_weights.format": "int4-g64"})
    assert weights_of(recipe).format == "int4-g64"
    assert weights_of(recipe).lm_head == "int8"
    assert recipe.steps[1:] == load_recipe("w8a8-rtn").steps[1:]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b=int8", ("a.b", "int8")),
        ("a.b=[x, 'y*']", ("a.b", ["x", "y*"])),
        ("a.b=null", ("a.b", None)),
        ("a.b=", ("a.b", None)),
        ("a.b=c=d", ("a.b", "c=d")),
        (" a.b = 0.5", ("a.b", 0.5)),
    ],
)
def test_setting_is_split_and_its_value_is_yaml(text: str, expected: tuple[str, object]) -> None:
    assert parse_setting(text) == expected


@pytest.mark.parametrize("text", ["a.b", "=x", ""])
def test_setting_without_key_or_value_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"not of the form step.option=value"):
        parse_setting(text)


def test_setting_with_broken_yaml_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"setting 'a\.b'"):
        parse_setting("a.b=[1")


@pytest.mark.parametrize(
    ("key", "message", "remedy"),
    [
        ("quantize_weigths.format", "no step 'quantize_weigths'", "mean 'quantize_weights'"),
        ("quantize_weights.fromat", "unknown key 'fromat'", "did you mean 'format'?"),
        ("quantize_weights.format", "imt4", None),
        ("format", "names no option of a step", "quantize_weights.format"),
    ],
)
def test_wrong_override_names_the_alternatives(key: str, message: str, remedy: str | None) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe("w8a8-rtn", {key: "imt4"})
    assert f"setting '{key}'" in caught.value.message
    if remedy is not None:
        assert remedy in (caught.value.remedy or "")


def test_override_of_a_step_that_the_recipe_lacks_is_refused() -> None:
    with pytest.raises(RecipeError, match="recipe 'float' has no step 'quantize_weights'"):
        load_recipe("float", {"quantize_weights.format": "int8"})


@pytest.mark.parametrize(("name", "canonical"), [("fp8", "e4m3"), ("int8-asym", "int8-asym")])
def test_formats_of_activations_are_kept_in_their_canonical_spelling(
    name: str, canonical: str
) -> None:
    step = {"quantize_activations": {"format": name, "granularity": "tensor"}}
    recipe = load_recipe({"steps": [{"quantize_weights": {"format": "int8"}}, step]})
    assert recipe.steps[1].options.format == canonical  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "int9"}, "activations cannot be 'int9'"),
        ({"format": "int8-asym"}, "measured at run time and have no zero points"),
        ({"granularity": "channel", "ranges": "mse"}, "scales per channel span 'absmax'"),
    ],
)
def test_activations_that_make_no_sense_are_refused_by_the_recipe(
    options: dict[str, str], message: str
) -> None:
    steps = [{"quantize_weights": {"format": "int8"}}, {"quantize_activations": options}]
    with pytest.raises(RecipeError, match=message):
        load_recipe({"steps": steps})
