"""What the emitter promises beyond numbers: names, sharing, targets' own translations, refusals."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from qcompile.backends.onnx.builder import Builder
from qcompile.backends.onnx.emitter import DEFAULT_OPSET, OnnxEmitter
from qcompile.errors import TargetError
from qcompile.frontends.torch_export import export, unlifted_graph
from qcompile.ir.program import Program
from qcompile.ir.types import Port, Role, Signature
from qcompile.ir.weights import WeightStore


class TinyDecoder(nn.Module):
    """The inputs and outputs of a language model, and little between."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)

    def forward(self, ids: Tensor, mask: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        new = self.embed(ids).unsqueeze(1)
        present = torch.cat((past, new), dim=2) * mask[:, None, :, None]
        return present.sum(2), present


def decoder() -> Program:
    batch, query = torch.export.Dim("b"), torch.export.Dim("q")
    past = torch.export.Dim("p", min=0)
    inputs = (
        torch.zeros(2, 3, dtype=torch.int64),
        torch.ones(2, 8, dtype=torch.int64),
        torch.zeros(2, 1, 5, 4),
    )
    shapes = ({0: batch, 1: query}, {0: batch, 1: torch.export.Dim.AUTO}, {0: batch, 2: past})
    store = WeightStore()
    module = TinyDecoder()
    graph = unlifted_graph(export(module, inputs, {}, shapes, "decoder"), store, str)
    signature = Signature(
        (
            Port("input_ids", Role.INPUT_IDS),
            Port("attention_mask", Role.ATTENTION_MASK),
            Port("past_key_0", Role.PAST_KEY, 0),
        ),
        (Port("logits", Role.LOGITS), Port("present_key_0", Role.PRESENT_KEY, 0)),
    )
    return Program(graph, store, signature)


def shape_of(value: ir.Value) -> list[int | str]:
    assert value.shape is not None
    return [size if isinstance(size, int) else str(size) for size in value.shape]


def test_ports_and_sizes_have_stable_names() -> None:
    graph = OnnxEmitter().emit(decoder(), name="tiny").model.graph
    assert graph.name == "tiny"
    assert {value.name: shape_of(value) for value in graph.inputs} == {
        "input_ids": ["batch", "query"],
        "attention_mask": ["batch", "past + query"],
        "past_key_0": ["batch", 1, "past", 4],
    }
    assert {value.name: shape_of(value) for value in graph.outputs} == {
        "logits": ["batch", 1, 4],
        "present_key_0": ["batch", 1, "past + query", 4],
    }


def test_values_are_named_after_the_programs_nodes(onnx: Any) -> None:
    program = onnx.capture(lambda x: torch.relu(x).exp().amax(1), torch.randn(3, 4))
    names = [value.name for node in onnx.emit(program).model.graph for value in node.outputs]
    assert names == ["relu", "exp", "output_0"]


def test_input_that_is_returned_is_copied(onnx: Any) -> None:
    onnx.check(lambda x: (x, x + 1, x), lambda n: (torch.randn(n, 2),))


def test_weight_that_is_returned_is_copied(onnx: Any) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(3, 2))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x + 1, self.table

    onnx.check(Model(), lambda n: (torch.randn(n, 2),))


def test_what_nothing_uses_is_not_in_the_model(onnx: Any) -> None:
    program = onnx.capture(lambda x: x.topk(2)[0] + x.shape[0] * 0, torch.randn(4, 5))
    graph = onnx.emit(program).model.graph
    used = {value for node in graph for value in node.inputs} | set(graph.outputs)
    assert all(any(value in used for value in node.outputs) for node in graph)
    assert all(value in used for value in graph.initializers.values())


def test_equal_constants_are_stored_once(onnx: Any) -> None:
    program = onnx.capture(lambda x: (x + 0.5) * 0.5 - 0.5, torch.randn(4, 5))
    assert len(onnx.emit(program).model.graph.initializers) == 1


