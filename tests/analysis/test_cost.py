"""Operations and memory, against torch's own counter and by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from qcompile.analysis.cost import Cost, CostModel, Sizes, size_names
from qcompile.compiler import capture
from qcompile.frontends.torch_export import capture_module
from qcompile.ir import dialect
from qcompile.ir.program import Program
from qcompile.passes.infra import run_passes
from qcompile.passes.quantize.quantize_activations import QuantizeActivations
from qcompile.passes.quantize.quantize_weights import QuantizeWeights
from qcompile.passes.quantize.split_experts import split_experts
from qcompile.passes.transform.fold_norm_gain import FoldNormGain
from qcompile.passes.transform.rotate import Rotate

if TYPE_CHECKING:
    from tests.conftest import TinyCheckpoint

FLOAT = 4
ANY = Sizes()


@pytest.fixture(scope="module")
def llama(tiny_checkpoint: TinyCheckpoint) -> Program:
    return capture(tiny_checkpoint("llama"))


class Wrapped(nn.Module):
    """A function as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def counted_by_torch(module: nn.Module, *inputs: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        module(*inputs)
    return int(counter.get_total_flops())


HALVES = (dialect.expert_hidden, dialect.expert_output)


def operations_of(program: Program, target: object, sizes: Sizes = ANY) -> int:
    model = CostModel(program, sizes)
    return sum(model.flops(node) for node in program.calls() if node.target is target)


def test_linear_counts_as_torch_counts() -> None:
    module = nn.Linear(6, 5, bias=False)
    x = torch.randn(3, 7, 6)
    found = CostModel(program := capture_module(module, x), Sizes(batch=3)).total(program)
    assert found.flops == counted_by_torch(module, x) == 2 * 3 * 7 * 6 * 5


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 6, 3, padding=1, bias=False),
        nn.Conv2d(4, 6, 3, groups=2, stride=2, bias=False),
        nn.Conv1d(4, 6, 5, bias=False),
    ],
    ids=["conv2d", "grouped", "conv1d"],
)
def test_convolution_counts_as_torch_counts(module: nn.Module) -> None:
    x = torch.randn(2, 4, *([9] * (2 if isinstance(module, nn.Conv2d) else 1)))
    program = capture_module(module, x)
    assert CostModel(program, Sizes(batch=2)).total(program).flops == counted_by_torch(module, x)


class Recurrence(nn.Module):
    """Two groups of keys, four heads; 5 positions, matrices of 8 rows and 6 columns."""

    def __init__(self, has_rate: bool) -> None:
        super().__init__()
        self.has_rate = has_rate

    def forward(self, key: Tensor, value: Tensor) -> Tensor:
        assert key.shape[1:] == (5, 2, 8)
        assert value.shape[1:] == (5, 4, 6)
        decay, state = -value[..., :1].exp(), value.new_zeros(value.shape[0], 4, 8, 6)
        rate = decay.squeeze(-1).exp() if self.has_rate else None
        return torch.ops.qc.linear_recurrence(key, key, value, decay, rate, state)[0]


@pytest.mark.parametrize(("has_rate", "each"), [(False, 5), (True, 7)])
def test_recurrence_costs_operations_on_each_number_of_its_matrices(
    has_rate: bool, each: int
) -> None:
    inputs = (torch.randn(2, 5, 2, 8), torch.randn(2, 5, 4, 6))
    program = capture_module(Recurrence(has_rate), inputs)
    found = operations_of(program, dialect.linear_recurrence, Sizes(batch=2))
    assert found == each * 2 * 5 * 4 * 8 * 6


def test_batch_scales_operations_of_a_plain_module() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    program = capture_module(module, torch.randn(3, 4))
    one, five = (CostModel(program, Sizes(batch=b)).total(program).flops for b in (1, 5))
    assert one == 2 * 4 * 8 + 8 + 2 * 8 * 2
    assert five == 5 * one


def test_linears_of_a_language_model_cost_two_operations_per_weight_and_token(
    llama: Program,
) -> None:
    linear = torch.ops.aten.linear.default
    weights = sum(
        llama.weights.spec(str(node.args[1].target)).elements  # type: ignore[union-attr]
        for node in llama.calls(linear)
    )
    found = operations_of(llama, linear, Sizes(batch=2, query=5, past=9))
    assert found == 2 * weights * 2 * 5


@pytest.mark.parametrize(
    ("sizes", "window"),
    [
        (Sizes(1, 6, 0), 0),
        (Sizes(2, 1, 9), 0),
        (Sizes(1, 4, 3), 0),
        (Sizes(1, 6, 2), 3),
        (Sizes(1, 2, 1), 50),
    ],
)
def test_causal_attention_counts_the_pairs_that_are_seen(
    sizes: Sizes, window: int, llama: Program
) -> None:
    program = llama.copy()
    for node in program.calls(dialect.attention):
        node.update_arg(8, window)
    total = sizes.past + sizes.query
    pairs = sum(
        key <= sizes.past + query and (not window or key > sizes.past + query - window)
        for query in range(sizes.query)
        for key in range(total)
    )
    heads, width, layers = 4, 8, 2
    expected = layers * 2 * sizes.batch * heads * pairs * (width + width)
    assert operations_of(program, dialect.attention, sizes) == expected


