"""A rule and a pass of one's own, put into the pipeline of qcompile.

Run it with ``python examples/custom_pass.py``: it prints a small model before and after.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

import qcompile as qc
from qcompile.frontends.torch_export import capture_module
from qcompile.ir.edit import Editor
from qcompile.ir.types import Fact
from qcompile.passes.infra import Context, Pass, PassManager, PassResult, Skip
from qcompile.passes.rule import ApplyRules, Const, Match, Rule
from qcompile.pipeline import front_phases

aten = torch.ops.aten


class MergeScales(Rule):
    """x * a * b   =>   x * (a b)"""

    def pattern(self, x: Tensor, a: Const, b: Const) -> Any:
        """Two multiplications by numbers, the inner one used nowhere else."""
        return x * a * b

    def rewrite(self, match: Match, edit: Editor) -> fx.Node:
        """One multiplication."""
        return edit.call(aten.mul.Tensor, match["x"], match["a"] * match["b"])


class FoldScale(Pass):
    """linear(x, W, b) * c   =>   linear(x, c W, c b)"""

    requires = frozenset({Fact.CANONICAL})

    def run(self, program: qc.Program, context: Context) -> PassResult:
        """Derives scaled weights, lazily, and drops the multiplications."""
        del context
        result, edit = PassResult(), Editor(program)
        for scale in program.calls(aten.mul.Tensor):
            layer, factor = scale.args
            if not (isinstance(layer, fx.Node) and isinstance(factor, float)):
                continue
            if layer.target is not aten.linear.default or len(layer.users) > 1:
                result.skips.append(Skip(scale.name, "scales no layer, or one used elsewhere too"))
                continue
            for weight in layer.all_input_nodes[1:]:
                with edit.before(layer):
                    layer.replace_input_with(weight, scaled(edit, str(weight.target), factor))
            scale.replace_all_uses_with(layer)
            result.rewrites += 1
        return result


def scaled(edit: Editor, name: str, factor: float) -> fx.Node:
    """A reference to a new weight: `factor` times an existing one."""
    weights, new = edit.program.weights, f"{name}.scaled"
    weights.derive(
        new, (name,), lambda w: w * factor, weights.spec(name), exact=False, label="scale"
    )
    return edit.weight(new)


class Block(nn.Module):
    """A residual block whose branch is scaled twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 8]`` to ``[B, 8]``."""
        branch: Tensor = self.down(torch.relu(self.up(x)))
        return x + 0.25 * (0.5 * branch)


def main() -> None:
    """Captures the block, runs qcompile's front passes with ours among them, and compares."""
    torch.manual_seed(0)
    block, x = Block(), torch.randn(4, 8)
    captured = capture_module(block, x)

    manager = PassManager(front_phases())
    manager.insert_after("fold_parameters", ApplyRules([MergeScales()], name="merge_scales"))
    manager.insert_after("merge_scales", FoldScale())
    program, records = manager.run(captured)

    print(f"before:\n{captured.text()}\nafter:\n{program.text()}")
    for record in records:
        if record.result.modified:
            print(f"{record.name}: {record.result.rewrites} rewrites")
    difference = (program(x) - block(x)).abs().max() / block(x).abs().max()
    print(f"relative difference: {difference:.0e}")


if __name__ == "__main__":
    main()