def test_reshapes_of_attention_heads_need_no_size_at_run_time(onnx: Any) -> None:
    """`view` and back over batch and length that vary: all targets are constants."""

    def function(x: Tensor) -> Tensor:
        heads = x.view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2).exp()
        return heads.transpose(1, 2).reshape(x.shape[0], x.shape[1], 8)

    program = onnx.capture(function, torch.randn(3, 5, 8))
    kinds = [node.op_type for node in onnx.emit(program).model.graph]
    assert kinds == ["Reshape", "Transpose", "Exp", "Transpose", "Reshape"]


def test_target_translation_wins_and_its_domain_is_imported(onnx: Any) -> None:
    def squash(b: Builder, x: ir.Value) -> ir.Value:
        return b.op("Squash", x, domain="com.example", steepness=2.0, kinds=[1, 2], exact=True)

    program = onnx.capture(lambda x: torch.tanh(x) + 1, torch.randn(3, 4))
    emitter = OnnxEmitter({torch.ops.aten.tanh.default: squash})
    graph = emitter.emit(program).model.graph
    node = graph[0]
    assert (node.domain, node.op_type) == ("com.example", "Squash")
    assert {key: attribute.value for key, attribute in node.attributes.items()} == {
        "steepness": 2.0,
        "kinds": (1, 2),
        "exact": 1,
    }
    assert graph.opset_imports == {"": DEFAULT_OPSET, "com.example": 1}
    value = node.outputs[0]
    assert (value.name, value.dtype, shape_of(value)) == (
        "tanh",
        ir.DataType.FLOAT,
        ["batch", "a_1"],
    )


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


class Refused(nn.Module):
    """Two calls that cannot be emitted with one between that can."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(Unknown(), nn.ReLU(), Unknown())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def test_all_calls_without_translation_are_named(onnx: Any) -> None:
    program = onnx.capture(Refused(), torch.randn(3, 4))
    found = OnnxEmitter().untranslatable(program)
    assert [(f.operator, f.module) for f in found] == [
        ("aten.special_bessel_j0", "block.0"),
        ("aten.special_bessel_j0", "block.2"),
    ]
    with pytest.raises(TargetError, match=r"2 operator.*bessel_j0\) in 'block\.0'.*'block\.2'"):
        OnnxEmitter().emit(program)


def test_arguments_without_translation_are_refused_with_the_reason(onnx: Any) -> None:
    program = onnx.capture(
        lambda x: torch.nn.functional.avg_pool1d(x, 2) + 0 * x.nonzero().shape[0],
        torch.randn(2, 3, 4),
    )
    assert OnnxEmitter().untranslatable(program) == []
    program = onnx.capture(
        lambda x: torch.nn.functional.avg_pool2d(x, 2, divisor_override=3), torch.randn(2, 3, 4, 4)
    )
    (failure,) = OnnxEmitter().untranslatable(program)
    assert failure.reason == "avg_pool with divisor_override"


def test_operator_that_torch_takes_apart_needs_no_translation(onnx: Any) -> None:
    def function(x: Tensor) -> Tensor:
        return torch.nn.functional.huber_loss(x, x * 0.3, reduction="none") + torch.logit(
            torch.sigmoid(x)
        )

    onnx.check(function, lambda n: (torch.randn(n, 4),), atol=1e-5)


def test_taking_an_operator_apart_never_fixes_a_size(onnx: Any) -> None:
    """`im2col` decomposes into indices counted for the traced size: no other would be right."""
    program = onnx.capture(
        lambda x: torch.nn.functional.unfold(x, 2, stride=2), torch.randn(4, 8, 6, 5)
    )
    before = program.text()
    (failure,) = OnnxEmitter().untranslatable(program)
    assert failure.operator == "aten.im2col"
    assert program.text() == before


@pytest.mark.parametrize("opset", [17, 99])
def test_opset_without_our_operators_or_a_run_time_is_refused(opset: int) -> None:
    with pytest.raises(TargetError, match=f"opset {opset}") as caught:
        OnnxEmitter(opset=opset)
    assert caught.value.remedy == "use 21 to 26"
