"""A loaded model, whatever runs it, and the checks of what callers pass to it; needs no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from qcompile.backends.decoding import Decoder, FloatArray, TokenBatch
from qcompile.errors import RecipeError
from qcompile.manifest import Manifest, Role, Signature, ValueInfo


class ModelSession(ABC):
    """A loaded model.

    Args:
        manifest: The manifest of its artifact.

    Attributes:
        input_errors: What `_run` raises for inputs that it cannot take together.
    """

    input_errors: ClassVar[tuple[type[Exception], ...]] = ()

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._signature = manifest.signature
        self._has_cache = bool(manifest.signature.cache_pairs())

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens that the logits of a language model are over."""
        return vocabulary_size(self._signature)

    @property
    def takes_padding(self) -> bool:
        """Whether padding can be masked, so that rows of different lengths share a batch."""
        return self._signature.input("attention_mask") is not None

    def run(self, inputs: Mapping[str, npt.ArrayLike]) -> dict[str, npt.NDArray[Any]]:
        """Map inputs to outputs, both by name.

        Args:
            inputs: One array for every input of the signature.

        Raises:
            RecipeError: If an input is missing, unknown, or of the wrong type or shape.
        """
        arrays = check_inputs(inputs, self._signature)
        try:
            return self._run(arrays)
        except self.input_errors as error:
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
            raise RecipeError(f"the model cannot run the inputs {shapes}: {error}") from error

    def forward(
        self,
        input_ids: npt.ArrayLike,
        attention_mask: npt.ArrayLike | None = None,
        position_ids: npt.ArrayLike | None = None,
        token_type_ids: npt.ArrayLike | None = None,
    ) -> FloatArray:
        """Logits at every position, ``[batch, sequence, vocabulary]``, without any past.

        Args:
            input_ids: ``[batch, sequence]``.
            attention_mask: ``[batch, sequence]``, 0 at padding on either side.
            position_ids: ``[batch, sequence]``; by default they count the real tokens.
            token_type_ids: ``[batch, sequence]``, for models that take them; by default 0.

        Raises:
            RecipeError: If an argument does not fit the model.
        """
        if self._signature.output("logits") is None:
            raise RecipeError("this model has no logits", remedy="use run(inputs)")
        ids = check_token_ids(input_ids, self._manifest)
        tokens = TokenBatch(
            ids,
            check_like_ids(ids, "attention_mask", attention_mask, self._signature),
            check_like_ids(ids, "position_ids", position_ids, self._signature),
            check_like_ids(ids, "token_type_ids", token_type_ids, self._signature),
        )
        return self._decoder(*ids.shape).read(tokens)

    def decoder(self, batch: int, capacity: int) -> Decoder:
        """An empty decoder for `batch` rows that are expected to hold `capacity` tokens.

        A causal model without cache inputs is run over its whole text for every token.

        Raises:
            RecipeError: If the model does not generate, or takes another number of rows.
        """
        if self._manifest.task != "causal_lm":
            raise RecipeError(
                "this artifact holds no causal language model: it cannot generate",
                remedy="use forward() or run(inputs)",
            )
        _check_rows(batch, self._signature)
        return self._decoder(batch, capacity)

    @abstractmethod
    def _run(self, arrays: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Outputs by name, from inputs that were checked."""

    @abstractmethod
    def _decoder(self, batch: int, capacity: int) -> Decoder:
        """An empty decoder of a model with logits."""


def check_inputs(
    inputs: Mapping[str, npt.ArrayLike], signature: Signature
) -> dict[str, npt.NDArray[Any]]:
    """Arrays for every input of a signature, in its order and of its types.

    Raises:
        RecipeError: If an input is missing, unknown, or of the wrong type or shape.
    """
    declared = {value.name: value for value in signature.inputs}
    if not isinstance(inputs, Mapping):
        raise RecipeError(
            f"inputs are a {type(inputs).__name__}",
            remedy="pass arrays by name: run({" + ", ".join(f"{n!r}: ..." for n in declared) + "})",
        )
    if inputs.keys() != declared.keys():
        name = sorted(inputs.keys() ^ declared.keys())[0]
        problem = "is missing" if name in declared else "is not one of the model's"
        raise RecipeError(
            f"the input {name!r} {problem}", remedy=f"pass exactly: {', '.join(declared)}"
        )
    return {name: _as_declared(inputs[name], value) for name, value in declared.items()}


def check_token_ids(input_ids: npt.ArrayLike, manifest: Manifest) -> npt.NDArray[np.int64]:
    """Token ids ``[batch, sequence]`` that a model knows.

    Raises:
        RecipeError: If they are of another shape or type, unknown, or too many.
    """
    ids = np.asarray(input_ids)
    if ids.ndim != 2 or 0 in ids.shape or ids.dtype.kind not in "iu":
        raise RecipeError(
            f"input_ids is {ids.dtype} {list(ids.shape)}",
            remedy="pass integers [batch, sequence], at least one",
        )
    known = vocabulary_size(manifest.signature)
    limit = known if manifest.task == "causal_lm" else int(ids.max()) + 1
    if ids.min() < 0 or ids.max() >= limit:
        culprit = int(ids.min() if ids.min() < 0 else ids.max())
        raise RecipeError(
            f"input_ids holds the token id {culprit}; the model knows 0 to {limit - 1}",
            remedy="use the tokenizer of this model",
        )
    longest = manifest.generation.max_context
    if longest is not None and ids.shape[1] > longest:
        raise RecipeError(
            f"input_ids has {ids.shape[1]} tokens a row; the model was made for {longest}",
            remedy="pass shorter rows",
        )
    _check_rows(len(ids), manifest.signature)
    _check_length(ids.shape[1], manifest.signature)
    return ids.astype(np.int64, copy=False)


def check_like_ids(
    ids: npt.NDArray[np.int64], role: Role, given: npt.ArrayLike | None, signature: Signature
) -> npt.NDArray[np.int64] | None:
    """An optional input of the shape of the token ids.

    Raises:
        RecipeError: If it has another shape or type, or the model has no use for it.
    """
    if given is None:
        return None
    array = np.asarray(given)
    if array.shape != ids.shape or array.dtype.kind not in "iub":
        raise RecipeError(
            f"{role} is {array.dtype} {list(array.shape)}",
            remedy=f"pass integers of the shape of input_ids, {list(ids.shape)}",
        )
    needed = not array.all() if role == "attention_mask" else True
    if needed and signature.input(role) is None:
        raise RecipeError(f"this model takes no {role}", remedy="leave it out")
    return array.astype(np.int64, copy=False)


def _check_rows(batch: int, signature: Signature) -> None:
    """Models may be compiled for a fixed number of rows."""
    ids = signature.input("input_ids")
    rows = batch if ids is None else ids.shape[0]
    if isinstance(rows, int) and rows != batch:
        raise RecipeError(
            f"this model was compiled for {rows} row(s) at a time, not {batch}",
            remedy=f"pass {rows}, or compile it with another batch",
        )


def _check_length(length: int, signature: Signature) -> None:
    """Models may be compiled for a fixed length; with a cache they are fed in parts."""
    ids = signature.input("input_ids")
    fixed = length if ids is None or signature.cache_pairs() else ids.shape[1]
    if isinstance(fixed, int) and fixed != length:
        raise RecipeError(
            f"this model was compiled for rows of {fixed} tokens, not {length}",
            remedy="pad the rows and pass an attention_mask, or compile it with another query",
        )


def vocabulary_size(signature: Signature) -> int:
    """Number of tokens that the logits are over; 0 without logits."""
    logits = signature.output("logits")
    size = logits.shape[-1] if logits is not None else 0
    return size if isinstance(size, int) else 0


def _as_declared(given: npt.ArrayLike, value: ValueInfo) -> npt.NDArray[Any]:
    array = np.asarray(given)
    # Widening and, for convenience, Python's own floats and ints; never float to int.
    fits_type = np.can_cast(array.dtype, value.dtype, casting="same_kind")
    fits_shape = len(array.shape) == len(value.shape) and all(
        isinstance(said, str) or size == said
        for size, said in zip(array.shape, value.shape, strict=True)
    )
    if not (fits_type and fits_shape):
        raise RecipeError(
            f"the input {value.name!r} is {array.dtype} {list(array.shape)}",
            remedy=f"pass {value.dtype} {list(value.shape)}",
        )
    return np.ascontiguousarray(array, dtype=value.dtype)
