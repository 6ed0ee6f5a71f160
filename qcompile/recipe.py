"""Recipes: which passes quantize a model, in which order, with which options.

A recipe is an ordered list of steps. In YAML each step is a mapping of one key, the step's name,
to its options::

    name: my-recipe
    description: 4-bit weights, except the last layer
    steps:
      - quantize_weights: {format: int4-g64, ignore: ["lm_head.*"]}
      - quantize_activations: {format: int8, granularity: token}

`load_recipe` is the way in. Everything in a recipe is checked before any model is opened; what is
wrong is reported with the line it stands on and what would have been right.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from qcompile.errors import RecipeError, suggest
from qcompile.recipe_schema import (
    FLOAT,
    STEPS,
    QuantizeActivations,
    QuantizeCache,
    QuantizeWeights,
    Recipe,
    Step,
    StepOptions,
    WeightOverride,
    is_mapping,
)
from qcompile.recipe_yaml import MAX_BYTES, LocatedYaml, parse_yaml

__all__ = [
    "DEFAULT_RECIPE",
    "FLOAT",
    "STEPS",
    "QuantizeActivations",
    "QuantizeCache",
    "QuantizeWeights",
    "Recipe",
    "Step",
    "StepOptions",
    "WeightOverride",
    "load_recipe",
    "parse_setting",
    "recipe_descriptions",
    "recipe_names",
]

DEFAULT_RECIPE: Final = "w4a8-rtn"

_NAMED_RECIPES: Final = Path(__file__).parent / "recipes"


def load_recipe(
    spec: str | Path | Mapping[str, object] | Recipe,
    overrides: Mapping[str, object] | None = None,
) -> Recipe:
    """Finds, reads and checks a recipe.

    Args:
        spec: The name of a recipe that qcompile brings along, the path of a YAML file, the
            contents of one as a mapping, or a recipe.
        overrides: Options to set on top, ``{"quantize_weights.format": "int8"}``; a key is
            ``step.option`` and the step must be in the recipe.

    Raises:
        RecipeError: There is no such recipe, or something in it or in ``overrides`` is wrong.
    """
    recipe = _resolve(spec)
    for key, value in (overrides or {}).items():
        recipe = _override(recipe, key, value)
    return recipe


def recipe_names() -> tuple[str, ...]:
    """The names of the recipes that qcompile brings along, in alphabetical order."""
    return tuple(sorted(path.stem for path in _NAMED_RECIPES.glob("*.yaml")))


def recipe_descriptions() -> dict[str, str]:
    """What each of `recipe_names` does, in a line; checks nothing else, and needs no torch."""
    descriptions = {}
    for name in recipe_names():
        data = parse_yaml(_read_file(_NAMED_RECIPES / f"{name}.yaml"), source=name).data
        descriptions[name] = str(data.get("description", "")) if is_mapping(data) else ""
    return descriptions


def parse_setting(text: str) -> tuple[str, object]:
    """Splits ``step.option=value``, the value in YAML, as the command line takes it.

    Raises:
        RecipeError: The text has no ``=`` or no key, or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(
            f"the setting '{text}' is not of the form step.option=value",
            remedy="write for example --set quantize_weights.format=int8",
        )
    return key.strip(), parse_yaml(value, source=f"the value of setting '{key.strip()}'").data


def _resolve(spec: str | Path | Mapping[str, object] | Recipe) -> Recipe:
    if isinstance(spec, Recipe):
        return spec
    if is_mapping(spec):
        return _validate(LocatedYaml(spec, {}), source="the recipe", default_name="custom")
    if not isinstance(spec, (str, Path)):
        raise RecipeError(
            f"a recipe cannot be made from {type(spec).__name__}",
            remedy="pass a name, a path, a mapping or a Recipe",
        )
    if isinstance(spec, str) and spec in recipe_names():
        text = _read_file(_NAMED_RECIPES / f"{spec}.yaml")
        return _read(text, source=f"recipe '{spec}'", default_name=spec)
    path = Path(spec)
    if path.suffix not in {".yaml", ".yml"} and not path.is_file():
        raise RecipeError(
            f"there is no recipe named '{spec}'",
            remedy=f"{suggest(str(spec), recipe_names())}; or pass the path of a YAML file",
        )
    return _read(_read_file(path), source=f"recipe '{path}'", default_name=path.stem)


