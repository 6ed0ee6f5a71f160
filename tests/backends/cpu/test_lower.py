"""Lowering to the CPU library: every rewrite before and after, near misses, equal results."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompile.backends.cpu import ops
from qcompile.backends.cpu.lower.fuse_attention import FuseAttention
from qcompile.backends.cpu.lower.fuse_linear import FuseLinear
from qcompile.backends.cpu.lower.fuse_residual import FuseResidual
from qcompile.errors import TargetError
from qcompile.frontends.torch_export import capture_module
from qcompile.ir import dialect
from qcompile.ir.interpreter import Interpreter
from qcompile.ir.program import Program
from qcompile.ir.types import Fact, Port, Role
from qcompile.passes.canonicalize import canonicalize
from qcompile.passes.infra import Pass, run_passes
from qcompile.passes.lower.limit_logits import LimitLogits
from qcompile.passes.quantize.quantize_activations import QuantizeActivations
from qcompile.passes.quantize.quantize_weights import QuantizeWeights

BATCH, QUERY, PAST = 3, 5, 7
HEADS, KV_HEADS, WIDTH = 4, 2, 8

# Both sides sum the same float32 products, at most in another order; values are of order one.
assert_same = partial(torch.testing.assert_close, rtol=0, atol=2e-6)


class Layers(nn.Module):
    """A function of tensors and of named linears and embeddings."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        return self.function(self, *(x,) if y is None else (x, y))


def capture(
    function: Callable[..., Any], *inputs: Tensor, outputs: Sequence[Role] = (), **layers: nn.Module
) -> Program:
    """The canonical program of ``function(layers, *inputs)``."""
    program = capture_module(Layers(function, **layers), inputs)
    ports = tuple(Port(role.value, role) for role in outputs)
    signature = program.signature
    return canonicalize(
        replace(program, signature=replace(signature, outputs=ports or signature.outputs))
    )


def name_inputs(program: Program, *roles: Role) -> Program:
    ports = tuple(Port(role.value, role) for role in roles)
    return replace(program, signature=replace(program.signature, inputs=ports))


def body(program: Program) -> str:
    """The text without its first line."""
    return program.text().split("\n", 1)[1]


def text(expected: str) -> str:
    return textwrap.indent(textwrap.dedent(expected), "  ").lstrip("\n")


def run(program: Program, *inputs: Tensor) -> tuple[Tensor, ...]:
    return Interpreter(program).run(*inputs)


def lower(before: Program, items: Pass | tuple[Pass, ...], *inputs: Tensor) -> Program:
    """The program after some passes, which must be well formed and compute the same."""
    after = run_passes(before, items if isinstance(items, tuple) else (items,))
    after.verify(shapes=True)
    for found, expected in zip(run(after, *inputs), run(before, *inputs), strict=True):
        assert_same(found, expected)
    return after


def seeded(make: Callable[..., nn.Module], *sizes: int, **options: Any) -> nn.Module:
    torch.manual_seed(sum(sizes))
    return make(*sizes, **options)


linear = partial(seeded, nn.Linear)


def quantized(
    program: Program, format: str, granularity: str | None = None, **options: Any
) -> Program:
    passes: list[Pass] = [QuantizeWeights(format, **options)]
    if granularity is not None:
        passes.append(QuantizeActivations(granularity=granularity))
    return run_passes(program, passes)


@pytest.fixture(scope="module")
def one_linear() -> Program:
    return capture(lambda m, x: m.a(x), torch.randn(3, 32), a=linear(32, 4))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 32, generator=torch.Generator().manual_seed(1))


# --- Linears ---------------------------------------------------------------------------------


