from __future__ import annotations

import operator

import pytest
import torch
from torch import nn

from qcompile.errors import ModelError
from qcompile.frontends.torch_export import capture_module
from qcompile.ir import dialect
from qcompile.ir.edit import Editor
from qcompile.ir.interpreter import Interpreter
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.ir.verify import MalformedProgramError
from qcompile.passes.canonicalize import canonicalize

aten = torch.ops.aten


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


@pytest.fixture(scope="module")
def mlp() -> Mlp:
    torch.manual_seed(0)
    return Mlp()


@pytest.fixture
def program(mlp: Mlp) -> Program:
    return canonicalize(capture_module(mlp, torch.randn(3, 4)))


def test_text_is_the_program_with_names_in_place_of_numbers(program: Program) -> None:
    assert program.text() == (
        "program(%x: f32[s0, 4]) {canonical}\n"
        "  %0: f32[s0, 6] = aten.linear(%x, @up.weight, @up.bias)\n"
        "  %1: f32[s0, 6] = aten.relu(%0)\n"
        "  %2: f32[s0, 4] = aten.linear(%1, @down.weight)\n"
        "  %3: f32[s0, 4] = aten.add(%x, %2)\n"
        "  return %3\n"
    )


def test_text_does_not_depend_on_node_names(program: Program) -> None:
    renamed = program.copy()
    for i, node in enumerate(renamed.graph.nodes):
        if node.op == "call_function":
            node.name = f"other_{i}"
    assert renamed.text() == program.text()


def test_calling_a_program_gives_what_the_module_gives(program: Program, mlp: Mlp) -> None:
    x = torch.randn(7, 4)
    torch.testing.assert_close(program(x), mlp(x), rtol=0, atol=1e-6)


def test_interpreting_in_float64_is_closer_than_float32(program: Program, mlp: Mlp) -> None:
    x = torch.randn(5, 4, dtype=torch.float64)
    (found,) = Interpreter(program, dtype=torch.float64).run(x)
    expected = Mlp().double()
    expected.load_state_dict(mlp.state_dict())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected(x), rtol=0, atol=1e-14)


def test_hook_sees_every_node_and_may_replace_its_value(program: Program) -> None:
    seen: list[str] = []

    def silence_relu(node: torch.fx.Node, value: object) -> object:
        seen.append(node.name)
        return torch.zeros_like(value) if node.target is aten.relu.default else value

    x = torch.randn(2, 4)
    (out,) = Interpreter(program, hook=silence_relu).run(x)
    assert torch.equal(out, x)
    assert len(seen) == len(program.graph.nodes)


def test_cache_keeps_weights_between_runs(program: Program) -> None:
    cache: dict[str, torch.Tensor] = {}
    Interpreter(program, cache=cache).run(torch.randn(2, 4))
    assert set(cache) == {"up.weight", "up.bias", "down.weight"}
    cache["up.bias"] = torch.full((6,), -1e3)
    x = torch.randn(2, 4)
    (out,) = Interpreter(program, cache=cache).run(x)
    assert torch.equal(out, x)


def test_editing_a_called_program_takes_effect_after_tidy(program: Program) -> None:
    x = torch.randn(2, 4)
    program(x)
    program.weights.put("down.weight", torch.zeros(4, 6))
    program.tidy()
    assert torch.equal(program(x), x)


def test_copy_is_independent(program: Program) -> None:
    text = program.text()
    twin = program.copy()
    editor = Editor(twin)
    (relu,) = twin.calls(aten.relu.default)
    with editor.before(relu):
        editor.replace(relu, editor.call(dialect.act, relu.args[0], "silu"))
    twin.weights.put("up.bias", torch.zeros(6))
    assert program.text() == text
    assert "qc.act" in twin.text()


def test_editor_gives_new_nodes_the_shape_of_their_rule(program: Program) -> None:
    editor = Editor(program)
    (relu,) = program.calls(aten.relu.default)
    with editor.after(relu):
        node = editor.call(aten.transpose.int, relu, 0, 1)
    assert node.meta["val"].shape[0] == 6


def test_tidy_forgets_dead_nodes_and_unused_weights(program: Program) -> None:
    editor = Editor(program)
    with editor.before(program.output_node):
        editor.call(aten.relu.default, program.results[0])
    program.weights.put("spare", torch.ones(1))
    assert program.tidy() == 1
    assert "spare" not in program.weights


def test_graph_module_is_plain_fx(program: Program) -> None:
    module = program.graph_module
    assert isinstance(module, torch.fx.GraphModule)
    assert module.up.weight.is_meta
    module.graph.lint()


def test_wrong_argument_structure_is_named(program: Program) -> None:
    with pytest.raises(ModelError, match="structure of the example inputs"):
        program(torch.randn(2, 4), torch.randn(2, 4))


