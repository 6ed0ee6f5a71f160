"""Text generation: prefill, then one token at a time, for a batch of prompts.

Works on any `CausalModel`; what runs the model is a backend's affair.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol, TypedDict

import numpy as np
import numpy.typing as npt

from qcompile.errors import ArtifactError, RecipeError
from qcompile.manifest import GenerationInfo
from qcompile.text import IncrementalDecoder, StopMatcher, Tokenizer

_EXPECTED_TOKENS = 1024
"""The most new tokens that memory is reserved for before they come."""

FinishReason = Literal["stop", "length", "context"]
"""Why a text ended: a stop token or string; `max_new_tokens`; the model's longest context."""


class Decoder(Protocol):
    """A batch of texts inside a model, with its key/value cache."""

    def advance(
        self, input_ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64] | None = None
    ) -> npt.NDArray[np.float32]:
        """Append tokens to every row and return what may follow them.

        Args:
            input_ids: ``[batch, query]``.
            mask: ``[batch, query]``, 0 where a token is padding; None means no padding.

        Returns:
            Logits after the last token, ``[batch, vocabulary]``; valid until the next call.
        """


class CausalModel(Protocol):
    """What generation needs of a backend."""

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens that the logits are over."""

    @property
    def takes_padding(self) -> bool:
        """Whether rows of different lengths may share a batch."""

    def decoder(self, batch: int, capacity: int) -> Decoder:
        """An empty decoder for `batch` rows that are expected to hold `capacity` tokens."""


class GenerationKwargs(TypedDict, total=False):
    """`GenerationOptions` as keyword arguments."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]


@dataclasses.dataclass(frozen=True)
class GenerationOptions:
    """How to continue a prompt.

    Attributes:
        max_new_tokens: The most tokens to add.
        temperature: 0 takes the likeliest token; else logits are divided by it and sampled.
        top_k: Sample among this many likeliest tokens only.
        top_p: Then among the fewest likeliest tokens that hold this probability, in (0, 1].
        seed: Makes sampling repeatable. Every row of a batch draws from its own stream with this
            seed, so that a row does not depend on its neighbours.
        stop: Strings that end the text; they are not part of it.
        stop_token_ids: Token ids that end the text, besides the model's own.

    Raises:
        RecipeError: If a value is out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise _bad("max_new_tokens", self.max_new_tokens, "0 or more")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise _bad("temperature", self.temperature, "0 (the likeliest token) or more")
        if self.top_k is not None and self.top_k < 1:
            raise _bad("top_k", self.top_k, "1 or more, or None")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise _bad("top_p", self.top_p, "above 0 and at most 1, or None")
        if self.seed is not None and self.seed < 0:
            raise _bad("seed", self.seed, "0 or more, or None")
        if "" in self.stop_strings:
            raise RecipeError("a stop string is empty", remedy="leave it out")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, also when only one was given."""
        return (self.stop,) if isinstance(self.stop, str) and self.stop else tuple(self.stop)


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a model added to one prompt.

    Attributes:
        text: The new text, without the stop string or token that ended it; empty without a
            tokenizer.
        token_ids: All new tokens, the one that ended the text included.
        finish_reason: Why it ended.
        prompt_tokens: Number of tokens of the prompt.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int