def test_cache_holds_past_and_new_positions_of_every_layer(llama: Program) -> None:
    found = CostModel(llama, Sizes(batch=3, query=2, past=5)).total(llama)
    layers, kv_heads, width = 2, 2, 8
    assert found.cache_bytes == layers * 2 * 3 * kv_heads * (5 + 2) * width * FLOAT


def test_values_live_from_their_node_to_their_last_reader() -> None:
    def chain(x: Tensor) -> Tensor:
        a = torch.relu(x)  # x and a live: then x dies
        b = torch.exp(a)
        c = torch.cat([b, b], dim=1)  # a, b and c, which is twice as long: a is read below
        return torch.sum(c, dim=1, keepdim=True) + a

    program = capture_module(Wrapped(chain), torch.randn(3, 10))
    alive = CostModel(program, Sizes(batch=1)).total(program).activation_bytes
    assert alive == (10 + 10 + 20) * FLOAT


def test_views_take_no_memory_and_keep_what_they_view_alive() -> None:
    def views(x: Tensor) -> Tensor:
        return torch.relu(x).view(-1, 5, 2).transpose(1, 2)[:, :1].exp()

    program = capture_module(Wrapped(views), torch.randn(3, 10))
    model = CostModel(program, Sizes(batch=1))
    assert model.total(program) == Cost(10 + 5, (10 + 10) * FLOAT, 0)
    last = list(program.calls())[-1]
    assert model.part([last]).activation_bytes == (10 + 5) * FLOAT


def test_parts_add_up_to_the_whole(llama: Program) -> None:
    model = CostModel(llama, Sizes(1, 16, 4))
    nodes = list(llama.graph.nodes)
    parts = [model.part(nodes[:40]), model.part(nodes[40:])]
    whole = model.total(llama)
    assert sum(part.flops for part in parts) == whole.flops
    assert sum(part.cache_bytes for part in parts) == whole.cache_bytes
    assert max(part.activation_bytes for part in parts) == whole.activation_bytes


def test_weights_and_caches_are_no_activations(llama: Program) -> None:
    # One token: only a past as long as this could make values of megabytes.
    found = CostModel(llama, Sizes(1, 1, 100_000)).total(llama)
    mask = 8 * 100_001
    assert found.activation_bytes < mask + 10_000


def test_sizes_are_named_by_the_roles_of_inputs(llama: Program) -> None:
    assert set(size_names(llama).values()) == {"batch", "query", "past"}


def test_routed_experts_cost_the_experts_that_are_chosen(tiny_checkpoint: TinyCheckpoint) -> None:
    config = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 1}
    program = capture(tiny_checkpoint("mixtral", **config))
    hidden, intermediate, tokens = 32, 48, 7
    expected = tokens * 2 * (2 * 3 * hidden * intermediate)
    assert operations_of(program, dialect.experts, Sizes(1, tokens, 0)) == expected
    halves = split_experts(program)
    parts = [operations_of(halves, half, Sizes(1, tokens, 0)) for half in HALVES]
    assert parts == [expected * 2 // 3, expected // 3]


def test_online_transforms_cost_their_additions_and_products(llama: Program) -> None:
    # 48 channels are four blocks of 12, each a core of order 12, or one of 48 = 12 * 4.
    rotated = run_passes(llama, [FoldNormGain(), Rotate(online=["down_proj"])])
    (first, _) = rotated.calls(dialect.transform)
    channels, tokens, layers = 48, 2 * 5, 2
    block, core = int(first.args[3][0]), 12  # type: ignore[index,arg-type,call-overload]
    each = (block // core).bit_length() - 1 + 2 * core + 1
    assert operations_of(rotated, dialect.transform, Sizes(2, 5, 0)) == (
        layers * tokens * channels * each
    )


def test_rounding_costs_what_is_measured_and_divided(llama: Program) -> None:
    program = run_passes(llama, [QuantizeWeights("int8"), QuantizeActivations("fp8")])
    tokens, hidden, intermediate, layers = 7, 32, 48, 2
    inputs = tokens * (layers * (3 * hidden + intermediate) + hidden)
    assert operations_of(program, dialect.float_scale, Sizes(1, tokens, 0)) == 2 * inputs
    assert operations_of(program, dialect.quantize_float, Sizes(1, tokens, 0)) == 2 * inputs


@pytest.mark.parametrize("format", ["int8", "nf4-g16", "nvfp4"])
def test_decoded_weights_are_no_activations(llama: Program, format: str) -> None:
    program = run_passes(llama, [QuantizeWeights(format)])
    sizes = Sizes(1, 1, 0)
    found, plain = (CostModel(p, sizes).total(p).activation_bytes for p in (program, llama))
    assert found == plain