def test_linear_takes_its_packed_weight_and_bias(one_linear: Program, x: Tensor) -> None:
    before = quantized(one_linear, "int4-g16-asym")
    assert body(before) == text("""
        %0: f32[4, 32] = qc.dequantize(@a.weight.codes, @a.weight.scale, @a.weight.zero_point, 4, 16)
        %1: f32[s0, 4] = aten.linear(%x, %0, @a.bias)
        return %1
        """)  # noqa: E501
    after = lower(before, FuseLinear(), x)
    assert body(after) == text("""
        %0: f32[s0, 4] = qc.cpu_linear(%x, @a.weight.codes.packed, @a.bias, None, 4, 32, integer-4-g16-float16-zeros, float)
        return %0
        """)  # noqa: E501
    assert set(after.weights) == {"a.weight.codes.packed", "a.bias"}


@pytest.mark.parametrize(
    ("format", "granularity", "act"),
    [
        ("int8", "token", "integer-8-g0-float16, int8_token"),
        ("int8", "group", "integer-8-g0-float16, int8_token"),
        ("int4-g16", "token", "integer-4-g16-float16, int8_token"),
        ("int4-g16", "group", "integer-4-g16-float16, int8_group"),
        ("int4-g16-bf16", "group", "integer-4-g16-bfloat16, int8_group"),
        ("int8-g16-asym-fp32", "group", "integer-8-g16-float32-zeros, int8_group"),
        ("int4-g16-asym16", "token", "integer-4-g16-float16-zeros16, int8_token"),
    ],
)
def test_rounding_of_the_input_becomes_an_attribute(
    one_linear: Program, x: Tensor, format: str, granularity: str, act: str
) -> None:
    after = lower(quantized(one_linear, format, granularity), FuseLinear(), x)
    assert body(after) == text(f"""
        %0: f32[s0, 4] = qc.cpu_linear(%x, @a.weight.codes.packed, @a.bias, None, 4, 32, {act})
        return %0
        """)


@pytest.mark.parametrize(
    ("format", "layout"),
    [
        ("ternary-g16", "ternary-2-g16-float16, int8_token"),
        ("mxfp4", "e2m1-4-g32-e8m0, int8_token"),
        ("nvfp4", "e2m1-4-g16-e4m3, int8_token"),
    ],
)
def test_lookup_codes_that_are_whole_numbers_multiply_bytes(
    one_linear: Program, x: Tensor, format: str, layout: str
) -> None:
    after = lower(quantized(one_linear, format, "token"), FuseLinear(), x)
    assert body(after) == text(f"""
        %0: f32[s0, 4] = qc.cpu_linear(%x, @a.weight.codes.packed, @a.bias, None, 4, 32, {layout})
        return %0
        """)


@pytest.mark.parametrize(
    ("format", "layout"),
    [("nf4-g16-dq", "table-4-g16-uint8"), ("fp8", "e4m3-8-g0-float32")],
)
def test_other_lookup_codes_multiply_inputs_that_are_rounded_before(
    one_linear: Program, x: Tensor, format: str, layout: str
) -> None:
    after = lower(quantized(one_linear, format, "token"), FuseLinear(), x)
    *rounding, product = body(after).splitlines()[:-1]
    assert [line.split("qc.")[1].split("(")[0] for line in rounding] == [
        "dynamic_scale",
        "quantize",
        "dequantize",
    ]
    assert product.endswith(f"@a.weight.codes.packed, @a.bias, None, 4, 32, {layout}, float)")


def test_linears_that_share_a_rounded_input_share_the_float_one(x: Tensor) -> None:
    before = quantized(
        capture(
            lambda m, x: (m.a(x), m.b(x)),
            torch.randn(3, 32),
            a=linear(32, 4, bias=False),
            b=linear(32, 6, bias=False),
        ),
        "int8",
        "token",
    )
    assert body(lower(before, FuseLinear(), x)) == text("""
        %0: f32[s0, 4] = qc.cpu_linear(%x, @a.weight.codes.packed, None, None, 4, 32, integer-8-g0-float16, int8_token)
        %1: f32[s0, 6] = qc.cpu_linear(%x, @b.weight.codes.packed, None, None, 6, 32, integer-8-g0-float16, int8_token)
        return %0, %1
        """)  # noqa: E501


