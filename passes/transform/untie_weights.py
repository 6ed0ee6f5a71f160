"""Weights that serve two purposes become two weights."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.passes.infra import Context, Exact, Pass, PassResult


class UntieWeights(Pass):
    """One weight with users of different operators  =>  one weight per operator.

    A tied token embedding is the usual case: its rows are looked up and are the output projection
    as well, so neither can take a transform that is not meant for the other. It costs the bits of
    a second copy, which the result's details state.
    """

    numerics = Exact()

    def run(self, program: Program, context: Context) -> PassResult:
        """Unties every weight of two and more dimensions."""
        del context
        result = PassResult()
        for name, groups in _users_by_operator(program).items():
            for users in list(groups.values())[1:]:
                twin = untie(program, name, users)
                result.rewrites += 1
                extra = program.weights.spec(name).bytes * 8
                result.details.append({"weight": name, "copy": twin, "extra_bits": extra})
        return result


def untie(program: Program, name: str, users: Iterable[fx.Node]) -> str:
    """Gives some users of a weight an entry of their own, and returns its name."""
    twin, i = f"{name}_untied", 2
    while twin in program.weights:
        twin, i = f"{name}_untied{i}", i + 1
    program.weights.define(twin, program.weights.expression(name), program.weights.spec(name))
    editor = Editor(program)
    for user in users:
        with editor.before(user):
            own = editor.weight(twin)
        for reference in [n for n in user.all_input_nodes if n.op == "get_attr"]:
            if reference.target == name:
                user.replace_input_with(reference, own)
    return twin


def own_weight(program: Program, name: str, user: fx.Node) -> tuple[str, bool]:
    """The name of a weight that only one call reads afterwards, and whether it was untied for it.

    Args:
        program: Edited in place where the weight has other users.
        name: The weight.
        user: The call that is to have it for itself.
    """
    users = {
        u for reference in program.parameters() if reference.target == name for u in reference.users
    }
    return (name, False) if users == {user} else (untie(program, name, [user]), True)


def _users_by_operator(program: Program) -> dict[str, dict[object, list[fx.Node]]]:
    found: dict[str, dict[object, list[fx.Node]]] = {}
    for reference in program.parameters():
        name = str(reference.target)
        if len(program.weights.spec(name).shape) >= 2:
            for user in reference.users:
                found.setdefault(name, {}).setdefault(user.target, []).append(user)
    return {name: groups for name, groups in found.items() if len(groups) > 1}
