"""Which format a recipe gives to which weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final, Literal, Protocol

from qcompile.errors import RecipeError
from qcompile.formats import Format, parse_format
from qcompile.formats.base import ScalarFormat
from qcompile.passes.quantize.layers import LayerWeight, Part

FLOAT: Final = "float"
"""The choice that leaves a weight as it is."""

Choice = Format | Literal["float"]


class Override(Protocol):
    """A recipe's exception: the weights that `match` matches get `format`, or stay float."""

    @property
    def match(self) -> str:
        """Pattern on names."""

    @property
    def format(self) -> str:
        """The name of a format, or ``"float"``."""


@dataclass(frozen=True)
class Decision:
    """What becomes of a weight.

    Attributes:
        format: Its format, or None if it stays float.
        reason: Why it stays float; empty otherwise.
    """

    format: Format | None
    reason: str = ""


@dataclass(frozen=True)
class FormatPolicy:
    """The formats of a recipe's step; see `QuantizeWeights` for the fields.

    Patterns are shell-style and match the name of a weight, with or without a final ``.weight``.
    """

    format: Format
    embedding: Choice | None = None
    lm_head: Choice | None = None
    ignore: tuple[str, ...] = ()
    overrides: tuple[tuple[str, Choice], ...] = ()

    @staticmethod
    def of(
        format: str | Format,
        *,
        embedding: str | Format | None = None,
        lm_head: str | Format | None = None,
        ignore: Iterable[str] = (),
        overrides: Iterable[Override | Mapping[str, str]] = (),
    ) -> FormatPolicy:
        """A policy from the words of a recipe.

        Raises:
            RecipeError: A format's name means nothing.
        """
        return FormatPolicy(
            parse_format(format) if isinstance(format, str) else format,
            None if embedding is None else _choice(embedding),
            None if lm_head is None else _choice(lm_head),
            tuple(ignore),
            tuple(_override(item) for item in overrides),
        )

    def decide(self, weight: LayerWeight) -> Decision:
        """The format of one weight; experts, stacked as they are, need one with a code per weight.

        `ignore` wins over `overrides` (of which the last match counts), and these over what the
        weight's part in the model says.

        Raises:
            RecipeError: A tied weight is given two formats.
        """
        decision = self._decide(weight)
        if Part.EXPERTS in weight.parts and not isinstance(decision.format, ScalarFormat | None):
            return Decision(None, f"format {decision.format} stores single matrices, no stacks")
        return decision

    def _decide(self, weight: LayerWeight) -> Decision:
        for pattern in self.ignore:
            if _matches(pattern, weight.name):
                return Decision(None, f"ignored by pattern '{pattern}'")
        for pattern, choice in reversed(self.overrides):
            if _matches(pattern, weight.name):
                return _decision(choice, f"float by pattern '{pattern}'")
        return self._by_part(weight)

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """Patterns that match none of the names, in the order of the recipe."""
        known = list(names)
        patterns = (*self.ignore, *(pattern for pattern, _ in self.overrides))
        return [p for p in patterns if not any(_matches(p, name) for name in known)]

    def _by_part(self, weight: LayerWeight) -> Decision:
        if weight.tied and Part.TOKEN_EMBEDDING in weight.parts:
            return self._tied(weight)
        if Part.TOKEN_EMBEDDING in weight.parts:
            return _decision(self.embedding or FLOAT, "the recipe keeps the embedding float")
        if Part.OTHER_EMBEDDING in weight.parts:
            return Decision(None, "embeddings of positions and types stay float")
        if Part.LM_HEAD in weight.parts:
            return _decision(self.lm_head or self.format, "the recipe keeps lm_head float")
        return Decision(self.format)

    def _tied(self, weight: LayerWeight) -> Decision:
        """One tensor takes one format: that of lm_head unless only the embedding's is given."""
        if self.embedding and self.lm_head and self.embedding != self.lm_head:
            raise RecipeError(
                f"'{weight.name}' is both embedding and lm_head, and the recipe gives it two "
                f"formats: {self.embedding} and {self.lm_head}",
                remedy="give embedding and lm_head the same format, or leave one of them out",
            )
        choice = self.embedding or self.lm_head or self.format
        return _decision(choice, "the recipe keeps embedding and lm_head float")


def matches_any(patterns: Iterable[str], name: str) -> bool:
    """Whether a weight's name, with or without a final ``.weight``, matches a pattern."""
    return any(_matches(pattern, name) for pattern in patterns)


def _matches(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.removesuffix(".weight"), pattern)


def _choice(value: str | Format) -> Choice:
    if isinstance(value, Format):
        return value
    return FLOAT if value == FLOAT else parse_format(value)


def _override(item: Override | Mapping[str, str]) -> tuple[str, Choice]:
    if isinstance(item, Mapping):
        return item["match"], _choice(item["format"])
    return item.match, _choice(item.format)


def _decision(choice: Choice, reason: str) -> Decision:
    return Decision(choice) if isinstance(choice, Format) else Decision(None, reason)