def rounded_by_hand(
    bits: int = 8, group: int = 16, *, scale_bits: int | None = None, scale_of: int = 1
) -> Program:
    """A linear over int4-g16 whose input is rounded in another way than the kernels round."""

    def function(m: Any, x: Tensor) -> Tensor:
        scaled = x if scale_of == 1 else x * scale_of
        scale = dialect.dynamic_scale(scaled, scale_bits or bits, group)
        codes = dialect.quantize(x, scale, None, bits, group)
        return m.a(dialect.dequantize(codes, scale, None, bits, group))

    program = capture(function, torch.randn(3, 32), a=linear(32, 4, bias=False))
    return run_passes(program, [QuantizeWeights("int4-g16")])


@pytest.mark.parametrize(
    "before",
    [
        pytest.param(partial(rounded_by_hand, group=32), id="another group than the weight's"),
        pytest.param(partial(rounded_by_hand, scale_bits=7), id="the scale of another width"),
        pytest.param(partial(rounded_by_hand, scale_of=2), id="the scale of another tensor"),
    ],
)
def test_other_rounding_stays_outside(before: Callable[[], Program], x: Tensor) -> None:
    after = lower(before(), FuseLinear(), x)
    (node,) = after.calls(ops.linear)
    assert node.args[-1] == "float"
    assert [n.target for n in after.calls(dialect.quantize)] == [dialect.quantize]


def test_float_linear_stays(one_linear: Program, x: Tensor) -> None:
    after = lower(one_linear, FuseLinear(), x)
    assert body(after) == body(one_linear)


def test_weight_that_is_decoded_from_a_computed_tensor_stays() -> None:
    scale = torch.full((4, 1), 0.5)

    def function(m: Any, x: Tensor, codes: Tensor) -> Tensor:
        return nn.functional.linear(x, dialect.dequantize(codes, m.scale.weight, None, 8, 0))

    holder = nn.Linear(1, 4, bias=False)
    holder.weight = nn.Parameter(scale)
    codes = torch.randint(0, 255, (4, 32), dtype=torch.uint8)
    before = capture(function, torch.randn(3, 32), codes, scale=holder)
    after = lower(before, FuseLinear(), torch.randn(2, 32), codes)
    assert not list(after.calls(ops.linear))


def test_format_that_no_kernel_reads_is_refused_by_the_layers_name(one_linear: Program) -> None:
    with pytest.raises(TargetError) as error:
        run_passes(quantized(one_linear, "int4-g24"), [FuseLinear()])
    assert error.value.message == (
        "weight 'a.weight': the cpu kernels read groups of a multiple of 16"
    )
    assert "int4" in str(error.value.remedy)


# --- Residuals -------------------------------------------------------------------------------


def residual_program(function: Callable[..., Tensor], *inputs: Tensor) -> Program:
    layers = {"a": linear(32, 32), "b": linear(32, 32, bias=False)}
    return quantized(capture(function, *inputs, **layers), "int4-g16")


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda m, x: x + m.a(x), id="left"),
        pytest.param(lambda m, x: m.a(x) + x, id="right"),
    ],
)
def test_residual_is_added_by_the_linear(function: Callable[..., Tensor], x: Tensor) -> None:
    after = lower(residual_program(function, torch.randn(3, 32)), (FuseLinear(), FuseResidual()), x)
    assert body(after) == text("""
        %0: f32[s0, 32] = qc.cpu_linear(%x, @a.weight.codes.packed, @a.bias, %x, 32, 32, integer-4-g16-float16, float)
        return %0
        """)  # noqa: E501


def test_two_linears_that_are_added_become_a_chain(x: Tensor) -> None:
    before = residual_program(lambda m, x: m.a(x) + m.b(x), torch.randn(3, 32))
    assert body(lower(before, (FuseLinear(), FuseResidual()), x)) == text("""
        %0: f32[s0, 32] = qc.cpu_linear(%x, @b.weight.codes.packed, None, None, 32, 32, integer-4-g16-float16, float)
        %1: f32[s0, 32] = qc.cpu_linear(%x, @a.weight.codes.packed, @a.bias, %0, 32, 32, integer-4-g16-float16, float)
        return %1
        """)  # noqa: E501


