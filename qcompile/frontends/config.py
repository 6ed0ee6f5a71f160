"""A model directory's ``config.json``: checked first, then read by transformers."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompile.errors import MissingExtraError, ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONFIG_NAME = "config.json"

_MAX_CONFIG_BYTES = 16 << 20
_LAYER_COUNTS = frozenset(
    {
        "num_hidden_layers",
        "num_layers",
        "n_layer",
        "n_layers",
        "encoder_layers",
        "decoder_layers",
        "num_decoder_layers",
        "num_nextn_predict_layers",
    }
)
"""What models call the number of their layers; each layer has tensors of its own."""


def load_config(path: Path, tensors: int) -> PretrainedConfig:
    """Reads ``config.json`` with transformers.

    Args:
        path: The model directory.
        tensors: How many the checkpoint holds. More layers than that are refused before
            transformers begins to build them.

    Raises:
        MissingExtraError: If transformers is not installed.
        ModelError: If there is no config, it is damaged, or its model type is unknown.
    """
    transformers = import_transformers()
    check_config_file(path)
    for name, layers in _layer_counts(_read_object(path / CONFIG_NAME)):
        if layers > tensors:
            raise ModelError(
                f"'{path / CONFIG_NAME}' claims {layers} layers ({name}), the checkpoint has "
                f"{tensors} tensors",
                remedy="fetch the model again: config and weights do not belong together",
            )
    try:
        config: PretrainedConfig = transformers.AutoConfig.from_pretrained(path)
    except library_failures() as error:
        raise ModelError(f"'{path / CONFIG_NAME}' cannot be used: {error}") from error
    return config


def check_config_file(path: Path) -> None:
    """Refuses a directory without ``config.json``.

    Raises:
        ModelError: If there is none.
    """
    if not (path / CONFIG_NAME).is_file():
        raise ModelError(
            f"'{path}' has no {CONFIG_NAME}",
            remedy="pass a Hugging Face model directory, a hub id, or a .gguf file",
        )


def import_transformers() -> Any:
    """The transformers package.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            "transformers", extra="hf", purpose="read Hugging Face models"
        ) from error
    return transformers


def library_failures() -> tuple[type[Exception], ...]:
    """What transformers and gguf raise on a configuration that they do not expect."""
    from huggingface_hub.errors import StrictDataclassError

    return (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        AssertionError,
        OSError,
        RuntimeError,
        ImportError,
        struct.error,
        StrictDataclassError,
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ModelError(f"'{path}' has {path.stat().st_size} bytes, too many for a config")
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"'{path}' cannot be used: {error}") from error
    if not isinstance(document, dict):
        raise ModelError(f"'{path}' cannot be used: it is no JSON object")
    return document


def _layer_counts(config: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """The numbers of layers in a config and in the configs inside it, such as ``text_config``."""
    for name, value in config.items():
        if name in _LAYER_COUNTS and isinstance(value, int):
            yield name, value
        if isinstance(value, dict):
            yield from _layer_counts(value)