def test_verify_accepts_a_sound_program(program: Program) -> None:
    program.verify(shapes=True)
    assert Fact.CANONICAL in program.facts


def test_verify_names_a_weight_that_is_not_there(program: Program) -> None:
    program.weights.remove("up.bias")
    with pytest.raises(MalformedProgramError, match=r"names 'up\.bias', which has no weight"):
        program.verify()


def test_verify_names_a_weight_of_another_shape(program: Program) -> None:
    program.weights.put("up.bias", torch.zeros(5))
    with pytest.raises(MalformedProgramError, match=r"'up\.bias' is torch\.float32\[5\]"):
        program.verify()


def test_verify_names_a_node_without_shape(program: Program) -> None:
    (relu,) = program.calls(aten.relu.default)
    del relu.meta["val"]
    with pytest.raises(MalformedProgramError, match="'relu' has no shape"):
        program.verify()


def test_verify_refuses_operators_that_write_in_place(program: Program) -> None:
    (relu,) = program.calls(aten.relu.default)
    relu.target = aten.relu_.default
    with pytest.raises(MalformedProgramError, match="writes in place"):
        program.verify()


def test_verify_refuses_foreign_functions(program: Program) -> None:
    (relu,) = program.calls(aten.relu.default)
    relu.target = torch.relu
    with pytest.raises(MalformedProgramError, match="no operator of the IR"):
        program.verify()


def test_verify_refuses_a_signature_of_another_length(program: Program) -> None:
    program.signature = type(program.signature)(program.signature.inputs, ())
    with pytest.raises(MalformedProgramError, match="signature has 0 outputs, the graph has 1"):
        program.verify()


def test_verify_shapes_names_the_node_that_lies(program: Program) -> None:
    (relu,) = program.calls(aten.relu.default)
    relu.meta["val"] = relu.meta["val"][:, :3]
    with pytest.raises(MalformedProgramError, match=r"'relu' \(aten.relu\) says"):
        program.verify(shapes=True)


def test_size_arithmetic_prints_as_python_operators(program: Program) -> None:
    editor = Editor(program)
    (relu,) = program.calls(aten.relu.default)
    with editor.after(relu):
        size = editor.call(aten.sym_size.int, relu, 0)
        with editor.after(size):
            editor.call(operator.add, size, 1)
    assert "size(s0 + 1) = py.add(%2, 1)" in program.text()


class Pad(nn.Module):
    """Pads to a multiple of 4 rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(x, (0, 0, 0, -x.shape[0] % 4))


class Find(nn.Module):
    """The places of what is positive in two tensors."""

    def forward(
        self, x: torch.Tensor, y: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        first, second = (x > 0).nonzero(), (y > 0).nonzero()
        return first, second, first.neg()


def test_verify_shapes_knows_pads_by_symbolic_sizes() -> None:
    program = capture_module(Pad(), torch.randn(6, 4))
    (pad,) = program.calls(aten.constant_pad_nd.default, aten.pad.default)
    assert isinstance(pad.meta["val"].shape[0], torch.SymInt)
    program.verify(shapes=True)


def test_verify_shapes_compares_sizes_that_depend_on_data_up_to_their_names() -> None:
    program = capture_module(Find(), (torch.randn(5, 4), torch.randn(5, 4)))
    first, second = program.calls(aten.nonzero.default)
    (negative,) = program.calls(aten.neg.default)
    program.verify(shapes=True)
    program.verify(shapes=True)

    negative.meta["val"] = second.meta["val"]
    with pytest.raises(MalformedProgramError, match="node 'neg'"):
        program.verify(shapes=True)
    negative.meta["val"] = first.meta["val"]
    first.meta["val"] = first.meta["val"][:, :1]
    with pytest.raises(MalformedProgramError, match="node 'nonzero'"):
        program.verify(shapes=True)


class Join(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cat((x, y, x))


class JoinUnderOtherNames(nn.Module):
    def forward(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((y, x, y))


def test_text_does_not_depend_on_the_names_of_symbols() -> None:
    inputs = (torch.randn(3, 4), torch.randn(5, 4))
    one, other = (capture_module(module, inputs) for module in (Join(), JoinUnderOtherNames()))
    # Whatever the symbols are called, one of the two has them in the other order.
    symbols = [[str(n.meta["val"].shape[0]) for n in program.inputs] for program in (one, other)]
    assert symbols[0] == symbols[1][::-1]
    assert "f32[2*s0 + s2, s1] = aten.cat" in one.text()
    swapped = other.text().replace("%x", "%z").replace("%y", "%x").replace("%z", "%y")
    assert swapped == one.text()