def test_residual_stream_through_two_linears_fuses_both(x: Tensor) -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        x = x + m.a(x)
        return x + m.b(torch.relu(x))

    after = lower(residual_program(function, torch.randn(3, 32)), (FuseLinear(), FuseResidual()), x)
    assert not list(after.calls(torch.ops.aten.add.Tensor))
    first, second = after.calls(ops.linear)
    assert (first.args[3], second.args[3]) == (after.inputs[0], first)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda m, x: torch.add(x, m.a(x), alpha=2), id="scaled"),
        pytest.param(lambda m, x: m.a(x) + x[:1], id="one row for all"),
        pytest.param(lambda m, x: m.a(x)[:1] + x, id="one row of the linear"),
        pytest.param(lambda m, x: m.a(x) + 1.5, id="a number"),
        pytest.param(lambda m, x: (y := m.a(x)) + y, id="itself"),
        pytest.param(lambda m, x: (y := m.a(x)) * (y + x), id="another user"),
        pytest.param(lambda m, x: x - m.a(x), id="subtracted"),
    ],
)
def test_what_is_no_plain_residual_stays(function: Callable[..., Tensor], x: Tensor) -> None:
    after = lower(residual_program(function, torch.randn(3, 32)), (FuseLinear(), FuseResidual()), x)
    (node,) = after.calls(ops.linear)
    assert node.args[3] is None


