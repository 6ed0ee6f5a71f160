"""Anything that predicts tokens, behind one method."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from qcompile.calibration.data import TokenArray
from qcompile.errors import DataError, ModelError
from qcompile.ir.interpreter import Interpreter
from qcompile.ir.program import Program
from qcompile.ir.types import Role


class LogitsModel(Protocol):
    """A model as evaluation sees it."""

    def logits(self, input_ids: TokenArray) -> Tensor | np.ndarray[Any, Any]:
        """Next-token logits of every position.

        Args:
            input_ids: [B, S] int64, without padding.

        Returns:
            [B, S, V], any float dtype.
        """
        ...


@runtime_checkable
class _ArtifactLike(Protocol):
    """What evaluation needs of a compiled artifact, which may not import torch."""

    def forward(self, input_ids: TokenArray) -> np.ndarray[Any, Any]: ...


@runtime_checkable
class _HasLogits(Protocol):
    def logits(self, input_ids: TokenArray) -> Tensor | np.ndarray[Any, Any]: ...


def as_logits_model(model: object) -> LogitsModel:
    """Wraps a model so that evaluation can run it.

    Args:
        model: A `LogitsModel`; a `Program`; a `torch.nn.Module` that takes `input_ids` first and
            returns logits, a tuple that begins with them, or an object with `.logits`
            (transformers); an `Artifact`.

    Raises:
        ModelError: It is none of these, or a program that does not map tokens to logits.
    """
    if isinstance(model, torch.nn.Module):
        return _ModuleLogits(model)
    if isinstance(model, Program):
        return _ProgramLogits(model)
    if isinstance(model, _HasLogits):
        return model
    if isinstance(model, _ArtifactLike):
        return _ArtifactLogits(model)
    raise ModelError(
        f"a {type(model).__name__} cannot be evaluated",
        remedy="give a Program, an Artifact, a torch.nn.Module, or an object with logits(ids)",
    )


def find_tokenizer(*candidates: object) -> object:
    """The first candidate that is a tokenizer or carries one as `.tokenizer`.

    Raises:
        DataError: There is none.
    """
    for candidate in candidates:
        for tokenizer in (candidate, getattr(candidate, "tokenizer", None)):
            if callable(getattr(tokenizer, "encode", None)):
                return tokenizer
    raise DataError(
        "no tokenizer: the model does not carry one", remedy="pass tokenizer= to evaluate"
    )


def tokenize(tokenizer: object, text: str) -> list[int]:
    """Token ids of a text, without the special tokens that would frame a prompt.

    Args:
        tokenizer: Of transformers, of the `tokenizers` package, or of an artifact: its
            `encode(text)` returns ids or an object with `.ids`.
        text: Any length.
    """
    encode: Callable[..., Any] = getattr(tokenizer, "encode")  # noqa: B009 - duck-typed
    options: dict[str, Any] = {}
    if _accepts(encode, "add_special_tokens"):
        options["add_special_tokens"] = False
    if hasattr(tokenizer, "model_max_length"):
        # transformers warns about texts longer than the model's context; windows are short.
        options["verbose"] = False
    encoded = encode(text, **options)
    ids: Sequence[int] = getattr(encoded, "ids", encoded)
    return list(ids)


class _ProgramLogits:
    """Interprets a program, keeping its weights between calls."""

    def __init__(self, program: Program) -> None:
        if not program.signature.has(Role.LOGITS) or not program.signature.has(Role.INPUT_IDS):
            raise ModelError(
                f"'{program.provenance.name}' does not map tokens to logits",
                remedy="evaluate a language model, or wrap this one in an object with logits(ids)",
            )
        self._program = program
        self._interpreter = Interpreter(program, cache={})

    def logits(self, input_ids: TokenArray) -> Tensor:
        bound = self._program.bind(torch.from_numpy(input_ids))
        outputs = self._interpreter.run(*bound)
        roles = [port.role for port in self._program.signature.outputs]
        return outputs[roles.index(Role.LOGITS)]


class _ModuleLogits:
    """Runs a module in evaluation mode, where its parameters are."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        # A cache that nobody reads would cost as much memory as the activations.
        self._options = {"use_cache": False} if _accepts(module.forward, "use_cache") else {}

    def logits(self, input_ids: TokenArray) -> Tensor:
        parameter = next(self._module.parameters(), None)
        ids = torch.from_numpy(input_ids).to("cpu" if parameter is None else parameter.device)
        training = [module for module in self._module.modules() if module.training]
        self._module.eval()
        try:
            with torch.inference_mode():
                output = self._module(ids, **self._options)
        finally:
            for module in training:
                module.training = True
        return _logits_of(output, type(self._module).__name__)


class _ArtifactLogits:
    def __init__(self, artifact: _ArtifactLike) -> None:
        self._artifact = artifact

    def logits(self, input_ids: TokenArray) -> np.ndarray[Any, Any]:
        return self._artifact.forward(input_ids)


def _logits_of(output: object, name: str) -> Tensor:
    logits = getattr(output, "logits", output)
    if isinstance(logits, (tuple, list)) and logits:
        logits = logits[0]
    if isinstance(logits, Tensor):
        return logits
    raise ModelError(
        f"{name} returns a {type(output).__name__}, in which there are no logits",
        remedy="return a tensor [batch, sequence, vocabulary], or an object with .logits",
    )


def _accepts(function: Callable[..., Any], name: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # built-in functions may have no signature
        return False
    return name in parameters
