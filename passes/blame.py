"""Which rewrite broke a pass: the pass is run again, up to one rewrite and up to another.

This costs nothing as long as passes are right. The judge is the one that refused the pass, so a
rewrite that relies on what stands around its match is not blamed for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from qcompile.errors import EquivalenceError
from qcompile.ir.program import Program

if TYPE_CHECKING:
    from qcompile.passes.infra import Context, Pass
    from qcompile.passes.rule import Rewrite


def blame_rewrite(
    item: Pass, before: Program, context: Context, check: Callable[[Program], object]
) -> str:
    """Names the rewrite without which a broken pass would still hold.

    Args:
        item: A pass that `check` refuses.
        before: The program that it was given.
        context: The context that it was run in.
        check: Raises `EquivalenceError` for a program that is not equivalent to `before`.

    Returns:
        ``"rule 'name' at 'node': "``, or nothing if the pass consists of no rewrites of rules.
    """
    rewrites: list[Rewrite] = []
    item.run(before.copy(), replace(context, on_rewrite=rewrites.append))
    right, wrong = 0, len(rewrites)
    while wrong - right > 1:
        middle = (right + wrong) // 2
        try:
            check(_run_up_to(middle, item, before, context))
        except EquivalenceError:
            wrong = middle
        else:
            right = middle
    if not rewrites:
        return ""
    culprit = rewrites[wrong - 1]
    return f"rule '{culprit.rule.name}' at '{culprit.match.outputs[0].name}': "


class _EnoughError(Exception):
    """So many rewrites were wanted, and this one no more."""

    def __init__(self, unwanted: Rewrite) -> None:
        super().__init__(unwanted.rule.name)
        self.unwanted = unwanted


def _run_up_to(count: int, item: Pass, before: Program, context: Context) -> Program:
    """What a pass makes of a program with its first `count` rewrites."""
    program, left = before.copy(), count

    def stop(rewrite: Rewrite) -> None:
        nonlocal left
        if left == 0:
            raise _EnoughError(rewrite)
        left -= 1

    try:
        item.run(program, replace(context, on_rewrite=stop))
    except _EnoughError as error:
        # It has added nodes that nobody uses yet, and perhaps weights.
        program.weights = error.unwanted.weights
        program.tidy()
    return program
