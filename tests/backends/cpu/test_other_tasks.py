"""Models that are no language models: images, sound, time series, encoders with decoders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import qcompile as qc

_TRANSFORMER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
_VISION = {**_TRANSFORMER, "image_size": 32, "patch_size": 8}
_STRIDES = {
    "conv_dim": [16, 16],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 8],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
_IMAGES = {"pixel_values": (2, 3, 32, 32)}
_SEQUENCES = {"input_ids": (2, 12), "decoder_input_ids": (2, 5)}


@dataclass(frozen=True)
class _Tiny:
    """A random model.

    Attributes:
        config: Name of the class of its configuration.
        model: Name of its class.
        options: Of the configuration.
        inputs: Shapes by name; names that end in ``ids`` are token ids.
    """

    config: str
    model: str
    options: Mapping[str, Any]
    inputs: Mapping[str, tuple[int, ...]]

    def build(self) -> torch.nn.Module:
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.options)
        model: torch.nn.Module = getattr(transformers, self.model)(config)
        return model.eval()

    def example(self) -> dict[str, Tensor]:
        torch.manual_seed(1)
        return {
            name: torch.randint(3, 60, shape) if name.endswith("ids") else torch.randn(shape)
            for name, shape in self.inputs.items()
        }


_MODELS = {
    # The table of positions tells ONNX Runtime a size that is a formula of the image's elsewhere.
    "dinov2": _Tiny("Dinov2Config", "Dinov2Model", {**_VISION, "mlp_ratio": 2}, _IMAGES),
    # Images as small as probes are by default leave no patch.
    "siglip": _Tiny("SiglipVisionConfig", "SiglipVisionModel", _VISION, _IMAGES),
    # Windows that are padded and shifted nest divisions in its sizes.
    "swin": _Tiny(
        "SwinConfig",
        "SwinForImageClassification",
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 4,
        },
        _IMAGES,
    ),
    "wav2vec2": _Tiny(
        "Wav2Vec2Config",
        "Wav2Vec2ForCTC",
        {**_TRANSFORMER, **_STRIDES, "vocab_size": 32},
        {"input_values": (2, 2000)},
    ),
    # A decoder has fewer queries than its encoder has states.
    "t5": _Tiny(
        "T5Config",
        "T5ForConditionalGeneration",
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4},
        _SEQUENCES,
    ),
    "bart": _Tiny(
        "BartConfig",
        "BartForConditionalGeneration",
        {
            "vocab_size": 64,
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 64,
        },
        _SEQUENCES,
    ),
    "patchtst": _Tiny(
        "PatchTSTConfig",
        "PatchTSTForPrediction",
        {
            "num_input_channels": 2,
            "context_length": 32,
            "patch_length": 4,
            "patch_stride": 4,
            "prediction_length": 8,
            "d_model": 32,
            "num_attention_heads": 4,
            "num_hidden_layers": 1,
            "ffn_dim": 48,
        },
        {"past_values": (2, 32, 2)},
    ),
}


@pytest.mark.parametrize("name", _MODELS)
def test_artifact_equals_model(name: str, tmp_path: Path) -> None:
    tiny = _MODELS[name]
    model, example = tiny.build(), tiny.example()
    with torch.no_grad():
        expected = model(**example)[0].numpy()
    artifact = qc.compile(model, "float", output=tmp_path / "out", example_inputs=example)
    found = artifact.run({name: value.numpy() for name, value in example.items()})["output_0"]
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


def test_inputs_without_names_are_refused_with_the_names(tmp_path: Path) -> None:
    model, example = torch.nn.Linear(8, 4), torch.randn(3, 8)
    artifact = qc.compile(model, "float", output=tmp_path / "out", example_inputs=example)
    with pytest.raises(qc.QCompileError, match="inputs are a ndarray") as caught:
        artifact.run(example.numpy())  # type: ignore[arg-type]  # the mistake
    assert "run({'input" in str(caught.value)
