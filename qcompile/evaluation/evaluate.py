"""One walk over a text that yields perplexity and, beside a reference, divergence."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qcompile.calibration.data import TokenArray, load_text, windows
from qcompile.errors import DataError, ModelError
from qcompile.evaluation.divergence import Divergence
from qcompile.evaluation.models import LogitsModel, as_logits_model, find_tokenizer, tokenize
from qcompile.evaluation.perplexity import Perplexity
from qcompile.progress import NullProgress, Progress

_ROWS = 128  # positions whose log-probabilities are held at a time


@dataclass(frozen=True)
class Evaluation:
    """Figures of a model on a text.

    Attributes:
        perplexity: exp(mean negative log-likelihood) over predicted tokens.
        kl: Mean KL(reference || model) per predicted token, in nats; None without a reference.
        top1_agreement: Fraction of predicted tokens that both rank first, 0 to 1; None without a
            reference.
        reference_perplexity: Perplexity of the reference; None without one.
        tokens: How many tokens were predicted.
        window: Tokens per window.
        seconds: Wall-clock time of both models together.
    """

    perplexity: float
    kl: float | None
    top1_agreement: float | None
    reference_perplexity: float | None
    tokens: int
    window: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


def evaluate(
    model: object,
    text: str | os.PathLike[str] | None = None,
    *,
    tokenizer: object | None = None,
    reference: object | None = None,
    window: int = 512,
    max_tokens: int = 16384,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> Evaluation:
    """Measures how well a model predicts a text, and how far it is from a reference.

    The text is cut into consecutive windows that are predicted independently: all tokens of a
    window but its first. Never more than one batch of logits per model is held.

    Args:
        model: Anything that `as_logits_model` takes.
        text: Path of a UTF-8 file; None is the standard library's help text.
        tokenizer: Of both models; that of `model` or `reference` unless given.
        reference: What to compare with, usually the float model.
        window: Tokens per window, at least 2.
        max_tokens: Use no more of the text than this.
        batch_size: Windows per forward pass.
        progress: Told of each window.

    Raises:
        DataError: The text cannot be used or is too short, or there is no tokenizer.
        ModelError: A model gives logits that are NaN or of the wrong shape; the message names
            the window.
    """
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}", remedy="use a batch size of 1 or more")
    tokens = tokenize(find_tokenizer(tokenizer, model, reference), load_text(text))
    rows = windows(tokens, window, max_tokens)
    measured = _Named(as_logits_model(model), "the model")
    compared = None if reference is None else _Named(as_logits_model(reference), "the reference")
    progress = progress or NullProgress()
    progress.stage("evaluate", len(rows))
    started = time.perf_counter()
    perplexity, reference_perplexity, divergence = Perplexity(), Perplexity(), Divergence()
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        wanted = None if compared is None else compared.logits(batch, start)
        found = measured.logits(batch, start)
        _require_same_vocabulary(found, wanted)
        for row, part in _blocks(batch):
            targets = torch.from_numpy(batch[row, part.start + 1 : part.stop + 1])
            predicted = _log_probabilities(found[row, part])
            perplexity.add(predicted, targets)
            if wanted is not None:
                expected = _log_probabilities(wanted[row, part])
                reference_perplexity.add(expected, targets)
                divergence.add(expected, predicted)
        progress.advance(len(batch))
    return Evaluation(
        perplexity=perplexity.value,
        kl=None if compared is None else divergence.kl,
        top1_agreement=None if compared is None else divergence.top1_agreement,
        reference_perplexity=None if compared is None else reference_perplexity.value,
        tokens=perplexity.positions,
        window=window,
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True)
class _Named:
    """A model whose logits are checked, with its name for messages."""

    model: LogitsModel
    name: str

    def logits(self, batch: TokenArray, first_window: int) -> Tensor:
        """[B, S, V] on the CPU, every row a distribution."""
        logits = torch.as_tensor(self.model.logits(batch)).cpu()
        if logits.ndim != 3 or tuple(logits.shape[:2]) != batch.shape:
            raise ModelError(
                f"{self.name} gives logits of shape {list(logits.shape)} for tokens of shape "
                f"{list(batch.shape)}",
                remedy="evaluation needs logits [batch, sequence, vocabulary] of all positions",
            )
        if batch.max() >= logits.shape[2]:
            raise ModelError(
                f"token {batch.max()} is outside of the vocabulary of {self.name}, "
                f"{logits.shape[2]}",
                remedy="use the tokenizer that belongs to the model",
            )
        for row in range(len(batch)):
            # The maximum is NaN if any logit is; it is infinite if no softmax exists.
            peaks = logits[row].amax(dim=-1)
            if not bool(peaks.isfinite().all()):
                position = int((~peaks.isfinite()).nonzero()[0])
                raise ModelError(
                    f"{self.name} gives logits that are no numbers (NaN or infinite) in window "
                    f"{first_window + row}, position {position}",
                    remedy="its weights or its arithmetic overflow: check the model in float32",
                )
        return logits


def _log_probabilities(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.to(torch.float32), dim=-1)


def _blocks(batch: TokenArray) -> Iterator[tuple[int, slice]]:
    """Rows of a batch and ranges of their positions that predict a token."""
    for row in range(len(batch)):
        for start in range(0, batch.shape[1] - 1, _ROWS):
            yield row, slice(start, min(start + _ROWS, batch.shape[1] - 1))


def _require_same_vocabulary(found: Tensor, wanted: Tensor | None) -> None:
    if wanted is not None and found.shape != wanted.shape:
        raise ModelError(
            f"the model has a vocabulary of {found.shape[2]}, the reference of {wanted.shape[2]}",
            remedy="compare models that share a tokenizer",
        )
