"""The rows of the accuracy table: what each method is, and the format that it has in each setting.

A method takes its place in the table by one line of `ROWS`::

    "gptq": weights(SYMMETRIC, method="gptq", scale_search="mse", options={"act_order": True}),
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

FORMAT: Final = "{format}"
"""Stands for the name of the row's format in options of steps."""

Step = Mapping[str, Mapping[str, Any]]

SETTINGS: Final[Mapping[str, str]] = {
    "w4": "4 bit, one scale per row",
    "w4-g64": "4 bit, groups of 64",
    "w3-g64": "3 bit, groups of 64",
    "w2-g64": "2 bit, groups of 64",
}
"""The parts of the table, and what they mean for methods with integer codes."""

SYMMETRIC: Final = {"w4": "int4", "w4-g64": "int4-g64", "w3-g64": "int3-g64", "w2-g64": "int2-g64"}
ASYMMETRIC: Final = {setting: f"{format}-asym" for setting, format in SYMMETRIC.items()}
FLOAT_ZERO_POINTS: Final = {setting: f"{format}16" for setting, format in ASYMMETRIC.items()}
WEAK_COLUMNS: Final = {setting: f"{format}+0.77%fp16" for setting, format in ASYMMETRIC.items()}

# A column in 16 bit has to come from somewhere. In the bits of groups of 64 alone, columns and
# groups of 128 fit; what columns cost where there are no groups buys groups of 144, and what the
# places of SliM's columns cost buys groups of 56.
WEAK_COLUMNS_WITHIN: Final = {
    "w4-g64": "int4-g128-asym+0.77%fp16",
    "w3-g64": "int3-g128-asym+0.77%fp16",
    "w2-g64": "int2-g128-asym+0.77%fp16",
}
FINER: Final = {"w4": "int4-g144-asym", "w2-g64": "int2-g56-asym"}

HIGGS: Final = {
    "w4": "higgs2x256",
    "w4-g64": "higgs2x256-g64",
    "w3-g64": "higgs2x64-g64",
    "w2-g64": "higgs4x256-g64",
}
FP4: Final = {"w4": "fp4", "w4-g64": "fp4-g64"}
INTEGER_SCALES: Final = {
    setting: f"{format}-intscale" for setting, format in SYMMETRIC.items() if setting != "w4"
}


@dataclass(frozen=True)
class Row:
    """A method in the table.

    Attributes:
        formats: The format of linears in each setting that the row takes part in.
        steps: Those of its recipe; the embedding and lm_head stay float.
    """

    formats: Mapping[str, str]
    steps: tuple[Step, ...]

    def recipe(self, setting: str) -> dict[str, Any]:
        """The recipe of the row in a setting."""
        filled = [_fill(step, self.formats[setting]) for step in self.steps]
        return {"name": "accuracy", "steps": filled}


def weights(
    formats: Mapping[str, str],
    *,
    before: tuple[Step, ...] = (),
    after: tuple[Step, ...] = (),
    **options: Any,
) -> Row:
    """A row whose recipe is a step `quantize_weights`.

    Args:
        formats: Format by setting.
        before: Steps in front of it; `FORMAT` in their options is the row's format.
        after: Steps behind it.
        **options: Of `quantize_weights`.
    """
    step = {"format": FORMAT, "embedding": "float", "lm_head": "float", **options}
    return Row(formats, (*before, {"quantize_weights": step}, *after))


def _fill(value: Any, format: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _fill(item, format) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_fill(item, format) for item in value]
    return format if value == FORMAT else value


_GPTQ: Final[dict[str, Any]] = {
    "method": "gptq",
    "scale_search": "mse",
    "options": {"act_order": True},
}

_STEPS: Final = {"steps": 100, "batch": 2}
"""An eighth of the default: 12 minutes of one core for SmolLM2."""

ROWS: Final[Mapping[str, Row]] = {
    "rtn": weights(SYMMETRIC),
    "rtn-asym": weights(ASYMMETRIC),
    "rtn-mse": weights(SYMMETRIC, scale_search="mse"),
    "rtn-mse-asym": weights(ASYMMETRIC, scale_search="mse"),
    "hqq": weights(FLOAT_ZERO_POINTS, method="hqq"),
    "hqq-whole": weights(ASYMMETRIC, method="hqq"),
    "gptq": weights(SYMMETRIC, **_GPTQ),
    "gptq-asym": weights(ASYMMETRIC, **_GPTQ),
    "gptq-plain": weights(SYMMETRIC, method="gptq", options={"weigh_scales": False}),
    "gptq-intscale": weights(INTEGER_SCALES, **_GPTQ),
    "awq": weights(
        ASYMMETRIC,
        before=({"smooth": {"method": "awq", "weights": FORMAT, "activations": "float"}},),
        method="awq_clip",
    ),
    "magr": weights(SYMMETRIC, **{**_GPTQ, "method": "magr"}),
    "nf4": weights({"w4": "nf4", "w4-g64": "nf4-g64"}),
    "nf4-dq": weights({"w4-g64": "nf4-g64-dq"}),
    "nf4-gptq": weights({"w4": "nf4", "w4-g64": "nf4-g64"}, **_GPTQ),
    "higgs": weights(HIGGS, scale_search="mse"),
    "higgs-absmax": weights(HIGGS),
    "higgs-gptq": weights(HIGGS, method="gptq", scale_search="mse"),
    "fp4": weights(FP4, scale_search="mse"),
    "llm-fp4": weights(FP4, method="llm_fp4"),
    "rtn-budget": weights({"w3-g64": "int3-g64"}, scale_search="mse", target_bits=3.25),
    "gptq-budget": weights({"w3-g64": "int3-g64"}, target_bits=3.25, **_GPTQ),
    "mxfp4": weights({"w4-g64": "mxfp4"}, scale_search="mse"),
    "nvfp4": weights({"w4-g64": "nvfp4"}, scale_search="mse"),
    "owq": weights(WEAK_COLUMNS, **{**_GPTQ, "method": "owq"}),
    "owq-within": weights(WEAK_COLUMNS_WITHIN, **{**_GPTQ, "method": "owq"}),
    "gptq-asym-finer": weights(FINER, **_GPTQ),
    "quik": weights({"w4": "int4+6.25%fp16"}, **{**_GPTQ, "method": "quik"}),
    "adpq": weights(
        {"w4-g64": "int4-g128-asym/0.5%fp16", "w3-g64": "int3-g128-asym/0.5%fp16"},
        method="adpq",
        scale_search="mse",
    ),
    "mixed": weights(
        {"w3-g64": "(-1.5,-0.5,0.5,1.5)-g16-dq+10%nf4-g16-dq/0.4%fp16"},
        method="mixed",
        scale_search="mse",
    ),
    "slim": weights(
        {"w3-g64": "int3-g64-asym", "w2-g64": "int2-g64-asym"}, **{**_GPTQ, "method": "slim"}
    ),
    "signround": weights(SYMMETRIC, method="signround", scale_search="mse", options=_STEPS),
    "omniquant": weights(
        ASYMMETRIC,
        method="omniquant",
        scale_search="mse",
        options={**_STEPS, "clip_rate": 0.02, "scale_rate": 0.01},
    ),
}
"""Every row by name. What a paper compares is in one setting; bits are counted in each row."""
