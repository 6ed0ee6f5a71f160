"""What `inspect` finds of a model, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qcompile.analysis.cost import Cost, Sizes
from qcompile.artifact_inspection import SCHEMA_VERSION


@dataclass(frozen=True)
class PortSummary:
    """One input or output, such as ``logits: float32[batch, query, 49152]``."""

    name: str
    role: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class PhaseSummary:
    """The program after a phase.

    Attributes:
        name: ``capture``, ``canonicalize``, ``raise``, a step of the recipe, or ``lower``.
        nodes: Nodes of the graph.
        operators: Calls by operator.
        text: The program's text, where it was asked for.
    """

    name: str
    nodes: int
    operators: Mapping[str, int]
    text: str | None = None


@dataclass(frozen=True)
class StageSummary:
    """Stages of the raised program that are alike.

    Attributes:
        name: What their weights' names have in common, such as ``model.layers.[0-29]``.
        stages: Their indices among the program's stages.
        operators: Calls by operator, in one of them.
        weights: Numbers of weights that one of them stores; shared ones belong to the first.
        weight_bytes: What these take in the formats of the recipe.
        costs: What one of them takes at each workload; activations are those of the largest.
    """

    name: str
    stages: tuple[int, ...]
    operators: Mapping[str, int]
    weights: int
    weight_bytes: int
    costs: Mapping[str, Cost]


@dataclass(frozen=True)
class Barrier:
    """A call that raising passed over, or that the target cannot run.

    Attributes:
        node: Its name.
        operator: What it calls.
        stage: Name of the stage that it stands in.
        reason: Why it was left, one clause.
    """

    node: str
    operator: str
    stage: str
    reason: str


@dataclass(frozen=True)
class SiteSummary:
    """Places for equivalent transforms that are alike.

    Attributes:
        place: What it is: ``residual stream``, ``value / output``, ``up / down``,
            ``norm / linears``, ``query / key`` or ``other``.
        times: How often it occurs.
        sources: Weights that write to it, names folded.
        sinks: Weights that read it.
        gains: Elementwise gains that move along with a permutation.
        size: Order of the transform of one block.
        blocks: Blocks (heads) with transforms of their own.
        legal: Families of transforms that keep the function.
        rejected: For every other family its reasons, and for each the nodes that stand in the way.
        needs_folded_norms: Whether a rotation needs the gains of norms folded first.
        needs_centred_sources: Whether it also needs the mean taken out of what writes to it.
    """

    place: str
    times: int
    sources: tuple[str, ...]
    sinks: tuple[str, ...]
    gains: tuple[str, ...]
    size: int
    blocks: int
    legal: tuple[str, ...]
    rejected: Mapping[str, Mapping[str, tuple[str, ...]]]
    needs_folded_norms: bool
    needs_centred_sources: bool


@dataclass(frozen=True)
class Inspection:
    """A model, seen through the phases of a compilation.

    Attributes:
        model: Its short name.
        architecture: The model's own name for its architecture.
        source: Where it was read.
        parameters: Numbers of weights, shared ones once.
        checkpoint_bytes: Size of the checkpoint's tensors.
        blocks: How often the repeating part occurs.
        recipe: Name of the recipe, or None.
        target: Name of the target, or None without a recipe.
        inputs: As the program takes them.
        outputs: As it returns them.
        workloads: The sizes that costs are given for, by name.
        totals: Cost of the whole program at each workload.
        weight_bytes: All weights in the formats of the recipe.
        phases: In order.
        stages: Like ones folded, in order of the first.
        barriers: In graph order.
        notes: Observations of the front end and of the target.
        sites: Sites of equivalent transforms, like ones folded; None if they were not asked for.
    """

    model: str
    architecture: str
    source: str
    parameters: int
    checkpoint_bytes: int
    blocks: int
    recipe: str | None
    target: str | None
    inputs: tuple[PortSummary, ...]
    outputs: tuple[PortSummary, ...]
    workloads: Mapping[str, Sizes]
    totals: Mapping[str, Cost]
    weight_bytes: int
    phases: tuple[PhaseSummary, ...]
    stages: tuple[StageSummary, ...]
    barriers: tuple[Barrier, ...]
    notes: tuple[str, ...]
    sites: tuple[SiteSummary, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON document; its keys stay as they are within a `SCHEMA_VERSION`."""
        return {"schema_version": SCHEMA_VERSION, "kind": "model", **asdict(self)}
