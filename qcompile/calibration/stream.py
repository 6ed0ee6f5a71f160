"""Walking a program over calibration data, part by part.

A `Stream` computes, for all micro-batches, what leads to the values that it is asked for, shows
these to statistics, and keeps of the rest what is still needed: at a decoder block's boundary that
is the residual stream alone. Weights are in memory only while their part runs, and may be replaced
by others for what follows, such as the decoded values of codes that were chosen on the way.

Results do not depend on the number of threads or on the memory limit: a micro-batch runs on one
thread, results are added up in order, and a value is the same in memory and in a file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.analysis.stages import Flow
from qcompile.calibration.parallel import fast_products, ordered_map
from qcompile.calibration.part import (
    Part,
    Piece,
    Prepared,
    compute_node,
    digest,
    digest_value,
)
from qcompile.calibration.requests import (
    Request,
    Statistics,
    empty_statistic,
    layer_requests,
    linear_inputs,
    see,
)
from qcompile.calibration.samples import CalibrationData
from qcompile.calibration.statistics import Routed, Statistic
from qcompile.calibration.store import ActivationStore, release_freed_memory
from qcompile.errors import ModelError
from qcompile.formats.row_blocks import operators_on_one_thread
from qcompile.ir.program import Program

Hook = Callable[[Tensor], Tensor]
"""What becomes of a value as soon as it is computed, such as rounding it."""


@dataclass(frozen=True)
class NumericPlan:
    """What rounding depends on; the number of threads and the memory limit are not among it.

    Attributes:
        batch_tokens: Tokens of a micro-batch.
    """

    batch_tokens: int = 2048

    def key(self) -> dict[str, str]:
        """The plan, with the versions and instruction set that it holds for."""
        capability = torch.backends.cpu.get_cpu_capability()
        return {
            **{name: str(value) for name, value in asdict(self).items()},
            "torch": torch.__version__,
            "cpu": capability,
        }


DEFAULT_PLAN = NumericPlan()


class Stream:
    """A program on its way over calibration data.

    Args:
        program: The program; it is neither changed nor may it be while the stream is open.
        data: What it runs on.
        targets: All values that will be observed; nothing that does not lead to them is computed.
        hooks: What becomes of values as they are computed.
        memory_limit: Bytes of this process past which activations go to files.
        work_directory: Where those files are made.
        plan: What rounding depends on.

    Attributes:
        batches: Number of micro-batches.

    Raises:
        ModelError: The data does not fit the program's signature.
    """

    def __init__(
        self,
        program: Program,
        data: CalibrationData,
        targets: Iterable[fx.Node],
        *,
        hooks: Mapping[fx.Node, Hook] | None = None,
        memory_limit: int | None = None,
        work_directory: Path | None = None,
        plan: NumericPlan = DEFAULT_PLAN,
    ) -> None:
        self._program = program
        self._inputs = linear_inputs(program)
        self._hooks = dict(hooks or {})
        self._pending = set(targets)
        self._constant = Flow(program).constant
        self._order = {node: i for i, node in enumerate(program.graph.nodes)}
        self._needed = self._ancestors(self._pending, set())
        self._computed = {n for n in program.graph.nodes if n.op == "placeholder"}
        self._overrides: dict[str, Callable[[], Tensor]] = {}
        self._skipped: list[tuple[Part, dict[str, Callable[[], Tensor]]]] = []
        self._held: tuple[fx.Node, ...] = ()
        self._prepared: Prepared | None = None
        self._key = digest(data.fingerprint(), repr(sorted(plan.key().items())))
        self._store = ActivationStore(memory_limit, work_directory)
        bound = data.batches(program, plan.batch_tokens)
        self.batches = len(bound)
        for batch, values in enumerate(bound):
            for node, value in zip(program.inputs, values, strict=True):
                if node in self._needed:
                    floating = value.is_floating_point()
                    self._store.put(batch, node, value.float() if floating else value)

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._store.close()

    def override(self, name: str, value: Callable[[], Tensor]) -> None:
        """From here on, an entry of the weight store has other numbers.

        Args:
            name: The entry.
            value: Makes a float32 tensor of its shape, whenever it is needed.
        """
        self._overrides[name] = value
        self._prepared = None

    def key(self, values: Sequence[fx.Node], *, again: Collection[fx.Node] = ()) -> str:
        """A hash of all that decides about some values: what `observe` would collect of them.

        Of the data, the numeric plan, and every node and weight that led here, by contents.

        Args:
            values: As `observe` will be asked for.
            again: Those of them that will be asked for once more, later.
        """
        return self._prepare(values, leaving=_without(values, again)).key

    def skip(
        self,
        values: Sequence[fx.Node],
        *,
        instead: Sequence[fx.Node] = (),
        again: Collection[fx.Node] = (),
    ) -> None:
        """Goes on as if some values had been observed; computes them only if it must, later.

        Args:
            values: Among the targets.
            instead: Where to go on to, if not as far as `values`: nodes behind them.
            again: Those of the values that will be asked for once more, later.
        """
        leaving = _without(values, again)
        if instead:
            self._pending.difference_update(leaving)
            prepared = self._prepare(instead, leaving=())
        else:
            prepared = self._prepare(values, leaving=leaving)
        self._skipped.append((prepared.part, dict(self._overrides)))
        self._advance(prepared, leaving)

    def reach(
        self, values: Sequence[fx.Node], *, on_batch: Callable[[], None] | None = None
    ) -> None:
        """Computes some values and keeps them, for `value`, until the next ones are reached.

        Args:
            values: Among the targets.
            on_batch: Called after each micro-batch.
        """
        self._pending.difference_update(self._held)
        prepared = self._prepare(values, leaving=())
        self._catch_up()
        self._run(prepared.part, prepared.constants, (), False, on_batch)
        self._advance(prepared, ())
        self._held = tuple(values)

    def piece(self, values: Sequence[fx.Node]) -> Piece:
        """What there is to compute between where the data stands and some values.

        Args:
            values: Among the targets.
        """
        prepared = self._prepare(values, leaving=values)
        self._catch_up()
        return Piece(prepared.part.nodes, prepared.part.reads, prepared.constants)

    def value(self, batch: int, node: fx.Node) -> Any:
        """A value that was reached, or that the next piece reads; not to be written to."""
        return self._store.get(batch, node)

    def observe(
        self,
        requests: Sequence[Request],
        *,
        again: Collection[fx.Node] = (),
        stay: bool = False,
        on_batch: Callable[[], None] | None = None,
    ) -> Statistics:
        """Runs as far as the requested values and collects their statistics.

        Args:
            requests: Of values among the targets; their order does not matter.
            again: Those of the values that will be asked for once more, later.
            stay: Whether to run this part again later, with other weights perhaps. What is
                computed is then not kept.
            on_batch: Called after each micro-batch.

        Raises:
            DataError: A node cannot run on this data.
            ModelError: A value is not finite.
        """
        values = list(dict.fromkeys(node for request in requests for node in request.nodes))
        leaving = _without(values, again)
        prepared = self._prepare(values, leaving=leaving)
        self._catch_up()
        totals = self._run(prepared.part, prepared.constants, requests, stay, on_batch)
        if not stay:
            self._advance(prepared, leaving)
        return self._results(requests, totals)

    def _catch_up(self) -> None:
        """Computes what was skipped."""
        for part, overrides in self._skipped:
            self._run(part, self._constants(part.nodes, overrides), (), False, None)
        self._skipped.clear()

    def _run(
        self,
        part: Part,
        constants: Mapping[fx.Node, Any],
        requests: Sequence[Request],
        stay: bool,
        on_batch: Callable[[], None] | None,
    ) -> list[Statistic | Routed]:
        """Computes a part for all micro-batches and stores what is needed of it later."""

        def compute(batch: int) -> tuple[dict[fx.Node, Any], list[Statistic | Routed]]:
            env = {**constants, **{node: self._store.get(batch, node) for node in part.reads}}
            for node in part.nodes:
                env[node] = self._compute(node, env)
                for value in part.releases.get(node, ()):
                    del env[value]
            seen = [see(request, env) for request in requests]
            return ({} if stay else {node: env[node] for node in part.keeps}), seen

        totals = [empty_statistic(request) for request in requests]
        with fast_products():
            for batch, (values, seen) in enumerate(ordered_map(compute, range(self.batches))):
                for total, more in zip(totals, seen, strict=True):
                    total.merge(more)  # type: ignore[arg-type]  # both are made by one request
                for node in () if stay else part.drops:
                    self._store.drop(batch, node)
                for node, value in values.items():
                    self._store.put(batch, node, value)
                if on_batch is not None:
                    on_batch()
        return totals

    def _prepare(self, values: Sequence[fx.Node], *, leaving: Sequence[fx.Node]) -> Prepared:
        """The part that leads to some values, its weights in memory, and the key of it all.

        Args:
            values: Where to run to.
            leaving: Targets that nobody will ask for after that.
        """
        asked = tuple(values), tuple(leaving)
        if self._prepared is None or self._prepared.asked != asked:
            self._prepared = None  # its weights may go first
            release_freed_memory()
            part = self._part(values, leaving)
            constants = self._constants(part.nodes, self._overrides)
            contents = [part.text(), *(digest_value(v) for v in constants.values())]
            self._prepared = Prepared(asked, part, constants, digest(self._key, *contents))
        return self._prepared

    def _advance(self, prepared: Prepared, values: Iterable[fx.Node]) -> None:
        self._key = prepared.key
        self._computed.update(prepared.part.nodes)
        self._pending.difference_update(values)
        self._prepared = None

    def _part(self, values: Sequence[fx.Node], leaving: Sequence[fx.Node]) -> Part:
        """What has to run for some values to be known."""
        unknown = [value.name for value in leaving if value not in self._pending]
        if unknown:
            raise ValueError(f"not among the targets that are left: {', '.join(unknown)}")
        nodes = sorted(self._ancestors(values, self._computed), key=self._order.__getitem__)
        inside = set(nodes)
        operands = (n for node in nodes for n in node.all_input_nodes)
        outside = (n for n in (*operands, *values) if n not in inside and n not in self._constant)
        reads = tuple(dict.fromkeys(outside))
        live = self._live(self._computed | inside, self._pending.difference(leaving))
        keeps = tuple(node for node in nodes if node in live)
        last_reader = {n: node for node in nodes for n in node.all_input_nodes}
        releases: dict[fx.Node, list[fx.Node]] = {}
        for value, reader in last_reader.items():
            if value not in self._constant and value not in live and value not in values:
                releases.setdefault(reader, []).append(value)
        drops = tuple(node for node in reads if node not in live)
        return Part(tuple(nodes), reads, keeps, drops, releases)

    def _live(self, computed: set[fx.Node], pending: set[fx.Node]) -> set[fx.Node]:
        """Computed values that lead to the pending ones."""
        missing = self._ancestors(pending, computed)
        read = {n for node in missing for n in node.all_input_nodes}
        return ((read | pending) & computed) - self._constant

    def _ancestors(self, values: Iterable[fx.Node], known: set[fx.Node]) -> set[fx.Node]:
        """What has to be computed for some values, given others; constants apart."""
        found: set[fx.Node] = set()
        waiting = list(values)
        while waiting:
            node = waiting.pop()
            if node not in found and node not in known and node not in self._constant:
                found.add(node)
                waiting += node.all_input_nodes
        return found

    def _constants(
        self, nodes: Sequence[fx.Node], overrides: Mapping[str, Callable[[], Tensor]]
    ) -> dict[fx.Node, Any]:
        """What some nodes read that depends on weights alone, in graph order."""

        def materialize(node: fx.Node) -> Tensor:
            made = overrides.get(str(node.target))
            return self._program.weights.materialize(str(node.target)) if made is None else made()

        read = {n for node in nodes for n in node.all_input_nodes if n in self._constant}
        found, waiting = set(read), list(read)
        while waiting:
            for operand in waiting.pop().all_input_nodes:
                if operand not in found:
                    found.add(operand)
                    waiting.append(operand)
        ordered = sorted(found, key=self._order.__getitem__)
        weights = [node for node in ordered if node.op == "get_attr"]
        env: dict[fx.Node, Any] = dict(zip(weights, ordered_map(materialize, weights), strict=True))
        with operators_on_one_thread(), torch.no_grad():
            for node in ordered:
                if node.op != "get_attr":
                    env[node] = self._compute(node, env)
        return {node: env[node] for node in ordered if node in read}

    def _compute(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        value = compute_node(node, env)
        hook = self._hooks.get(node)
        return value if hook is None else hook(value)

    def _results(
        self, requests: Sequence[Request], totals: Sequence[Statistic | Routed]
    ) -> Statistics:
        result = Statistics(self._inputs)
        for request, total in zip(requests, totals, strict=True):
            if not total.finite():
                readers = self._readers(request)
                met = f", the input of {', '.join(readers)}," if readers else ""
                raise ModelError(
                    f"value '{request.value.name}'{met} is not finite on the calibration data",
                    remedy="its weights or its arithmetic overflow: check the model in float32",
                )
            if isinstance(total, Routed):
                result.routed[request.value.name, type(total.parts[0])] = total
            else:
                result.collected[request.value.name, type(total), request.channels] = total
        return result

    def _readers(self, request: Request) -> list[str]:
        """The weights that a value is multiplied with, by name."""
        matching = layer_requests(self._program, request.statistic)
        return [
            name
            for name, requests in matching.items()
            if (request.value, request.routing) in [(r.value, r.routing) for r in requests]
        ]


def _without(values: Sequence[fx.Node], others: Collection[fx.Node]) -> list[fx.Node]:
    return [value for value in values if value not in others]
