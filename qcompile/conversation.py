"""Talking to an artifact on the command line: one answer, or turn by turn."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qcompile.artifact import Artifact
    from qcompile.generation import GenerationKwargs


def print_stream(pieces: Iterable[str]) -> None:
    """Prints pieces of a text as they come."""
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()


def completion_document(
    artifact: Artifact, prompt: str | list[dict[str, str]], options: GenerationKwargs
) -> dict[str, object]:
    """The answer to one prompt, with what ended it and the time it took, as JSON values."""
    started = time.perf_counter()
    completion = artifact.stream(prompt, **options).completion
    return {
        "prompt": prompt,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "new_tokens": len(completion.token_ids),
        "seconds": time.perf_counter() - started,
    }


def converse(artifact: Artifact, options: GenerationKwargs, *, as_chat: bool) -> None:
    """Answers what is typed, line by line, until the end of input; a chat remembers its turns."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() a history and editing

    print("Type a message; Ctrl-D ends, Ctrl-C stops an answer.", file=sys.stderr)
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        answer = artifact.stream(messages if as_chat else line, **options)
        said: list[str] = []
        try:
            print_stream(_kept(answer, said))
        except KeyboardInterrupt:
            print()
        messages.append({"role": "assistant", "content": "".join(said)})


def _kept(pieces: Iterable[str], kept: list[str]) -> Iterator[str]:
    """Passes pieces on and keeps them, so that they outlive an interruption."""
    for piece in pieces:
        kept.append(piece)
        yield piece