def test_residual_that_is_broadcast_to_more_rows_stays() -> None:
    def function(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return m.a(x) + y

    before = residual_program(function, torch.randn(3, 32), torch.randn(2, 3, 32))
    after = lower(before, (FuseLinear(), FuseResidual()), torch.randn(4, 32), torch.randn(2, 4, 32))
    (node,) = after.calls(ops.linear)
    assert node.args[3] is None


# --- Embeddings ------------------------------------------------------------------------------


def tied_program() -> Program:
    table = seeded(nn.Embedding, 24, 32)
    head = nn.Linear(32, 24, bias=False)
    head.weight = table.weight
    program = capture(
        lambda m, ids: m.head(m.table(ids)),
        torch.zeros(2, 3, dtype=torch.int64),
        outputs=(Role.LOGITS,),
        table=table,
        head=head,
    )
    return name_inputs(program, Role.INPUT_IDS)


def test_tied_embedding_and_head_read_one_packed_tensor() -> None:
    before = quantized(tied_program(), "int4-g16", embedding="int8-g16", lm_head="int8-g16")
    after = lower(before, FuseLinear(), torch.arange(10).reshape(2, 5))
    assert body(after) == text("""
        %0: f32[s0, s1, 32] = qc.cpu_embedding(%input_ids, @table.weight.codes.packed, 24, 32, integer-8-g16-float16)
        %1: f32[s0, s1, 24] = qc.cpu_linear(%0, @table.weight.codes.packed, None, None, 24, 32, integer-8-g16-float16, float)
        return %1
        """)  # noqa: E501
    assert list(after.weights) == ["table.weight.codes.packed"]


# --- Attention -------------------------------------------------------------------------------


class Attention(nn.Module):
    """Projections around `attend`, which gets q, k, v as ``[B, H, S, D]`` and the other inputs."""

    def __init__(self, attend: Callable[..., Any], *, join: bool = True) -> None:
        super().__init__()
        width = HEADS * WIDTH
        self.q = linear(width, width, bias=False)
        self.k = linear(width, KV_HEADS * WIDTH, bias=False)
        self.v = linear(width, KV_HEADS * WIDTH, bias=False)
        self.attend = attend
        self.join = join

    def forward(
        self,
        x: Tensor,
        a: Tensor | None = None,
        b: Tensor | None = None,
        c: Tensor | None = None,
        d: Tensor | None = None,
        e: Tensor | None = None,
    ) -> Any:
        rest = [value for value in (a, b, c, d, e) if value is not None]
        batch, length, _ = x.shape
        q, k, v = (
            layer(x).view(batch, length, -1, WIDTH).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        out, *others = self.attend(q, k, v, *rest)
        if self.join:
            out = out.transpose(1, 2).reshape(batch, length, HEADS * WIDTH)
        return (out, *others)


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Any = None, key_mask: Any = None, causal: bool = True
) -> Tensor:
    result: Tensor = dialect.attention(q, k, v, mask, key_mask, None, 0.5, causal, 0, 0.0)
    return result


def attention_program(
    function: Callable[..., Any], *roles: Role, join: bool = True, outputs: int = 1
) -> tuple[Program, list[Tensor]]:
    """The program of an attention over ``x`` and inputs of the given roles, and numbers for it."""
    torch.manual_seed(0)
    examples = [inputs_of(role, BATCH, QUERY, PAST) for role in (Role.TENSOR, *roles)]
    program = capture_module(Attention(function, join=join), tuple(examples))
    ports = tuple(Port(f"x{i}", role) for i, role in enumerate((Role.TENSOR, *roles)))
    names = [Port(f"y{i}") for i in range(outputs)]
    signature = replace(program.signature, inputs=ports, outputs=tuple(names))
    numbers = [inputs_of(role, 2, 4, 6) for role in (Role.TENSOR, *roles)]
    return canonicalize(replace(program, signature=signature)), numbers


COS = Role.POSITION_IDS
"""Stands for a tensor of cosines or sines in these tests."""


def inputs_of(role: Role, batch: int, query: int, past: int) -> Tensor:
    if role in (Role.PAST_KEY, Role.PAST_VALUE):
        return torch.randn(batch, KV_HEADS, past, WIDTH)
    if role is Role.ATTENTION_MASK:
        mask = torch.ones(batch, past + query, dtype=torch.int64)
        mask[0, :2] = 0
        return mask
    if role is COS:
        return torch.randn(batch, query, WIDTH // 2)
    if role is Role.TOKEN_TYPE_IDS:  # stands for a mask over scores
        return torch.rand(batch, 1, query, query) > 0.2
    return torch.randn(batch, query, HEADS * WIDTH)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    result: Tensor = dialect.rope(x, cos, sin, interleaved)
    return result


def fused(program: Program) -> dict[str, Any]:
    """The arguments by name of the one fused attention."""
    (node,) = program.calls(ops.fused_attention)
    names = [argument.name for argument in ops.fused_attention._schema.arguments]
    return dict(zip(names, node.args, strict=True))


def cached(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, past_k: Tensor, past_v: Tensor, *rope: Tensor
) -> tuple[Tensor, ...]:
    if rope:
        q, k = rotated(q, *rope), rotated(k, *rope)
    k, v = dialect.kv_append(past_k, k), dialect.kv_append(past_v, v)
    return attend(q, k, v, key_mask=mask), k, v


CACHE = (Role.ATTENTION_MASK, Role.PAST_KEY, Role.PAST_VALUE)


def bound_cache(function: Callable[..., Any]) -> Callable[..., Any]:
    """The caches' heads and width are the model's, not free."""

    def checked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *rest: Tensor) -> Any:
        for past in rest[:2]:
            torch._check(past.shape[1] == KV_HEADS)
            torch._check(past.shape[3] == WIDTH)
        return function(q, k, v, mask, *rest)

    return checked


def test_rotation_append_and_attention_become_one_node() -> None:
    before, numbers = attention_program(bound_cache(cached), *CACHE, COS, COS, outputs=3)
    after = lower(before, FuseAttention(), *numbers)
    assert body(after) == text("""
        %0: f32[s0, s1, 32] = aten.linear(%x0, @q.weight)
        %1: f32[s0, s1, 16] = aten.linear(%x0, @k.weight)
        %2: f32[s0, s1, 16] = aten.linear(%x0, @v.weight)
        %3: tuple = qc.cpu_attention(%0, %1, %2, %x2, %x3, %x1, None, %x4, %x5, None, 4, 2, 0.5, True, 0, 0, False)
        %4: f32[s0, s1, 32] = py.getitem(%3, 0)
        %5: f32[s0, 2, s1 + s4, 8] = py.getitem(%3, 1)
        %6: f32[s0, 2, s1 + s5, 8] = py.getitem(%3, 2)
        return %4, %5, %6
        """)  # noqa: E501


def test_cache_without_a_key_mask_gets_the_models_mask() -> None:
    """The runtime's buffers are longer than what they hold: the mask tells by how much."""

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *past: Tensor) -> Any:
        k, v = dialect.kv_append(past[0], k), dialect.kv_append(past[1], v)
        return attend(q, k, v), k, v, mask * 2

    before, numbers = attention_program(bound_cache(function), *CACHE, outputs=4)
    numbers[1] = torch.ones_like(numbers[1])
    after = lower(before, FuseAttention(), *numbers)
    assert fused(after)["key_mask"] is after.inputs[1]


