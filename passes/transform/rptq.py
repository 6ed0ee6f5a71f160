"""Channels are reordered, so that those of like ranges can share a static grid: RPTQ."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from qcompile.analysis.families import Family, PortRole
from qcompile.analysis.roles import weight_name
from qcompile.analysis.sites import Site, find_sites
from qcompile.calibration.requests import Request
from qcompile.calibration.statistics import ChannelRange
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.passes.infra import Context, Equivalent, Pass, PassResult
from qcompile.passes.measure import measure
from qcompile.passes.transform.absorb import absorb
from qcompile.passes.transform.clusters import cluster_channels, mark_clusters
from qcompile.passes.transform.insert import insert_before
from qcompile.passes.transform.values import Permutation
from qcompile.passes.transform.wanted_inputs import wanted_inputs


class Rptq(Pass):
    """Puts the input channels of linears into clusters of like ranges, side by side.

    Behind an activation and behind attention (there, within each head) the order goes into the
    weights around. Behind a norm, whose input is the residual stream of all layers, it stays::

        linear(x, W)   =>   linear(qc.transform(x, P), W P)

    which moves numbers and computes nothing. `quantize_activations` with granularity ``"cluster"``
    gives each cluster one static, asymmetric grid. The linear that makes the logits stays as it is.

    The result's details say ``input, weights, absorbed, clusters``: sizes of clusters in order.

    Args:
        clusters: Per input, at most.
        head_clusters: Per head behind attention, at most.
        ignore: Patterns on names of weights whose inputs stay as they are.

    Source: Yuan et al. 2023 (RPTQ, arXiv 2304.01089).
    """

    requires = frozenset({Fact.RAISED})
    numerics = Equivalent()

    def __init__(
        self, clusters: int = 32, head_clusters: int = 4, ignore: Iterable[str] = ()
    ) -> None:
        self._clusters = clusters
        self._head_clusters = head_clusters
        self._ignore = tuple(ignore)

    def run(self, program: Program, context: Context) -> PassResult:
        """Reorders the channels of every input of linears.

        Raises:
            DataError: There is no calibration data, or it does not fit.
        """
        groups, skips = wanted_inputs(program, self._ignore)
        result = PassResult(skips=skips)
        found = measure(program, [Request(x, ChannelRange) for x, _ in groups], context, "RPTQ")
        sites = {frozenset(site.sinks): site for site in find_sites(program) if can_reorder(site)}
        for x, linears in groups:
            seen = found.of(x, ChannelRange)
            names = [weight_name(linear) for linear in linears]
            site = sites.get(frozenset(names))
            if site is not None:
                sizes = self._reorder_weights(program, site, names[0], seen)
            else:
                order, sizes = cluster_channels(seen.low, seen.high, self._clusters)
                insert_before(program, linears, Permutation(order))
            mark_clusters(linears, sizes)
            result.rewrites += 1
            result.details.append(
                {
                    "input": x.name,
                    "weights": names,
                    "absorbed": site is not None,
                    "clusters": sizes,
                }
            )
        return result

    def _reorder_weights(
        self, program: Program, site: Site, sink: str, seen: ChannelRange
    ) -> list[int]:
        """Reorders a site within its blocks; the sizes of clusters as a sink sees them."""
        count = self._clusters if len(site.blocks) == 1 else self._head_clusters
        orders: list[Permutation] = []
        sizes: dict[int, list[int]] = {}
        for block in site.blocks:
            starts = [p.start for p in block if p.role is PortRole.SINK and p.weight == sink]
            low = _stretches(seen.low, starts, site.size).amin(0)
            high = _stretches(seen.high, starts, site.size).amax(0)
            order, clusters = cluster_channels(low, high, count)
            orders.append(Permutation(order))
            sizes |= dict.fromkeys(starts, clusters)
        absorb(program, site, orders)
        return [size for start in sorted(sizes) for size in sizes[start]]


def can_reorder(site: Site) -> bool:
    """Whether channels can be reordered in weights, for one layer by itself."""
    return Family.PERMUTATION in site.families and not site.reads_norm


def _stretches(per_channel: Tensor, starts: Sequence[int], size: int) -> Tensor:
    return torch.stack([per_channel[start : start + size] for start in starts])
