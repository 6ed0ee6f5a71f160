"""Integer scales: what is stored, what it decodes to, and how little it costs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import ModelError, RecipeError
from qcompile.formats import IntegerScaleFormat, parse_format, stored_weight
from qcompile.frontends.torch_export import capture_module
from qcompile.ir import dialect
from qcompile.ir.edit import Editor


def error(weight, name, search="mse"):
    format = parse_format(name)
    decoded = format.decode(format.encode(weight, scale_search=search))
    return float((decoded - weight).norm() / weight.norm())


@settings(deadline=None, max_examples=40)
@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([8, 16, 20, 64]),
    symmetric=st.booleans(),
    rows=st.integers(1, 5),
    columns=st.integers(1, 70),
    seed=st.integers(0, 1000),
)
def test_scales_are_whole_multiples_of_one_float_per_row(
    bits, group, symmetric, rows, columns, seed
):
    name = f"int{bits}-g{group}" + ("" if symmetric else "-asym") + "-intscale"
    format = parse_format(name)
    assert str(format) == name
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    quantized = format.encode(weight)
    stored = quantized.tensors
    assert {k: (tuple(t.shape), t.dtype) for k, t in stored.items()} == {
        k: (spec.shape, spec.dtype) for k, spec in format.tensors((rows, columns)).items()
    }
    # The integers come first: sums over groups can stay integers up to the row's scale.
    spread = [g // group for g in range(columns)]
    zeros = 2 ** (bits - 1) if symmetric else stored["zero_point"].int()[:, spread]
    whole = (stored["codes"].int() - zeros) * stored["scale"].int()[:, spread]
    expected = whole.double() * stored["outer_scale"].double()
    torch.testing.assert_close(format.decode(quantized).double(), expected, rtol=3e-7, atol=0)
    assert int(stored["scale"].min()) >= 1


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_asymmetric_integers_cost_less_than_a_hundredth(bits):
    weight = torch.randn(128, 576, generator=torch.Generator().manual_seed(0))
    name = f"int{bits}-g64-asym"
    assert error(weight, f"{name}-intscale") < 1.01 * error(weight, name)


def test_symmetric_integers_cost_the_level_that_negative_scales_spare():
    weight = torch.randn(128, 576, generator=torch.Generator().manual_seed(0))
    exact, whole = error(weight, "int4-g64"), error(weight, "int4-g64-intscale")
    assert exact < whole < 1.06 * exact


def test_bits_count_integers_and_row_scales():
    format = parse_format("int4-g64-asym-intscale")
    parts = format.bits_by_part((10, 130))
    assert parts == {"codes": 5200, "scale": 30 * 8, "zero_point": 30 * 4, "outer_scale": 320}


def test_rows_and_groups_of_zeros_decode_to_zeros():
    weight = torch.randn(3, 64)
    weight[1] = 0
    weight[2, :16] = 0
    for name in ("int4-g16-intscale", "int4-g16-asym-intscale"):
        format = parse_format(name)
        decoded = format.decode(format.encode(weight))
        assert not decoded[1].any()
        assert not decoded[2, :16].any()


def test_emitted_nodes_are_recognized():
    format = parse_format("int4-g16-asym-intscale")
    program = capture_module(torch.nn.Linear(40, 8), torch.randn(2, 40))
    name = "weight"
    quantized = format.encode(program.weights.materialize(name))
    reference = next(n for n in program.parameters() if n.target == name)
    for part, tensor in quantized.tensors.items():
        program.weights.put(f"w.{part}", tensor)
    editor = Editor(program)
    with editor.before(reference):
        tensors = {part: editor.weight(f"w.{part}") for part in quantized.tensors}
        value = format.emit(editor, tensors)
    assert value.target == dialect.dequantize
    found = stored_weight(value)
    assert found is not None
    assert (found.format, found.name, found.shape) == (format, "w", (8, 40))
    assert set(found.tensors) == {"codes", "scale", "outer_scale", "zero_point"}


def test_one_scale_per_row_has_nothing_to_make_integers_of():
    with pytest.raises(RecipeError, match="one scale per row, which stays a float"):
        parse_format("int8-intscale")


def test_float_zero_points_are_refused():
    with pytest.raises(RecipeError, match="int4-g64-asym16 has zero points that are floats"):
        parse_format("int4-g64-asym16-intscale")


def test_weight_that_is_not_finite_is_named():
    with pytest.raises(ModelError, match="weight 'w' contains infinity"):
        parse_format("int4-g16-intscale").encode(torch.full((2, 16), float("inf")), name="w")


def test_formats_with_other_scales_are_other_formats():
    format = parse_format("int4-g64-intscale")
    assert isinstance(format, IntegerScaleFormat)
    assert format != parse_format("int4-g64")
    assert format != parse_format("int4-g64-fp32")
