from __future__ import annotations

import pytest
import torch
from tests.passes.transform.methods import function_error, tiny
from torch import Tensor

from qcompile.analysis.families import PortRole
from qcompile.analysis.sites import find_sites
from qcompile.ir.program import Program
from qcompile.passes.transform.absorb import absorb
from qcompile.passes.tune.site_scales import ScaledWeights, SiteScales, takes_scales


def random_scales(program: Program) -> list[SiteScales]:
    generator = torch.Generator().manual_seed(0)
    found = [SiteScales(site, 0.01) for site in find_sites(program) if takes_scales(site)]
    for each in found:
        each.learnable.assign(torch.randn(each.learnable.value.shape, generator=generator) / 2)
    return found


def scaled(program: Program, scales: list[SiteScales]) -> tuple[ScaledWeights, dict[str, Tensor]]:
    ports = [port for each in scales for port in each.site.ports]
    names = dict.fromkeys(port.weight for port in ports if port.role is not PortRole.CACHE)
    weights = {name: program.weights.materialize(name, torch.float32) for name in names}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    return ScaledWeights(scales, shapes), weights


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2", "phi3", "qwen2"])
def test_weights_are_those_of_a_program_that_has_absorbed_the_scales(architecture: str) -> None:
    program = tiny(architecture)
    scales = random_scales(program)
    assert scales
    found, weights = scaled(program, scales)
    absorbed = program.copy()
    for each in scales:
        absorb(absorbed, each.site, each.transforms())
    assert function_error(program, absorbed) < 1e-5  # exponentials are taken in another precision
    assert found.names == set(weights)
    for name, weight in weights.items():
        expected = absorbed.weights.materialize(name, torch.float32)
        torch.testing.assert_close(found.final(name, weight), expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(found.apply(name, weight), expected, rtol=1e-5, atol=0)
        assert not torch.equal(expected, weight)


def test_channels_that_a_rotary_embedding_pairs_share_a_scale() -> None:
    paired = [each for each in random_scales(tiny("llama-tied")) if each.site.planes is not None]
    assert paired
    for each in paired:
        scale = each.scales().detach()
        half = scale.shape[1] // 2
        assert torch.equal(scale[:, :half], scale[:, half:])
        assert each.learnable.value.shape == (len(each.site.blocks), half)


def test_scales_reach_the_loss_through_all_weights_of_their_site() -> None:
    program = tiny("llama-tied")
    scales = random_scales(program)
    found, weights = scaled(program, scales)
    for each in scales:
        for name in {port.weight for port in each.site.ports if port.role is not PortRole.CACHE}:
            assert each.learnable in found.learnables(name)
            total = found.apply(name, weights[name]).square().sum()
            (gradient,) = torch.autograd.grad(total, each.learnable.value)
            assert bool((gradient != 0).any())


def test_residual_stream_is_not_scaled() -> None:
    assert not any(each.site.reads_norm for each in random_scales(tiny("llama-tied")))
