"""Two programs side by side, stage by stage, on the same inputs.

This is the judge of what passes promised as a whole: real weights, unrounded, in float64, small
random inputs with left padding, once without and once over a past. A stage's weights are
materialized once for both programs and both inputs, and freed before the next stage.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from qcompile.analysis.stages import Flow, Stage, stages
from qcompile.errors import EquivalenceError
from qcompile.ir.program import Program
from qcompile.ir.text import format_target
from qcompile.passes.equivalence.cache_basis import from_cache_basis
from qcompile.passes.equivalence.cases import Case, cases
from qcompile.passes.equivalence.compare import difference
from qcompile.passes.equivalence.evaluate import CannotRunError, Evaluator, Weights, held_key

TOLERANCE = 1e-10

Through = Mapping[str, Callable[[Tensor], Tensor]]
"""From the name of a stage's boundary value in the program before, to what takes that value into
the basis in which the program after has it."""


@dataclass(frozen=True)
class Agreement:
    """What a comparison in lockstep found.

    Attributes:
        error: The largest relative difference of any result, in float64.
        boundary_error: The largest relative difference of a value between stages; None if the
            two programs do not have the same stages.
        stages: Number of stages of the program after.
        peak_weight_bytes: The most bytes of weights that were held at a time.
    """

    error: float
    boundary_error: float | None
    stages: int
    peak_weight_bytes: int


def lockstep(
    before: Program,
    after: Program,
    *,
    tolerance: float = TOLERANCE,
    through: Through | None = None,
    seed: int = 0,
    only_last_case: bool = False,
) -> Agreement | None:
    """Runs two programs on the same inputs and compares what they return.

    What counts is what the programs return. Values at stage boundaries only tell where to look,
    except those that `through` relates: a pass may rotate the residual stream.

    Args:
        before: The reference.
        after: What passes made of it.
        tolerance: Bound on max |difference| / max |reference|, for each result.
        through: How boundary values are related.
        seed: For the inputs.
        only_last_case: Whether to leave out the prompt without a past, for programs whose weights
            are expensive to decode.

    Returns:
        How well they agree; None if the reference itself does not run in float64.

    Raises:
        EquivalenceError: If they do not; names the first node that differs.
    """
    for traced_sizes in (False, True):
        inputs = cases(before, seed, traced_sizes=traced_sizes)[-1 if only_last_case else 0 :]
        try:
            return _Comparison(before, after, inputs, tolerance, through or {}).run()
        except _ReferenceError:
            continue
    return None


class _ReferenceError(Exception):
    """The program before does not run."""


class _Side:
    """One of the two programs, and the values that later stages need."""

    def __init__(self, program: Program, inputs: Sequence[Case], weights: Weights) -> None:
        self.program = program
        self.stages = stages(program)
        flow = Flow(program)
        self.nodes = flow.order
        self._constant = flow.constant
        self.evaluator = Evaluator(program, self._constant, weights)
        self.envs: list[dict[fx.Node, Any]] = [dict(case.bind(program)) for case in inputs]
        self._last_reader = {
            node: stage.index for stage in self.stages for node in stage.inputs
        } | dict.fromkeys(program.results, len(self.stages))
        self._uses: dict[Hashable, tuple[int, int]] = {}
        for stage in self.stages:
            for node in stage.nodes:
                if node in self._constant:
                    key = held_key(program, node)
                    first, _ = self._uses.get(key, (stage.index, 0))
                    self._uses[key] = (first, stage.index)

    def run(self, stage: Stage) -> None:
        """Adds the values of a stage."""
        for env in self.envs:
            self.evaluator.run(stage.nodes, env)

    def tied_after(self, stage: Stage) -> set[Hashable]:
        """Keys of what is held up to a stage and read by a later one too, such as a tied table."""
        return {key for key, (first, last) in self._uses.items() if first <= stage.index < last}

    def forget(self, stage: Stage, *, only_weights: bool = False) -> None:
        """Drops what a stage computed or read and no later one reads.

        Args:
            stage: The stage.
            only_weights: Whether to keep all but what depends on weights alone.
        """
        for node in (*stage.nodes, *stage.inputs):
            is_kept = only_weights and node not in self._constant
            if not is_kept and self._last_reader.get(node, -1) <= stage.index:
                for env in self.envs:
                    env.pop(node, None)


class _Comparison:
    def __init__(
        self,
        before: Program,
        after: Program,
        inputs: Sequence[Case],
        tolerance: float,
        through: Through,
    ) -> None:
        self.inputs = inputs
        self.tolerance = tolerance
        self.through = through
        self.weights = Weights()
        self.programs = (before, after)
        self.stages = 0
        self.error = 0.0
        self.boundary_error = 0.0

    def run(self) -> Agreement:
        """Compares the results.

        Raises:
            EquivalenceError: See `lockstep`.
        """
        before, after = self.programs
        if len(before.results) != len(after.results):
            raise EquivalenceError(
                f"the program returns {len(after.results)} values, it returned "
                f"{len(before.results)}"
            )
        try:
            aligned = self._walk(strict=False)
        except _DivergenceError as error:
            raise EquivalenceError(self._first_divergence(error)) from error
        return Agreement(
            self.error,
            self.boundary_error if aligned else None,
            self.stages,
            self.weights.peak_bytes,
        )

    def _walk(self, *, strict: bool) -> bool:
        """Runs both programs; whether their stages correspond.

        Args:
            strict: Whether every value that both programs have must agree, not only results.
        """
        old, new = (_Side(program, self.inputs, self.weights) for program in self.programs)
        self.weights.release()
        self.stages = len(new.stages)
        compared: set[int] = set()
        if [stage.block for stage in old.stages] != [stage.block for stage in new.stages]:
            self._run_apart(old, new, strict=strict)
            self._compare_results(old, new, compared)
            return False
        for one, other in zip(old.stages, new.stages, strict=True):
            self._run_reference(old, one)
            new.run(other)
            self.weights.release(keep=old.tied_after(one) | new.tied_after(other))
            if strict:
                self._compare_twins(old, one.nodes, new, other.nodes)
            self._compare_results(old, new, compared)
            self._compare_boundaries(old, one, new, other)
            old.forget(one)
            new.forget(other)
        return True

    def _run_apart(self, old: _Side, new: _Side, *, strict: bool) -> None:
        """Runs one program after the other, where their stages do not correspond."""
        for stage in old.stages:
            self._run_reference(old, stage)
            self.weights.release(keep=old.tied_after(stage))
            # A search needs every value for a comparison later, and still no weight.
            old.forget(stage, only_weights=strict)
        self.weights.release()
        for stage in new.stages:
            new.run(stage)
            self.weights.release(keep=new.tied_after(stage))
            if strict:
                self._compare_twins(old, old.nodes, new, stage.nodes)
            new.forget(stage)

    def _run_reference(self, old: _Side, stage: Stage) -> None:
        try:
            old.run(stage)
        except CannotRunError as error:
            raise _ReferenceError from error

    def _compare_results(self, old: _Side, new: _Side, compared: set[int]) -> None:
        pairs = zip(old.program.results, new.program.results, strict=True)
        for position, (one, other) in enumerate(pairs):
            ready = all(
                node in env for side, node in ((old, one), (new, other)) for env in side.envs
            )
            if position not in compared and ready:
                compared.add(position)
                self.error = max(self.error, self._difference(old, one, new, other))

    def _compare_boundaries(self, old: _Side, one: Stage, new: _Side, other: Stage) -> None:
        if one.boundary is None or other.boundary is None:
            return
        relation = self.through.get(one.boundary.name)
        for case, env, twin in zip(self.inputs, old.envs, new.envs, strict=True):
            expected = env[one.boundary]
            if relation is not None:
                expected = relation(expected)
            error = difference(case, one.boundary, expected, twin[other.boundary])
            if relation is not None and error > self.tolerance:
                raise _DivergenceError(other.boundary, error, case, is_first=True)
            self.boundary_error = max(self.boundary_error, error)

    def _compare_twins(
        self, old: _Side, nodes: Iterable[fx.Node], new: _Side, others: Iterable[fx.Node]
    ) -> None:
        twins = {node.name: node for node in nodes}
        for node in others:
            twin = twins.get(node.name)
            known = all(node in env for env in new.envs) and all(twin in env for env in old.envs)
            is_call = node.op == "call_function"
            if twin is not None and is_call and known and twin.target == node.target:
                self._difference(old, twin, new, node)

    def _difference(self, old: _Side, one: fx.Node, new: _Side, other: fx.Node) -> float:
        largest = 0.0
        for case, env, twin in zip(self.inputs, old.envs, new.envs, strict=True):
            expected = from_cache_basis(old.program, one, env[one])
            error = difference(
                case, one, expected, from_cache_basis(new.program, other, twin[other])
            )
            if error > self.tolerance:
                raise _DivergenceError(other, error, case)
            largest = max(largest, error)
        return largest

    def _first_divergence(self, found: _DivergenceError) -> str:
        """Looks for the first value that both programs have and that differs."""
        if not found.is_first:
            try:
                self._walk(strict=True)
            except _DivergenceError as earlier:
                found = earlier
        return (
            f"node '{found.node.name}' ({format_target(found.node.target)}) no longer computes the "
            f"same {found.case.label}: relative difference {found.error:.1e}, allowed "
            f"{self.tolerance:.0e}"
        )


class _DivergenceError(Exception):
    """Two values differ.

    Attributes:
        is_first: Whether it is known that no earlier value is to blame.
    """

    def __init__(self, node: fx.Node, error: float, case: Case, *, is_first: bool = False) -> None:
        super().__init__(node.name)
        self.is_first = is_first
        self.node = node
        self.error = error
        self.case = case
