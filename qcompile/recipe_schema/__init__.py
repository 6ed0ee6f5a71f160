"""What a recipe consists of: the classes that check it and that passes take their options from.

`values` are what options are made of, `quantization` and `transforms` the options of each step,
`recipes` the steps by name and their order.
"""

from qcompile.recipe_schema.quantization import (
    QuantizeActivations,
    QuantizeCache,
    QuantizeWeights,
    WeightOverride,
)
from qcompile.recipe_schema.recipes import (
    DATA_FREE_TRANSFORMS,
    STEPS,
    TRANSFORM_STEPS,
    Recipe,
    Step,
)
from qcompile.recipe_schema.values import FLOAT, StepOptions, is_mapping

__all__ = [
    "DATA_FREE_TRANSFORMS",
    "FLOAT",
    "STEPS",
    "TRANSFORM_STEPS",
    "QuantizeActivations",
    "QuantizeCache",
    "QuantizeWeights",
    "Recipe",
    "Step",
    "StepOptions",
    "WeightOverride",
    "is_mapping",
]
