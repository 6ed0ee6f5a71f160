"""What every program must satisfy, checked after every pass."""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils._sympy.symbol import SymT, symbol_is_type

from qcompile.errors import EquivalenceError
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.sizes import expression, is_symbolic
from qcompile.ir.text import format_target
from qcompile.ir.types import Role

PYTHON_OPERATORS = frozenset(
    {operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.neg}
    | {operator.mod, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge}
    | {operator.truediv, operator.pow, torch.sym_max, torch.sym_min, torch.sym_int}
    | {torch.sym_float, torch.sym_not, torch.sym_ite, operator.and_, operator.or_}
)
"""Arithmetic on sizes that may stand between operators."""


class MalformedProgramError(EquivalenceError):
    """A pass left a program that breaks the rules of the IR: a defect of that pass."""


def verify_program(program: Program, *, shapes: bool = False) -> None:
    """Checks structure, weights, signature and functional form.

    Args:
        program: The program.
        shapes: Also run every node's shape rule again and compare (slower).

    Raises:
        MalformedProgramError: Names the first offending node.
    """
    try:
        program.graph.lint()
    except RuntimeError as error:
        raise MalformedProgramError(f"the graph is not well formed: {error}") from error
    _verify_signature(program)
    for node in program.graph.nodes:
        _verify_node(program, node)
    if shapes:
        _verify_shapes(program)


def _verify_signature(program: Program) -> None:
    for what, ports, nodes in (
        ("inputs", program.signature.inputs, program.inputs),
        ("outputs", program.signature.outputs, program.results),
    ):
        if len(ports) != len(nodes):
            raise MalformedProgramError(
                f"the signature has {len(ports)} {what}, the graph has {len(nodes)}"
            )


def _verify_node(program: Program, node: fx.Node) -> None:
    if node.op == "output":
        return
    if "val" not in node.meta:
        raise MalformedProgramError(f"node '{node.name}' has no shape (meta['val'])")
    match node.op:
        case "placeholder":
            return
        case "get_attr":
            _verify_weight(program, node)
        case "call_function":
            _verify_call(node)
        case other:
            raise MalformedProgramError(f"node '{node.name}' has kind '{other}'")


def _verify_weight(program: Program, node: fx.Node) -> None:
    name = str(node.target)
    if name not in program.weights:
        raise MalformedProgramError(f"node '{node.name}' names '{name}', which has no weight")
    spec, value = program.weights.spec(name), node.meta["val"]
    if tuple(value.shape) != spec.shape or value.dtype != spec.dtype:
        raise MalformedProgramError(
            f"weight '{name}' is {spec.dtype}{list(spec.shape)}, the graph has "
            f"{value.dtype}{list(value.shape)}"
        )


def _verify_call(node: fx.Node) -> None:
    if isinstance(node.target, torch._ops.OpOverload):
        if node.target._schema.is_mutable:
            raise MalformedProgramError(
                f"node '{node.name}' calls '{format_target(node.target)}', which writes in place"
            )
    elif node.target not in PYTHON_OPERATORS:
        raise MalformedProgramError(
            f"node '{node.name}' calls '{node.target}', which is no operator of the IR"
        )


def _verify_shapes(program: Program) -> None:
    editor = Editor(program)
    known = size_identities(program)
    for node in program.calls():
        expected, found = _shape(editor.infer(node), known), _shape(node.meta["val"], known)
        operands = [operand.meta["val"] for operand in node.all_input_nodes]
        if not _same_but_for_names(expected, found, _symbols(_shape(operands, known))):
            raise MalformedProgramError(
                f"node '{node.name}' ({format_target(node.target)}) says {found}, "
                f"its shape rule gives {expected}"
            )


def size_identities(program: Program) -> dict[Any, Any]:
    """What the signature says of symbolic sizes: a mask is as long as past and query together."""
    sizes = {
        port.role: node.meta["val"].shape
        for node, port in zip(program.inputs, program.signature.inputs, strict=True)
        if isinstance(node.meta["val"], Tensor)
    }
    needed = (Role.INPUT_IDS, Role.ATTENTION_MASK, Role.PAST_KEY)
    if any(role not in sizes for role in needed):
        return {}
    query, total, past = sizes[needed[0]][1], sizes[needed[1]][1], sizes[needed[2]][2]
    if not all(map(is_symbolic, (query, total, past))):
        return {}
    return {expression(total): expression(past) + expression(query)}


def _shape(value: Any, known: dict[Any, Any]) -> Any:
    """Dtype and sizes of a value, lists of them for several values."""
    if isinstance(value, Tensor):
        return [value.dtype, *(_shape(size, known) for size in value.shape)]
    if isinstance(value, (list, tuple)):
        return [_shape(item, known) for item in value]
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return _expanded(value.node.expr.subs(known))
    return value


def _expanded(term: Any) -> Any:
    return sympy.expand(term) if isinstance(term, sympy.Expr) else term


def _same_but_for_names(expected: Any, found: Any, given: set[sympy.Symbol]) -> bool:
    """Whether two shapes are the same, up to the names of sizes that are measured here.

    A size that depends on data has a new name every time it is measured; `given` are the names
    that the operands bring along.
    """
    renamed: dict[sympy.Symbol, sympy.Symbol] = {}
    pending = [(expected, found)]
    while pending:
        one, other = pending.pop()
        if isinstance(one, list) and isinstance(other, list):
            if len(one) != len(other):
                return False
            pending += zip(one, other, strict=True)
        elif _is_measured(one, given) and _is_measured(other, given):
            if renamed.setdefault(one, other) != other:
                return False
        elif str(one) != str(other):
            return False
    return len(set(renamed.values())) == len(renamed)


def _is_measured(term: Any, given: set[sympy.Symbol]) -> bool:
    """Whether a term is a new symbol, to which only running the program gives a value."""
    kinds = (SymT.UNBACKED_INT, SymT.UNBACKED_FLOAT)
    return isinstance(term, sympy.Symbol) and term not in given and symbol_is_type(term, kinds)


def _symbols(shape: Any) -> set[sympy.Symbol]:
    if isinstance(shape, list):
        return {symbol for item in shape for symbol in _symbols(item)}
    return set(getattr(shape, "free_symbols", ()))
