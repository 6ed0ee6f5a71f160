"""Text, tokens and windows: what models are calibrated and measured on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qcompile.errors import DataError

TokenArray = npt.NDArray[np.int64]


def load_text(path: str | os.PathLike[str] | None = None) -> str:
    """A text file, or the text that every Python carries.

    Args:
        path: A UTF-8 file; None reads the help topics of the standard library
            (`pydoc_data.topics`): some 450,000 characters of technical English, in the order of
            their names. They differ between Python versions, so compare figures within one.

    Raises:
        DataError: The file is missing, unreadable, binary, not UTF-8, or without text.
    """
    return _embedded_text() if path is None else _read_text(Path(path))


def windows(tokens: Sequence[int] | TokenArray, window: int, max_tokens: int) -> TokenArray:
    """Cuts tokens into consecutive windows of equal length; the rest is left out.

    Args:
        tokens: Token ids, in reading order.
        window: Tokens per window, at least 2 (a token that predicts and one that is predicted).
        max_tokens: Use no more than this many tokens, from the start.

    Returns:
        int64 [n, window], n >= 1.

    Raises:
        DataError: There are too few tokens for one window; the message says how many it takes.
    """
    if window < 2:
        raise DataError(
            f"a window of {window} tokens predicts nothing", remedy="use a window of 2 or more"
        )
    if max_tokens < window:
        raise DataError(
            f"max_tokens is {max_tokens}, less than one window of {window} tokens",
            remedy=f"use max_tokens of at least {window}, or a shorter window",
        )
    array = np.asarray(tokens, dtype=np.int64)
    if array.size < window:
        raise DataError(
            f"the text is too short: it has {array.size} tokens, one window takes {window}",
            remedy="use a longer text, or a shorter window"
            + (f" (up to {array.size})" if array.size >= 2 else ""),
        )
    count = min(array.size, max_tokens) // window
    return array[: count * window].reshape(count, window)


def _embedded_text() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"text file '{path}' does not exist") from error
    except OSError as error:
        raise DataError(f"text file '{path}' cannot be read: {error.strerror}") from error
    remedy = "give a plain text file in UTF-8"
    if b"\0" in data:
        raise DataError(f"'{path}' is not a text file: it contains null bytes", remedy=remedy)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"'{path}' is not UTF-8 text: byte {error.start} cannot be decoded", remedy=remedy
        ) from error
    if not text.strip():
        raise DataError(f"text file '{path}' is empty", remedy=remedy)
    return text
