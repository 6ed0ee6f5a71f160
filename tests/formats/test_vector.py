"""HIGGS: vectors of a codebook for normal numbers, in a turned basis."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import ModelError, RecipeError
from qcompile.formats import VectorFormat, parse_format, relative_error, rtn, stored_weight
from qcompile.formats.nearest_vector import nearest_vectors
from qcompile.frontends.torch_export import capture_module
from qcompile.ir import dialect
from qcompile.kernels.lookup_vectors import fit_normal_grids
from qcompile.kernels.lookup_vectors.codebooks import codebook, codebook_names
from qcompile.kernels.lookup_vectors.reference import codebook_tensor, turn, turn_back
from qcompile.passes.quantize.layers import layer_weights
from qcompile.passes.quantize.replace_weight import replace_weight

# Mean squared error of the best quantizers of normal numbers: Max 1960, table I, in one dimension;
# in two, Pages and Printems 2003. Grids that are no optimum are off by more than the tolerance.
BEST = {
    "higgs1x4": 0.1175,
    "higgs1x8": 0.03454,
    "higgs1x16": 0.009497,
    "higgs2x16": 0.110,
    "higgs2x64": 0.0300,
    "higgs2x256": 0.0080,
}


@pytest.fixture(scope="module")
def normal() -> torch.Tensor:
    return torch.randn(1 << 17, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", BEST)
def test_codebooks_are_the_best_for_normal_numbers(name: str, normal: torch.Tensor) -> None:
    sample = normal.reshape(-1, len(codebook(name)[0])).to(torch.float32)
    _, distance = nearest_vectors(sample, codebook_tensor(name))
    # The sample's own error of 2^17 squares is 0.5 %.
    assert float(distance.sum()) / normal.numel() == pytest.approx(BEST[name], rel=0.02)


@pytest.mark.parametrize("name", codebook_names())
def test_every_vector_is_the_mean_of_what_is_nearest_to_it(name: str) -> None:
    table = codebook_tensor(name)
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn((1 << 16, table.shape[1]), generator=generator)
    sample = torch.cat((sample, -sample))
    codes, _ = nearest_vectors(sample, table)
    count = torch.bincount(codes.long(), minlength=len(table)).unsqueeze(1)
    mean = torch.zeros_like(table).index_add_(0, codes.long(), sample) / count.clamp(min=1)
    # The mean of n numbers of variance v is off by sqrt(v / n); five of that is never seen.
    spread = torch.zeros_like(table).index_add_(
        0, codes.long(), (sample - table[codes.long()]) ** 2
    )
    noise = (spread / count.clamp(min=1) / count.clamp(min=1)).sqrt()
    often = (count > 50).squeeze(1)
    assert bool(((mean - table).abs() <= 6 * noise + 0.02)[often].all())


def test_grids_on_a_line_are_computed_anew_to_the_last_digit() -> None:
    computed = fit_normal_grids.fit_line(16).squeeze(1).tolist()
    stored = [vector[0] for vector in codebook("higgs1x16")]
    assert computed == pytest.approx(stored, rel=1e-6)


@given(st.sampled_from([4, 24, 36, 64, 576]), st.sampled_from([1, 4]), st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_turning_back_undoes_turning(size: int, block: int, rows: int) -> None:
    x = torch.randn(rows, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    block = size if block == 4 else block
    torch.testing.assert_close(turn_back(turn(x, block), block), x, rtol=0, atol=1e-12)


def test_decoding_gives_the_weight_back_as_well_as_the_codebook_can() -> None:
    weight = torch.randn(32, 576, generator=torch.Generator().manual_seed(2))
    for name in ("higgs1x16-g64", "higgs2x256-g64", "higgs2x256", "higgs4x256-g64"):
        error = rtn(weight, parse_format(name)).relative_error ** 2
        best = {"higgs4x256-g64": 0.097}.get(name) or BEST[name.split("-")[0]]
        assert error == pytest.approx(best, rel=0.06)  # scales of 64 numbers vary, and are fp16


def test_turning_makes_outliers_harmless() -> None:
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(3))
    weight[:, ::64] *= 30
    turned, plain = (rtn(weight, parse_format(f"higgs2x256{o}")) for o in ("", "-unturned"))
    assert turned.relative_error < 0.7 * plain.relative_error


def test_searched_scales_are_never_worse() -> None:
    weight = torch.randn(16, 192, generator=torch.Generator().manual_seed(4)) ** 3
    format = parse_format("higgs2x64-g64")
    plain, searched = (rtn(weight, format, scale_search=s) for s in ("absmax", "mse"))
    assert searched.relative_error < plain.relative_error


@pytest.mark.parametrize(
    ("name", "shape", "bits"),
    [
        ("higgs2x256-g64", (576, 576), 4 + 16 / 64),
        ("higgs2x64-g64", (576, 576), 3 + 16 / 64),
        ("higgs4x256", (576, 1536), 2 + 16 / 1536),
        ("higgs2x256-g64-fp32", (8, 96), 4 + 2 * 32 / 96),
    ],
)
def test_bits_are_codes_and_scales(name: str, shape: tuple[int, int], bits: float) -> None:
    assert parse_format(name).bits_per_weight(shape) == pytest.approx(bits)


def test_short_last_groups_and_leading_axes_decode() -> None:
    weight = torch.randn(2, 3, 100, generator=torch.Generator().manual_seed(5))
    format = parse_format("higgs2x256-g64")
    encoded = format.encode(weight)
    assert tuple(encoded.tensors["scale"].shape) == (2, 3, 2)
    assert {n: (tuple(t.shape), t.dtype) for n, t in encoded.tensors.items()} == {
        n: (s.shape, s.dtype) for n, s in format.tensors((2, 3, 100)).items()
    }
    assert relative_error(weight, encoded) < 0.11


def test_zeros_decode_to_zeros_only_where_a_vector_is_zero() -> None:
    # The scale of a group of zeros would be 0; it is 1, and the nearest vector stands.
    format = parse_format("higgs2x256-g64-unturned")
    decoded = format.decode(format.encode(torch.zeros(2, 64)))
    nearest = min(math.hypot(*vector) for vector in codebook("higgs2x256"))
    assert float(decoded.abs().max()) <= nearest


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("HIGGS2x256-G64", "higgs2x256-g64"),
        ("higgs2x64-fp16-g64", "higgs2x64-g64"),
        ("higgs2x64-unturned-bf16", "higgs2x64-bf16-unturned"),
    ],
)
def test_names_are_canonical(name: str, canonical: str) -> None:
    format = parse_format(name)
    assert str(format) == canonical
    assert parse_format(canonical) == format


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("higgs2x256-g63", "63 weights does not hold whole vectors of 2"),
        ("higgs2x255", "unknown format"),
        ("higgs2x256-asym", "cannot use 'asym'"),
    ],
)
def test_names_that_mean_nothing_are_refused(name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_format(name)


def test_widths_without_whole_vectors_are_refused() -> None:
    with pytest.raises(RecipeError, match="the 66 inputs of 'w' do not make whole vectors of 4"):
        parse_format("higgs4x256").encode(torch.zeros(2, 66), name="w")


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ModelError, match="weight 'w' contains NaN"):
        parse_format("higgs2x256").encode(torch.full((1, 4), math.nan), name="w")


def test_the_graph_decodes_what_the_format_decodes() -> None:
    format = VectorFormat("higgs2x64", 32, torch.bfloat16)
    torch.manual_seed(6)
    linear, x = torch.nn.Linear(96, 8, bias=False), torch.randn(3, 96)
    program = capture_module(linear, x)
    (weight,) = layer_weights(program)[0]
    encoded = format.encode(linear.weight)
    replace_weight(program, weight, encoded)
    (node,) = program.calls(dialect.lookup_vectors)
    found = stored_weight(node)
    assert found is not None
    assert (found.format, found.shape, found.name) == (format, (8, 96), "weight")
    torch.testing.assert_close(program(x), x @ format.decode(encoded).T)
