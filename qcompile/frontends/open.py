"""Models by what a user types: a directory, a GGUF file, or a hub id."""

from __future__ import annotations

import json
import os
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from qcompile.errors import ModelError
from qcompile.frontends.config import import_transformers
from qcompile.frontends.gguf import GgufModel
from qcompile.frontends.huggingface import (
    ASSETS,
    build_shell,
    capture_directory,
    capture_shell,
)
from qcompile.ir.program import Program
from qcompile.ir.weights import TensorSpec

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
"""What is fetched of a hub repository: never pickles."""


def capture_path(model: str | os.PathLike[str], *, dequantize: bool = False) -> Program:
    """Captures a model from disk or from the hub.

    Args:
        model: A Hugging Face model directory, a ``.gguf`` file, or a hub id ``owner/name``.
        dequantize: Whether an already quantized checkpoint may be read as floats. (A GGUF file is
            always read: its blocks are the model.)

    Raises:
        ModelError: If it does not exist, cannot be fetched, or cannot be read.
    """
    text = os.fspath(model)
    path = Path(text).expanduser()
    if path.is_dir() and text:
        return capture_directory(path, dequantize=dequantize)
    if path.is_file() or path.suffix == ".gguf":
        return capture_gguf(path)
    if _HUB_ID.fullmatch(text):
        return capture_directory(_download(text), dequantize=dequantize)
    raise ModelError(
        f"there is no model at '{text}'",
        remedy="pass a Hugging Face model directory, a .gguf file, or a hub id (owner/name)",
    )


def capture_gguf(path: Path) -> Program:
    """Captures the model in a GGUF file; its blocks are decoded to floats as they are read.

    Raises:
        ModelError: If the file is damaged, or its architecture or block formats are unknown.
    """
    model = GgufModel(path)
    shell = build_shell(model.config())
    expected = {
        name: TensorSpec(tuple(tensor.shape), tensor.dtype)
        for name, tensor in shell.model.state_dict(keep_vars=True).items()
    }
    source = model.source(expected)
    program = capture_shell(shell, source, name=path.stem, assets=_gguf_assets(model))
    program.provenance = replace(program.provenance, stored_bytes=model.stored_bytes)
    return program


def _gguf_assets(model: GgufModel) -> dict[str, bytes]:
    """The tokenizer and the generation settings, as Hugging Face would have saved them."""
    tokenizer = model.tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        assets = {
            name: (Path(folder) / name).read_bytes()
            for name in ASSETS
            if (Path(folder) / name).is_file()
        }
    settings: dict[str, Any] = {
        key: getattr(tokenizer, key, None)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    assets["generation_config.json"] = json.dumps(settings, indent=2).encode()
    assets["config.json"] = model.config().to_json_string().encode()
    return assets


def _download(name: str) -> Path:
    import_transformers()
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    failures = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError)
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except failures as error:
        raise ModelError(
            f"'{name}' is no directory here, and cannot be fetched from the hub: "
            f"{str(error).splitlines()[0]}",
            remedy="check the name and the network, or pass a directory",
        ) from error