def test_attention_without_rotation_or_cache_fuses_alone() -> None:
    before, numbers = attention_program(lambda q, k, v: (attend(q, k, v, causal=False),))
    after = lower(before, FuseAttention(), *numbers)
    arguments = fused(after)
    for absent in ("past_key", "past_value", "key_mask", "bias", "cos", "sin", "sinks"):
        assert arguments[absent] is None
    assert arguments["causal"] is False
    assert not list(after.calls(torch.ops.aten.transpose.int))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_without_a_cache_fuses(interleaved: bool) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, *rope: Tensor) -> Any:
        return (attend(rotated(q, *rope, interleaved), rotated(k, *rope, interleaved), v),)

    before, numbers = attention_program(function, COS, COS)
    after = lower(before, FuseAttention(), *numbers)
    assert fused(after)["interleaved"] is interleaved
    assert not list(after.calls(dialect.rope))


@pytest.mark.parametrize(
    ("function", "roles", "outputs"),
    [
        pytest.param(
            lambda q, k, v, c, s: (attend(rotated(q, c, s), r := rotated(k, c, s), v), r * 2),
            (COS, COS),
            2,
            id="another user",
        ),
        pytest.param(
            lambda q, k, v, c, s: (attend(rotated(q, c, s), rotated(k, s, c), v),),
            (COS, COS),
            1,
            id="other angles for keys",
        ),
        pytest.param(
            lambda q, k, v, c, s: (attend(rotated(q, c, s), rotated(k, c, s, True), v),),
            (COS, COS),
            1,
            id="other pairs for keys",
        ),
        pytest.param(
            lambda q, k, v, c, s: (attend(rotated(q, c, s), k, v),),
            (COS, COS),
            1,
            id="queries only",
        ),
    ],
)
def test_rotation_that_the_kernel_cannot_do_stays_outside(
    function: Callable[..., Any], roles: tuple[Role, ...], outputs: int
) -> None:
    before, numbers = attention_program(function, *roles, outputs=outputs)
    after = lower(before, FuseAttention(), *numbers)
    assert fused(after)["cos"] is None
    assert len(list(after.calls(dialect.rope))) == len(list(before.calls(dialect.rope)))


def test_norms_of_queries_and_keys_stay_before_the_rotation() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, *rope: Tensor) -> Any:
        q, k = dialect.rms_norm(q, None, 1e-6), dialect.rms_norm(k, None, 1e-6)
        return (attend(rotated(q, *rope), rotated(k, *rope), v),)

    before, numbers = attention_program(function, COS, COS)
    after = lower(before, FuseAttention(), *numbers)
    arguments = fused(after)
    assert arguments["cos"] is after.inputs[1]
    for side in ("query", "key"):
        joined, flat = arguments[side], arguments[side].args[0]
        assert joined.target is torch.ops.aten.reshape.default
        assert flat.args[0].target is dialect.rms_norm


@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_mask_operand_becomes_a_bias(kind: str) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
        given = mask if kind == "boolean" else mask.float() - 1
        return (attend(q, k, v, mask=given, causal=False),)

    before, numbers = attention_program(function, Role.TOKEN_TYPE_IDS)
    numbers[1][0, 0, 1] = False  # a query that may attend to nothing
    after = lower(before, FuseAttention(), *numbers)
    assert fused(after)["bias"].meta["val"].dtype == torch.float32


