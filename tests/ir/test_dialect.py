from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from qcompile.ir import dialect

B, H, S, D = 2, 4, 3, 8


def cases() -> dict[str, tuple[torch._ops.OpOverload, tuple[object, ...]]]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, gain = random(B, S, D), random(D)
    q, k, v = random(B, H, S, D), random(B, 2, S, D), random(B, 2, S, 6)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    matrices = random(B, S, 2, D), random(B, S, 2, D), random(B, S, H, 6)
    return {
        "rms_norm": (dialect.rms_norm, (x, gain, 1e-6)),
        "rms_norm core": (dialect.rms_norm, (x, None, 1e-6)),
        "layer_norm": (dialect.layer_norm, (x, gain, random(D), 1e-5)),
        "rope": (dialect.rope, (q, random(B, S, 2), random(B, S, 2), False)),
        "rope interleaved": (dialect.rope, (q, random(1, S, 4), random(1, S, 4), True)),
        "attention": (
            dialect.attention,
            (q, k, v, None, mask, None, 0.3, True, 0, 0.0),
        ),
        "attention window, cap, bias, sinks": (
            dialect.attention,
            (q, k, v, random(1, H, S, S), mask, random(H), 0.3, True, 2, 5.0),
        ),
        "act": (dialect.act, (x, "silu")),
        "gated_act": (dialect.gated_act, (x, random(B, S, D), "gelu_tanh")),
        "kv_append": (dialect.kv_append, (k, random(B, 2, 1, D))),
        "causal_conv": (dialect.causal_conv, (x, random(S, 2), random(S))),
        "linear_recurrence": (
            dialect.linear_recurrence,
            (*matrices, -random(B, S, H, 1).abs(), None, random(B, H, D, 6)),
        ),
        "linear_recurrence of a rate, decay by row": (
            dialect.linear_recurrence,
            (*matrices, -random(B, S, H, D).abs(), random(B, S, H), random(B, H, D, 6)),
        ),
    }


@pytest.mark.parametrize("name", cases())
def test_shape_rule_equals_the_reference(name: str) -> None:
    operator, arguments = cases()[name]
    expected = operator(*arguments)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        found = operator(*fake)
    for one, other in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype


@pytest.mark.parametrize("name", cases())
def test_derivative_equals_finite_differences(name: str) -> None:
    operator, arguments = cases()[name]
    inputs = [
        a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in arguments
    ]
    assert torch.autograd.gradcheck(operator, inputs)


@pytest.mark.parametrize(
    ("x", "bits", "group"), [((2, 40), 8, 16), ((2, 3, 40), 8, 0), ((40,), 4, 40)]
)
def test_quantization_operators_have_exact_shape_rules(
    x: tuple[int, ...], bits: int, group: int
) -> None:
    value = torch.randn(x)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(value)
        fake_scale = dialect.dynamic_scale(fake, bits, group)
        fake_codes = dialect.quantize(fake, fake_scale, None, bits, group)
        fake_back = dialect.dequantize(fake_codes, fake_scale, None, bits, group)
    scale = dialect.dynamic_scale(value, bits, group)
    codes = dialect.quantize(value, scale, None, bits, group)
    back = dialect.dequantize(codes, scale, None, bits, group)
    for found, expected in ((fake_scale, scale), (fake_codes, codes), (fake_back, back)):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)


def test_attention_equals_torch_on_its_common_ground() -> None:
    q, k, v = torch.randn(B, H, S, D), torch.randn(B, 2, S, D), torch.randn(B, 2, S, D)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    found = dialect.attention(q, k, v, None, None, None, D**-0.5, True, 0, 0.0)
    # Two float32 softmaxes over three keys: a few units in the last place.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_attention_with_a_past_masks_by_position() -> None:
    q, k, v = torch.randn(1, 2, 5, D), torch.randn(1, 2, 5, D), torch.randn(1, 2, 5, D)
    whole = dialect.attention(q, k, v, None, None, None, 0.5, True, 3, 0.0)
    last = dialect.attention(q[:, :, 3:], k, v, None, None, None, 0.5, True, 3, 0.0)
    torch.testing.assert_close(last, whole[:, :, 3:], rtol=0, atol=1e-6)


def test_attention_of_a_query_that_sees_nothing_is_zero() -> None:
    q = torch.randn(1, 1, 2, D)
    mask = torch.tensor([[0, 0]])
    out = dialect.attention(q, q, q, None, mask, None, 1.0, False, 0, 0.0)
    assert out.eq(0).all()


def test_unknown_activation_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="unknown activation 'swoosh'"):
        dialect.act(torch.ones(1), "swoosh")


def test_is_dialect_op_tells_qc_from_aten() -> None:
    assert dialect.is_dialect_op(dialect.rope)
    assert not dialect.is_dialect_op(torch.ops.aten.add.Tensor)
    assert not dialect.is_dialect_op(len)


@pytest.mark.parametrize("signs", [[], [torch.tensor([1, -1, 1, 1], dtype=torch.int8)]])
def test_lists_of_tensors_without_gradients_pass_those_of_others(signs: list[Tensor]) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    dims = [4, 0, len(signs)]
    assert torch.autograd.gradcheck(lambda v: dialect.transform(v, signs, "hadamard", dims), x)
