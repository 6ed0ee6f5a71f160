"""Compiled models on disk: load one, run it, talk to it. Only `cuda` artifacts import torch.

An artifact is a directory:

| file | content |
|---|---|
| `manifest.json` | what the artifact is, with the sha256 of every other file |
| `model.onnx`, `model.onnx.data` | `cpu`, `onnx`: the graph and its weights, memory-mapped |
| `program.json`, `weights.safetensors` | `cuda`: the same |
| `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja` | as Hugging Face writes them |
| `generation_config.json` | the source model's own generation settings |
| `report.json` | timings and other facts of the compilation, not hashed |
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeGuard, overload

import numpy as np
import numpy.typing as npt

from qcompile.backends.cpu.runtime import CpuSession
from qcompile.backends.onnx.runtime import OnnxSession
from qcompile.errors import ArtifactError, RecipeError
from qcompile.generation import (
    CausalModel,
    Completion,
    Generation,
    GenerationKwargs,
    GenerationOptions,
    TextStream,
)
from qcompile.kernels import quantized_linear
from qcompile.kernels.cpu.layout import KERNEL_LAYOUT_VERSION
from qcompile.manifest import REPORT_NAME, Manifest, read_manifest, verify_files
from qcompile.text import TOKENIZER_NAME, Message, Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

TokenIds = Sequence[int] | npt.NDArray[np.integer[Any]]
Prompt = str | TokenIds | Sequence[Message]
"""A text, token ids ``[tokens]``, or the messages of a chat."""

Prompts = Prompt | Sequence[str] | Sequence[TokenIds] | Sequence[Sequence[Message]]
"""A prompt, or a batch of prompts of one kind."""

RUNNABLE_TARGETS = {
    "cpu": KERNEL_LAYOUT_VERSION,
    "cuda": quantized_linear.LAYOUT_VERSION,
    "onnx": None,
}
"""Targets that this package runs itself, and the layout of packed weights that it reads."""


class Session(CausalModel, Protocol):
    """A loaded model, as every runnable target has one; only language models generate."""

    def run(self, inputs: Mapping[str, npt.ArrayLike]) -> dict[str, npt.NDArray[Any]]:
        """As `Artifact.run`."""

    def forward(
        self,
        input_ids: npt.ArrayLike,
        attention_mask: npt.ArrayLike | None = None,
        position_ids: npt.ArrayLike | None = None,
        token_type_ids: npt.ArrayLike | None = None,
    ) -> npt.NDArray[np.float32]:
        """As `Artifact.forward`."""


def load(
    path: str | os.PathLike[str], *, verify: bool = True, threads: int | None = None
) -> Artifact:
    """Load a compiled model.

    Args:
        path: The artifact's directory.
        verify: Whether to compare the sha256 of every file; sizes are always compared.
        threads: Threads to run on the CPU with; by default one per physical core that may be
            used.

    Raises:
        ArtifactError: If it is no artifact, damaged, or made for something else.
    """
    directory = Path(path)
    manifest = read_manifest(directory)
    _check_runnable(directory, manifest)
    verify_files(directory, manifest, hashes=verify)
    return Artifact(directory, manifest, _open_session(directory, manifest, threads))


class Artifact:
    """A compiled model, ready to run; made by `load` and by `qcompile.compile`.

    Attributes:
        path: Its directory.
        manifest: What it is.
    """

    def __init__(self, path: Path, manifest: Manifest, session: Session) -> None:
        self.path = path
        self.manifest = manifest
        self._session = session

    def __repr__(self) -> str:
        model, target = self.manifest.model.name, self.manifest.target
        return f"Artifact({str(self.path)!r}, model={model!r}, target={target!r})"

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            ArtifactError: If the artifact has none, or it cannot be read.
        """
        return Tokenizer.load(self.path)

    @functools.cached_property
    def report(self) -> dict[str, Any]:
        """How the compilation went (seconds per phase and the like); empty if not recorded."""
        path = self.path / REPORT_NAME
        if not path.is_file():
            return {}
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ArtifactError(f"{path} cannot be read: {error}") from error
        return report if isinstance(report, dict) else {}

    def run(self, inputs: Mapping[str, npt.ArrayLike]) -> dict[str, npt.NDArray[Any]]:
        """Map the inputs of the signature to its outputs, both by name.

        Raises:
            RecipeError: If an input is missing, unknown, or of the wrong type or shape.
        """
        return self._session.run(inputs)

    def forward(
        self,
        input_ids: npt.ArrayLike,
        attention_mask: npt.ArrayLike | None = None,
        position_ids: npt.ArrayLike | None = None,
        token_type_ids: npt.ArrayLike | None = None,
    ) -> npt.NDArray[np.float32]:
        """Logits of a language model at every position.

        Args:
            input_ids: ``[batch, sequence]``.
            attention_mask: ``[batch, sequence]``, 0 at padding on either side; by default all 1.
            position_ids: ``[batch, sequence]``; by default each row counts its real tokens.
            token_type_ids: ``[batch, sequence]``, for models that take them; by default all 0.

        Returns:
            ``[batch, sequence, vocabulary]`` float32.

        Raises:
            RecipeError: If an argument does not fit the model.
        """
        return self._session.forward(input_ids, attention_mask, position_ids, token_type_ids)

    @overload
    def generate(
        self, prompt: str, *, stream: Literal[False] = ..., **options: Unpack[GenerationKwargs]
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: list[str],
        *,
        stream: Literal[False] = ...,
        **options: Unpack[GenerationKwargs],
    ) -> list[str]: ...

    @overload
    def generate(
        self, prompt: Prompt, *, stream: Literal[True], **options: Unpack[GenerationKwargs]
    ) -> TextStream: ...

    @overload
    def generate(
        self, prompt: Prompts, *, stream: bool = ..., **options: Unpack[GenerationKwargs]
    ) -> str | list[str] | TextStream: ...

    def generate(
        self, prompt: Prompts, *, stream: bool = False, **options: Unpack[GenerationKwargs]
    ) -> str | list[str] | TextStream:
        """Continue a prompt, or each prompt of a batch.

        Args:
            prompt: A text; token ids; the messages of a chat, ``[{"role": ..., "content": ...}]``;
                or a list of any of these.
            stream: Whether to return an iterator over pieces of the text as they come.
            **options: ``max_new_tokens=128``, ``temperature=0`` (the likeliest token), ``top_k``,
                ``top_p``, ``seed``, ``stop`` (a string or several), ``stop_token_ids``; see
                `qcompile.generation.GenerationOptions`.

        Returns:
            The new text; a list of texts for a batch; a `TextStream` when streaming.

        Raises:
            RecipeError: If the prompt or an option cannot be used.
            ArtifactError: If the artifact lacks a tokenizer or chat template that is needed.
        """
        if stream:
            if _is_batch(prompt):
                raise RecipeError(
                    "only one prompt can be streamed", remedy="pass one prompt, or stream=False"
                )
            return TextStream(self._start([prompt], options, self.tokenizer))
        generation = self._start(_batch(prompt), options, self.tokenizer)
        texts = [completion.text for completion in generation.completions]
        return texts if _is_batch(prompt) else texts[0]

    def stream(self, prompt: Prompt, **options: Unpack[GenerationKwargs]) -> TextStream:
        """`generate` with ``stream=True``: an iterator over pieces of the text."""
        return self.generate(prompt, stream=True, **options)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        template_variables: Mapping[str, Any] | None = None,
        **options: Unpack[GenerationKwargs],
    ) -> str:
        """The model's answer to a chat.

        Args:
            messages: The turns so far, ``{"role": "user", "content": "..."}``.
            template_variables: Variables of the chat template, such as ``enable_thinking``.
            **options: As in `generate`.
        """
        prompt = self.tokenizer.encode_chat(messages, **(template_variables or {}))
        return self._start([prompt], options, self.tokenizer).completions[0].text

    def complete(self, prompt: Prompts, **options: Unpack[GenerationKwargs]) -> list[Completion]:
        """Like `generate`, with the tokens and the reason of each text's end; always a list.

        An artifact without a tokenizer continues prompts that are token ids; their texts are
        empty.
        """
        has_tokenizer = (self.path / TOKENIZER_NAME).is_file()
        tokenizer = self.tokenizer if has_tokenizer else None
        return self._start(_batch(prompt), options, tokenizer).completions

    def _start(
        self, prompts: Sequence[Any], options: GenerationKwargs, tokenizer: Tokenizer | None
    ) -> Generation:
        return Generation(
            self._session,
            [self._tokens(prompt) for prompt in prompts],
            GenerationOptions(**options),
            special=self.manifest.generation,
            tokenizer=tokenizer,
        )

    def _tokens(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            tokens = self.tokenizer.encode(prompt)
        elif _is_chat(prompt):
            tokens = self.tokenizer.encode_chat(prompt)
        else:
            tokens = _token_ids(prompt)
        start = self.manifest.generation.bos_token_id
        return tokens if tokens or start is None else [start]


def _open_session(directory: Path, manifest: Manifest, threads: int | None) -> Session:
    if manifest.target == "cpu":
        return CpuSession(directory, manifest, threads=threads)
    if manifest.target == "onnx":
        return OnnxSession(directory, manifest, threads=threads)
    from qcompile.backends.cuda.runtime import CudaSession

    return CudaSession(directory, manifest)


def _check_runnable(directory: Path, manifest: Manifest) -> None:
    if manifest.target not in RUNNABLE_TARGETS:
        raise ArtifactError(
            f"{directory} was compiled for the target {manifest.target!r}; "
            f"this qcompile runs {', '.join(RUNNABLE_TARGETS)}",
            remedy="run it with its own runtime, or compile the model for one of these",
        )
    layout, readable = manifest.kernel_layout_version, RUNNABLE_TARGETS[manifest.target]
    if layout is not None and layout != readable:
        newer = readable is not None and layout > readable
        raise ArtifactError(
            f"the weights of {directory} have kernel layout {layout}; "
            f"the kernels of this qcompile read {readable or 'no such weights'}",
            remedy="upgrade qcompile" if newer else "compile the model again",
        )


def _is_chat(prompt: object) -> bool:
    return _is_sequence(prompt) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _is_batch(prompt: object) -> bool:
    """Whether this is a list of prompts: of texts, of token id sequences or of chats."""
    if isinstance(prompt, np.ndarray):
        return prompt.ndim == 2
    if not _is_sequence(prompt):
        return False
    return not prompt or isinstance(prompt[0], (str, np.ndarray)) or _is_sequence(prompt[0])


def _batch(prompt: Any) -> list[Any]:
    return list(prompt) if _is_batch(prompt) else [prompt]


def _is_sequence(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _token_ids(prompt: object) -> list[int]:
    array = np.asarray(prompt)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise RecipeError(
            f"a prompt is {type(prompt).__name__}",
            remedy="pass a text, a list of token ids, or a list of messages",
        )
    return [int(token) for token in array]
