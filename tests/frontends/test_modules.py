"""Plain modules become programs that compute the same, on other batches too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from qcompile.errors import ModelError
from qcompile.frontends.torch_export import capture_module
from qcompile.ir.program import Program
from qcompile.passes.canonicalize import canonicalize
from qcompile.passes.raise_ops import raise_program

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}  # float32, a few layers


def raised(model: nn.Module, example: Any) -> Program:
    program = raise_program(canonicalize(capture_module(model, example)))
    program.verify(shapes=True)
    return program


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 24)
        self.norm = nn.LayerNorm(24)
        self.down = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(nn.functional.gelu(self.up(x))))


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, stride=2, groups=2)
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(image)))
        x = nn.functional.max_pool2d(torch.relu(self.second(x)), 2)
        return self.head(x.mean((2, 3)))


class Keywords(nn.Module):
    """Keyword inputs, a mask, integers, a buffer, and a dict of results."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 6)
        self.register_buffer("offset", torch.arange(6.0))

    def forward(self, *, ids: Tensor, keep: Tensor) -> dict[str, Any]:
        x = self.table(ids) + self.offset
        x = x.masked_fill(~keep.unsqueeze(-1), 0.0)
        return {"sum": x.sum(1), "parts": (x, keep.sum())}


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y[:, 0] = 0
        y.add_(1)
        return y.relu_()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


class DependsOnData(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


@pytest.mark.parametrize("examples", [1, 2, 5])
def test_perceptron_takes_any_batch(examples: int) -> None:
    model = Perceptron().eval()
    program = raised(model, torch.randn(examples, 12))

    assert [n.target for n in program.calls(torch.ops.qc.layer_norm.default)]
    for batch in (1, 3):
        x = torch.randn(batch, 12)
        torch.testing.assert_close(program(x), model(x), **TOLERANCE)


@pytest.mark.parametrize("examples", [1, 2])
def test_convolutional_net_takes_any_batch(examples: int) -> None:
    model = Convolutional().eval()
    model.norm.running_mean.normal_()
    program = raised(model, (torch.randn(examples, 3, 12, 12),))

    for batch in (1, 4):
        x = torch.randn(batch, 3, 12, 12)
        torch.testing.assert_close(program(x), model(x), **TOLERANCE)


@pytest.mark.parametrize("name", ["ViT", "Dinov2"])
def test_vision_transformer_is_raised(name: str) -> None:
    config = getattr(transformers, f"{name}Config")(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    model = getattr(transformers, f"{name}Model")(config).eval()
    program = raised(model, {"pixel_values": torch.randn(1, 3, 16, 16)})

    assert len(list(program.calls(torch.ops.qc.attention.default))) == 2
    images = torch.randn(3, 3, 16, 16)
    found = program(pixel_values=images).last_hidden_state
    expected = model(pixel_values=images).last_hidden_state
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_torch_encoder_layer_equals_module() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    program = raised(model, torch.randn(2, 5, 16))

    x = torch.randn(3, 7, 16)
    torch.testing.assert_close(program(x), model(x), **TOLERANCE)


def test_keywords_and_nested_results_keep_their_structure() -> None:
    model = Keywords().eval()
    ids, keep = torch.randint(10, (2, 4)), torch.tensor([[True] * 4, [True, False] * 2])
    program = raised(model, {"ids": ids, "keep": keep})

    found, expected = program(ids=ids[:1], keep=keep[:1]), model(ids=ids[:1], keep=keep[:1])
    assert set(found) == {"sum", "parts"}
    torch.testing.assert_close(found["sum"], expected["sum"], **TOLERANCE)
    torch.testing.assert_close(found["parts"], expected["parts"], **TOLERANCE)


def test_writes_in_place_become_functional() -> None:
    program = raised(InPlace(), torch.randn(2, 3))

    x = torch.randn(4, 3)
    before = x.clone()
    torch.testing.assert_close(program(x), InPlace()(x), **TOLERANCE)
    torch.testing.assert_close(x, before)


def test_tied_parameters_are_one_weight() -> None:
    model = Tied().eval()
    program = raised(model, torch.randint(10, (2, 3)))

    assert len(program.weights) == 1
    ids = torch.randint(10, (1, 7))
    torch.testing.assert_close(program(ids), model(ids), **TOLERANCE)


def test_module_is_left_in_its_mode() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).train()
    model[0].eval()
    program = raised(model, torch.randn(2, 3))

    assert [module.training for module in model] == [False, True]
    x = torch.randn(2, 3)
    torch.testing.assert_close(program(x), model[0](x), **TOLERANCE)


def test_module_that_depends_on_data_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"cannot trace DependsOnData") as caught:
        capture_module(DependsOnData(), torch.randn(2, 3))
    assert caught.value.remedy


def test_example_that_is_no_tensor_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"'keep'.* is a bool, not a tensor"):
        capture_module(Keywords(), {"ids": torch.zeros(2, 3, dtype=torch.int64), "keep": True})
    with pytest.raises(ModelError, match="example_inputs is a str"):
        capture_module(Perceptron(), "x")
