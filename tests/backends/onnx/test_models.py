"""Whole models, emitted and run, against torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompile.frontends.huggingface import capture_model
from qcompile.passes.canonicalize import canonicalize_phase
from qcompile.passes.infra import PassManager
from qcompile.passes.raise_ops import raise_phase


class Logits(nn.Module):
    """The first result of a transformers model as a plain tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[0]


class TokenLogits(Logits):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.Hardswish()
        )
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.SiLU(), nn.Conv2d(4, 8, 1), nn.Sigmoid()
        )
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(8, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        x = x + self.depthwise(x)
        x = self.pool(x * self.squeeze(x))
        return self.head(x.mean((2, 3)))


class Routed(nn.Module):
    """A mixture of experts that computes all and mixes by weight."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4)
        self.up = nn.Parameter(torch.randn(4, 8, 16) * 0.3)
        self.down = nn.Parameter(torch.randn(4, 16, 8) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2)
        weights = weights / weights.sum(-1, keepdim=True)
        dense = torch.zeros(*x.shape[:-1], 4).scatter(-1, chosen, weights)
        hidden = torch.relu(torch.einsum("bsd,edf->bsef", x, self.up))
        return torch.einsum("bsef,efd,bse->bsd", hidden, self.down, dense)


def tokens(n: int) -> tuple[Tensor, ...]:
    """Ids ``[3, n]``, the second row padded on the right."""
    mask = torch.ones(3, n, dtype=torch.int64)
    mask[1, n - 2 :] = 0
    return torch.randint(0, 50, (3, n)), mask


_SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 50,
}


def test_bert_equals_torch(onnx: Any) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(**_SMALL, attn_implementation="eager")
    torch.manual_seed(0)
    onnx.check(TokenLogits(transformers.BertModel(config)), tokens, atol=1e-5)


def test_gpt2_equals_torch(onnx: Any) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, use_cache=False)
    torch.manual_seed(0)
    onnx.check(TokenLogits(transformers.GPT2LMHeadModel(config)), tokens, atol=1e-5)


def test_vit_equals_torch(onnx: Any) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {key: value for key, value in _SMALL.items() if key != "vocab_size"}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=4)
    torch.manual_seed(0)
    model = Logits(transformers.ViTModel(config, add_pooling_layer=False))
    onnx.check(model, lambda n: (torch.randn(n, 3, 16, 16),), atol=1e-5)


def test_conv_net_equals_torch(onnx: Any) -> None:
    torch.manual_seed(0)
    onnx.check(ConvNet(), lambda n: (torch.randn(2, 3, 4 * n, 4 * n + 4),), atol=1e-5)


def test_routed_experts_equal_torch(onnx: Any) -> None:
    torch.manual_seed(0)
    onnx.check(Routed(), lambda n: (torch.randn(2, n, 8),), atol=1e-5)


def test_transformer_encoder_layer_equals_torch(onnx: Any) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    onnx.check(layer, lambda n: (torch.randn(2, n, 16),), atol=1e-5)


def test_program_that_is_not_canonical_equals_torch(onnx: Any) -> None:
    """What the trace leaves behind (assertions, aliases, casts to the same type) is harmless."""
    transformers = pytest.importorskip("transformers")
    sizes = {**_SMALL, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=1, use_cache=False)
    torch.manual_seed(0)
    model = TokenLogits(transformers.LlamaForCausalLM(config))
    onnx.check(model, tokens, atol=1e-5, canonical=False)


@pytest.mark.parametrize("raised", [False, True])
def test_decoder_with_cache_equals_program(onnx: Any, raised: bool) -> None:
    """Prefill from an empty cache with left padding, then one step: the same model file."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**_SMALL, num_key_value_heads=1)
    torch.manual_seed(0)
    phases = [canonicalize_phase(), *([raise_phase()] if raised else [])]
    program, _ = PassManager(phases).run(capture_model(transformers.LlamaForCausalLM(config)))
    session = onnx.session(program)
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, :2] = 0
    cache: tuple[Tensor, ...] | None = None
    for seen, length in ((0, 5), (5, 1)):
        ids = torch.randint(0, 50, (2, length))
        inputs = program.bind(ids, mask[:, : seen + length], past_key_values=cache)
        expected = program(ids, mask[:, : seen + length], past_key_values=cache)
        found = [torch.from_numpy(value) for value in onnx.run(session, *inputs)]
        valid = mask[:, seen : seen + length].bool()
        torch.testing.assert_close(found[0][valid], expected[0][valid], rtol=1e-5, atol=1e-5)
        cache = tuple(expected[1:])