def _read_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)  # past this, parse_yaml refuses it
    except OSError as error:
        raise RecipeError(
            f"recipe '{path}' cannot be read: {error.strerror or error}",
            remedy=f"named recipes: {', '.join(recipe_names())}",
        ) from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe '{path}' is not UTF-8 text") from error


def _read(text: str, *, source: str, default_name: str) -> Recipe:
    return _validate(parse_yaml(text, source=source), source=source, default_name=default_name)


def _validate(document: LocatedYaml, *, source: str, default_name: str) -> Recipe:
    if not is_mapping(document.data):
        raise RecipeError(
            f"{source} is not a mapping with 'name' and 'steps'",
            remedy="see 'qcompile recipes w4a8-rtn' for one that is",
        )
    try:
        return Recipe.model_validate({"name": default_name, **document.data})
    except ValidationError as error:
        raise _recipe_error(error, document, source) from error


def _override(recipe: Recipe, key: str, value: object) -> Recipe:
    source = f"setting '{key}'"
    name, dot, option = key.partition(".")
    present = {step.name: step for step in recipe.steps}
    if not dot:
        known = [f"{s.name}.{o}" for s in recipe.steps for o in type(s.options).model_fields]
        raise RecipeError(
            f"{source} names no option of a step",
            remedy=suggest(f"{name}.", known),
        )
    if name not in present:
        raise RecipeError(
            f"{source}: recipe '{recipe.name}' has no step '{name}'",
            remedy=suggest(name, present),
        )
    options = {**present[name].options.model_dump(exclude_unset=True), option: value}
    steps = [{name: options} if step.name == name else step for step in recipe.steps]
    changed = {"name": recipe.name, "description": recipe.description, "steps": steps}
    try:
        return Recipe.model_validate(changed)
    except ValidationError as error:
        raise _recipe_error(error, LocatedYaml(changed, {}), source) from error


# --- Saying what is wrong --------------------------------------------------------------------


def _recipe_error(error: ValidationError, document: LocatedYaml, source: str) -> RecipeError:
    """The first complaint of pydantic, by line, as one sentence."""
    complaints = [(_path(details["loc"], document.data), details) for details in error.errors()]
    complaints.sort(key=lambda complaint: document.line_of(complaint[0]) or 0)
    path, details = complaints[0]
    line = document.line_of(path)
    place = source if line is None else f"{source}, line {line}"
    if details["type"] == "unknown_key":
        parent = _dotted(path[:-1])
        message = f"{place}: {details['msg']}{f' in {parent}' if parent else ''}"
    elif details["type"] == "step" or not path:
        message = f"{place}: {_sentence(details)}"
    else:
        message = f"{place}: {_dotted(path)}: {_sentence(details)}"
    if len(complaints) > 1:
        message += f" (and {len(complaints) - 1} more)"
    remedy = details.get("ctx", {}).get("remedy")
    return RecipeError(message, remedy=None if remedy is None else str(remedy))


def _path(location: tuple[int | str, ...], data: object) -> tuple[int | str, ...]:
    """The place in the document that pydantic's location means.

    Pydantic does not see a step's name, as `Step` takes it off: ``("steps", 0, "format")`` stands
    at ``("steps", 0, "quantize_weights", "format")``.
    """
    if len(location) < 2 or location[0] != "steps" or not is_mapping(data):
        return location
    steps, index = data.get("steps"), location[1]
    if isinstance(steps, (list, tuple)) and isinstance(index, int) and index < len(steps):
        step = steps[index]
        if is_mapping(step) and len(step) == 1:
            return (*location[:2], str(next(iter(step))), *location[2:])
    return location


def _dotted(path: tuple[int | str, ...]) -> str:
    """``("steps", 0, "quantize_weights", "ignore", 1)`` as ``quantize_weights.ignore[1]``."""
    if len(path) > 2 and path[0] == "steps":
        path = path[2:]
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f"{'.' if text else ''}{part}"
    return text


def _sentence(details: ErrorDetails) -> str:
    if details["type"] in {"format", "pattern", "step", "order", "method", "budget"}:
        return details["msg"]
    if details["type"] == "missing":
        return "this key is required"
    if details["type"] == "string_pattern_mismatch":
        return f"{details['input']!r} is not a name (letters, digits, '.', '_' and '-')"
    message = details["msg"].replace("Input should be", "must be", 1)
    return f"{message}, not {_shortened(details['input'])}"


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