def test_output_that_keeps_heads_apart_is_split_again() -> None:
    before, numbers = attention_program(lambda q, k, v: (attend(q, k, v) * 2,), join=False)
    after = lower(before, FuseAttention(), *numbers)
    (doubled,) = after.results
    assert doubled.args[0].target is torch.ops.aten.transpose.int


def test_cache_that_something_else_reads_grows_as_a_tensor() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *past: Tensor) -> Any:
        k, v = dialect.kv_append(past[0], k), dialect.kv_append(past[1], v)
        return attend(q, k, v, key_mask=mask), k * 2, v

    before, _ = attention_program(bound_cache(function), *CACHE, outputs=3)
    after = run_passes(before, [FuseAttention()])
    assert not list(after.calls(ops.fused_attention))
    assert len(list(after.calls(dialect.kv_append, dialect.attention))) == 3


# --- Logits ----------------------------------------------------------------------------------


def language_model(function: Callable[..., Any]) -> Program:
    """``function(head, x, past)`` as a causal language model of one cache."""

    def model(m: Any, x: Tensor, past: Tensor) -> Any:
        logits, out = function(m, x, past)
        return logits, dialect.kv_append(past, out)

    program = capture(
        model,
        torch.randn(2, 3, 32),
        torch.randn(2, 2, 4, 8),
        head=linear(32, 24),
        mix=linear(24, 24),
    )
    inputs = (Port("input_ids", Role.INPUT_IDS), Port("past", Role.PAST_KEY, 0))
    outputs = (Port("logits", Role.LOGITS), Port("present", Role.PRESENT_KEY, 0))
    return replace(program, signature=replace(program.signature, inputs=inputs, outputs=outputs))


def as_heads(past: Tensor) -> Tensor:
    return past[:, :, :2] * 2


@pytest.mark.parametrize("capped", [False, True])
def test_head_reads_only_the_positions_that_are_asked_for(capped: bool) -> None:
    def function(m: Any, x: Tensor, past: Tensor) -> Any:
        logits = m.head(torch.relu(x))
        return (torch.tanh(logits / 4.0) * 4.0 if capped else logits), as_heads(past)

    before = language_model(function)
    after = run_passes(before, [LimitLogits(projections=(ops.linear,))])
    after.verify(shapes=True)
    assert after.signature.inputs[-1] == Port("logit_positions", Role.LOGIT_POSITIONS)
    (choice,) = after.calls(torch.ops.aten.index_select.default)
    assert [user.target for user in choice.users] == [torch.ops.aten.linear.default]
    x, past = torch.randn(2, 5, 32), torch.randn(2, 2, 6, 8)
    for positions in ([4], [0, 3], [0, 1, 2, 3, 4]):
        found = run(after, x, past, torch.tensor(positions))
        expected = run(before, x, past)
        assert_same(found[0], expected[0][:, positions])
        assert_same(found[1], expected[1])


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda m, x, p: (m.head(x).cumsum(1), as_heads(p)), id="positions are mixed"),
        pytest.param(
            lambda m, x, p: (m.mix(y := m.head(x)) + y, as_heads(p)), id="logits have another user"
        ),
        pytest.param(lambda m, x, p: (x * 2, as_heads(p)), id="no projection"),
    ],
)
def test_logits_that_need_all_positions_stay(function: Callable[..., Any]) -> None:
    before = language_model(function)
    after = run_passes(before, [LimitLogits(projections=(ops.linear,))])
    assert body(after) == body(before)
    assert after.signature.inputs == before.signature.inputs


def test_model_without_a_cache_keeps_its_inputs() -> None:
    before = tied_program()
    assert body(run_passes(before, [LimitLogits(projections=(ops.linear,))])) == body(before)
    assert not before.signature.has(Role.PAST_KEY)
    assert Fact.CANONICAL in before.facts
