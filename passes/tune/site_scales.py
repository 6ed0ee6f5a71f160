"""Scales of sites as numbers that can be learned, seen from the weights around the sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qcompile.analysis.families import Family, Port, PortRole
from qcompile.analysis.sites import Site
from qcompile.passes.quantize.methods.block import Learnable
from qcompile.passes.transform.values import Diagonal


class SiteScales:
    """A scale for each channel of a site, the exponential of what is learned; all 1 at first.

    Channels that a rotary embedding pairs share a scale.

    Args:
        site: One that takes scales.
        rate: Of the logarithms.

    Attributes:
        site: The site.
        learnable: Logarithms, float32 ``[blocks, free channels]``.
    """

    def __init__(self, site: Site, rate: float) -> None:
        self.site = site
        self._channel = _free_channels(site)
        free = int(self._channel.max()) + 1
        self.learnable = Learnable(torch.zeros(len(site.blocks), free), rate)

    def scales(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What channels are multiplied with, ``[blocks, size]``, differentiable."""
        return self.learnable.value.to(dtype)[:, self._channel].exp()

    def transforms(self) -> list[Diagonal]:
        """The scales of each block, for `absorb`."""
        return [Diagonal(scale) for scale in self.scales(torch.float64).detach()]


class ScaledWeights:
    """What becomes of weights when the sites around them are scaled.

    Args:
        sites: The sites.
        shapes: Of the weights, by name.
    """

    def __init__(self, sites: Sequence[SiteScales], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._along: dict[str, list[_Axis]] = {}
        for site in sites:
            for (name, axis), ports in _by_axis(site.site).items():
                self._along.setdefault(name, []).append(
                    _Axis(site, axis, ports, shapes[name][axis], len(shapes[name]))
                )

    @property
    def names(self) -> set[str]:
        """The weights that change."""
        return set(self._along)

    def apply(self, name: str, weight: Tensor) -> Tensor:
        """A weight as the scales change it, differentiable; itself where they do not."""
        for along in self._along.get(name, ()):
            weight = weight * along.factors(weight.dtype)
        return weight

    @torch.no_grad()
    def final(self, name: str, weight: Tensor) -> Tensor:
        """The same in float64, rounded once: what a program has that has absorbed the scales."""
        if name not in self._along:
            return weight
        return self.apply(name, weight.to(torch.float64)).to(weight.dtype)

    def learnables(self, name: str) -> list[Learnable]:
        """What a weight's change depends on."""
        return list(dict.fromkeys(along.site.learnable for along in self._along.get(name, ())))


class _Axis:
    """The part of a site that lies on one axis of a weight."""

    def __init__(
        self,
        site: SiteScales,
        axis: int,
        ports: Sequence[tuple[int, Port]],
        length: int,
        dimensions: int,
    ) -> None:
        self.site = site
        size, count = site.site.size, len(site.site.blocks)
        # All scales, then their reciprocals, then a 1 for what the site does not reach.
        self._index = torch.full((length,), 2 * count * size)
        for block, port in ports:
            first = (block + count * port.dual) * size
            self._index[port.start : port.start + size] = torch.arange(first, first + size)
        self._shape = [1] * dimensions
        self._shape[axis] = length

    def factors(self, dtype: torch.dtype) -> Tensor:
        scales = self.site.scales(dtype).flatten()
        values = torch.cat((scales, scales.reciprocal(), torch.ones(1, dtype=dtype)))
        return values[self._index].reshape(self._shape)


def takes_scales(site: Site) -> bool:
    """Whether a site can be scaled, and does not go on from block to block."""
    return Family.DIAGONAL in site.families and not site.reads_norm


def _by_axis(site: Site) -> dict[tuple[str, int], list[tuple[int, Port]]]:
    """The ports of a site by weight and axis, each with its block."""
    found: dict[tuple[str, int], list[tuple[int, Port]]] = {}
    for block, ports in enumerate(site.blocks):
        for port in ports:
            if port.role is not PortRole.CACHE:
                found.setdefault((port.weight, port.axis), []).append((block, port))
    return found


def _free_channels(site: Site) -> Tensor:
    """Which free scale each channel has, int64 ``[size]``."""
    channels = torch.arange(site.size)
    if site.planes is None:
        return channels
    pairs, interleaved = site.planes
    if interleaved:
        channels[1 : 2 * pairs : 2] = channels[0 : 2 * pairs : 2].clone()
    else:
        channels[pairs : 2 * pairs] = channels[:pairs].clone()
    free: Tensor = channels.unique(return_inverse=True)[1]
    return free