class Generation(Iterator[tuple[int, str]]):
    """Continues a batch of prompts while it is iterated.

    Yields ``(row, piece)`` as text becomes certain; the pieces of a row join to its text. After
    the last one, `completions` holds the results.

    Args:
        model: Runs the tokens.
        prompts: Token ids of each prompt.
        options: How to continue them.
        special: The model's special tokens and limits.
        tokenizer: Makes text of tokens; without one only token ids are produced.

    Raises:
        RecipeError: If a prompt is empty, too long, or has tokens that the model does not know.
    """

    def __init__(
        self,
        model: CausalModel,
        prompts: Sequence[Sequence[int]],
        options: GenerationOptions,
        *,
        special: GenerationInfo,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        if options.stop_strings and tokenizer is None:
            raise RecipeError("stop strings need a tokenizer", remedy="pass stop_token_ids instead")
        for prompt in prompts:
            _check_prompt(prompt, model.vocabulary_size, special.max_context)
        self._model = model
        self._options = options
        self._special = special
        self._rows = [_Row(prompt, options, special, tokenizer) for prompt in prompts]
        self._pieces = self._run()

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return self

    def __next__(self) -> tuple[int, str]:
        return next(self._pieces)

    @property
    def completions(self) -> list[Completion]:
        """The result of each prompt, in order; runs what has not run yet."""
        for _ in self:
            pass
        return [row.completion() for row in self._rows]

    def _run(self) -> Iterator[tuple[int, str]]:
        rows = list(enumerate(self._rows))
        lengths = {len(row.prompt) for row in self._rows}
        if self._options.max_new_tokens == 0 or not rows:
            return
        if len(lengths) == 1 or self._model.takes_padding:
            yield from self._run_together(rows)
        else:
            for row in rows:
                yield from self._run_together([row])

    def _run_together(self, rows: list[tuple[int, _Row]]) -> Iterator[tuple[int, str]]:
        ids, mask = _left_pad([row.prompt for _, row in rows], self._special.pad_token_id or 0)
        expected = min(self._options.max_new_tokens, _EXPECTED_TOKENS)
        decoder = self._model.decoder(len(rows), ids.shape[1] + expected)
        # A mask only where there is padding: it is the common case, and cheaper.
        logits = decoder.advance(ids, None if mask.all() else mask)
        while True:
            for position, (index, row) in enumerate(rows):
                if row.finish_reason is None and (piece := row.accept(logits[position])):
                    yield index, piece
            running = [row.finish_reason is None for _, row in rows]
            if not any(running):
                return
            # Rows that have ended are fed their last token again, masked.
            ids = np.array([[row.token_ids[-1]] for _, row in rows], dtype=np.int64)
            mask = np.array(running, dtype=np.int64)[:, None]
            logits = decoder.advance(ids, None if all(running) else mask)


class TextStream(Iterator[str]):
    """The pieces of one text while it is generated; `completion` is the whole afterwards."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._generation)[1]

    @property
    def completion(self) -> Completion:
        """The whole text with its tokens and why it ended; runs what has not run yet."""
        return self._generation.completions[0]


class Sampler:
    """Chooses tokens from logits, as `GenerationOptions` says."""

    def __init__(self, options: GenerationOptions) -> None:
        self._options = options
        self._random = np.random.default_rng(options.seed)

    def __call__(self, logits: npt.NDArray[np.float32]) -> int:
        """A token id from ``[vocabulary]`` logits.

        Raises:
            ArtifactError: If the logits are not numbers to choose by.
        """
        # argmax returns the first NaN if there is one.
        best = int(np.argmax(logits))
        if not np.isfinite(logits[best]):
            raise ArtifactError(
                f"the model produced the logit {logits[best]} for token {best}",
                remedy="the artifact is damaged or its recipe unfit for the model: "
                "verify it, or compile with another recipe",
            )
        if self._options.temperature == 0:
            return best
        tokens, probabilities = self._candidates(logits)
        cumulative = np.cumsum(probabilities)
        # Rounding may leave the sum below a draw near 1.
        index = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(tokens[min(int(index), len(tokens) - 1)])

    def _candidates(
        self, logits: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Tokens that may be drawn, likeliest first where it matters, with their weights."""
        options = self._options
        tokens = np.arange(len(logits))
        if options.top_k is not None and options.top_k < len(logits):
            tokens = np.argpartition(logits, -options.top_k)[-options.top_k :]
        scores = logits[tokens].astype(np.float64)
        probabilities = np.exp((scores - scores.max()) / options.temperature)
        probabilities /= probabilities.sum()
        if options.top_p is not None and options.top_p < 1:
            order = np.argsort(-probabilities, kind="stable")
            tokens, probabilities = tokens[order], probabilities[order]
            count = int(np.searchsorted(np.cumsum(probabilities), options.top_p)) + 1
            tokens, probabilities = tokens[:count], probabilities[:count]
        return tokens, probabilities


class _Row:
    """One prompt of a batch and what has been added to it."""

    def __init__(
        self,
        prompt: Sequence[int],
        options: GenerationOptions,
        special: GenerationInfo,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.prompt = prompt
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._text: list[str] = []
        self._sample = Sampler(options)
        self._stop_ids = {*special.eos_token_ids, *options.stop_token_ids}
        self._max_new_tokens = options.max_new_tokens
        self._max_context = special.max_context
        self._decoder = None if tokenizer is None else IncrementalDecoder(tokenizer, prompt)
        self._matcher = StopMatcher(options.stop_strings)

    def accept(self, logits: npt.NDArray[np.float32]) -> str:
        """Choose the next token; the text that it makes certain."""
        token = self._sample(logits)
        self.token_ids.append(token)
        piece = ""
        if token in self._stop_ids:
            self.finish_reason = "stop"
        elif self._decoder is not None:
            piece = self._matcher.push(self._decoder.push(token))
        if self.finish_reason is None:
            self.finish_reason = self._reached_limit()
        if self.finish_reason is not None:
            piece += self._flush()
        self._text.append(piece)
        return piece

    def completion(self) -> Completion:
        return Completion(
            text="".join(self._text),
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason or "length",
            prompt_tokens=len(self.prompt),
        )

    def _reached_limit(self) -> FinishReason | None:
        if self._matcher.matched is not None:
            return "stop"
        if len(self.token_ids) >= self._max_new_tokens:
            return "length"
        length = len(self.prompt) + len(self.token_ids)
        if self._max_context is not None and length > self._max_context:
            return "context"
        return None

    def _flush(self) -> str:
        """The text that was kept back, now that nothing follows."""
        if self._decoder is None:
            return ""
        piece = self._matcher.push(self._decoder.flush()) + self._matcher.flush()
        if self._matcher.matched is not None:
            self.finish_reason = "stop"
        return piece


def _left_pad(
    prompts: Sequence[Sequence[int]], pad: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Prompts as ``[batch, longest]`` ids that end together, and the mask of real tokens."""
    longest = max(len(prompt) for prompt in prompts)
    ids = np.full((len(prompts), longest), pad, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def _check_prompt(prompt: Sequence[int], vocabulary_size: int, max_context: int | None) -> None:
    if not prompt:
        raise RecipeError(
            "a prompt has no tokens, and the model has no token that starts a text",
            remedy="pass a prompt that is not empty",
        )
    unknown = next((token for token in prompt if not 0 <= token < vocabulary_size), None)
    if unknown is not None:
        raise RecipeError(
            f"a prompt has the token id {unknown}; the model knows 0 to {vocabulary_size - 1}",
            remedy="use the tokenizer of this model",
        )
    if max_context is not None and len(prompt) > max_context:
        raise RecipeError(
            f"a prompt has {len(prompt)} tokens; the model was made for at most {max_context}",
            remedy="shorten the prompt",
        )


def _bad(name: str, value: object, expected: str) -> RecipeError:
    return RecipeError(f"{name} is {value}", remedy=f"it must be {expected}")
