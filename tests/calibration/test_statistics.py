import math

import pytest
import torch

from qcompile.calibration.statistics import (
    ChannelMoments,
    ChannelRange,
    Hessian,
    Histogram,
    Routed,
    RowAbsmax,
    Rows,
    gram,
)

KINDS = (Hessian, ChannelRange, ChannelMoments, Histogram, RowAbsmax, Rows)


def rows(count=200, width=5):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count))


def of(kind, *parts):
    found = kind()
    for part in parts:
        found.update(part)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_merging_equals_seeing_all_in_order(kind):
    first, second = rows(130), rows(62)
    merged = kind()
    merged.merge(of(kind, first))
    merged.merge(of(kind, second))
    for name, tensor in of(kind, first, second).tensors().items():
        assert torch.equal(merged.tensors()[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_bring_a_statistic_back(kind):
    found = of(kind, rows())
    again = type(found).of(found.tensors())
    assert again.tensors().keys() == found.tensors().keys()
    for name, tensor in found.tensors().items():
        assert torch.equal(again.tensors()[name], tensor), name
    again.update(rows())  # it is still alive


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_number_is_noticed(kind, bad):
    values = rows()
    assert of(kind, values).finite()
    values[32, 3] = bad
    assert not of(kind, values, rows()).finite()


def test_hessian_is_the_mean_outer_product():
    x = rows().double()
    expected = x.T @ x / len(x)
    torch.testing.assert_close(of(Hessian, x.float()).matrix, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("width", [1, 383, 384, 385, 800])
def test_gram_matrix_is_symmetric_and_right_across_blocks(width):
    x = rows(40, width)
    found = gram(x)
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found.double(), x.double().T @ x.double(), rtol=1e-5, atol=1e-4)


def test_ranges_and_moments_are_those_of_each_channel():
    x = rows()
    assert torch.equal(of(ChannelRange, x).absmax, x.abs().amax(0))
    assert torch.equal(of(ChannelRange, x).low, x.amin(0))
    moments = of(ChannelMoments, x)
    torch.testing.assert_close(moments.mean, x.double().mean(0))
    torch.testing.assert_close(moments.mean_abs, x.double().abs().mean(0))
    torch.testing.assert_close(
        moments.second_moment, x.double().square().mean(0), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.9, 0.999])
def test_percentile_is_known_to_one_bin(fraction):
    x = rows(10_000) * 37
    exact = float(x.abs().flatten().quantile(fraction, interpolation="lower"))
    found = of(Histogram, x).percentile(fraction)
    assert exact <= found <= exact * 2 ** (2 / 64)


def test_percentile_one_is_the_largest_magnitude():
    x = rows()
    assert of(Histogram, x).percentile(1) == float(x.abs().max())


def test_percentile_of_mostly_zeros_is_zero():
    x = torch.zeros(100, 4)
    x[0, 0] = 3.0
    found = of(Histogram, x)
    assert found.percentile(0.5) == 0
    assert found.count == 400


def test_rows_are_kept_as_they_are_and_spread():
    x = rows(256)
    assert torch.equal(of(Rows, x).values, x[32::64])


def test_nothing_seen_is_no_error():
    for kind in (Hessian, ChannelRange, ChannelMoments, Histogram, Rows):
        assert of(kind, torch.empty(0, 5)).finite()


def test_sum_that_others_are_added_to_leaves_theirs_alone():
    one, other, total = Hessian(), Hessian(), Hessian()
    one.update(torch.eye(3))
    other.update(2 * torch.eye(3))
    total.merge(one)
    total.merge(other)
    assert torch.equal(one.sum, torch.eye(3, dtype=torch.float64))
    assert torch.equal(total.sum, 5 * torch.eye(3, dtype=torch.float64))


def test_routed_rows_reach_their_expert_and_no_other():
    values = torch.arange(8.0).reshape(4, 2)
    index = torch.tensor([[0, 2], [2, 1], [0, 1], [3, 2]])  # 3 names no expert
    total = Routed(lambda: Rows(every=1), 3)
    for part in (slice(0, 2), slice(2, 4)):
        seen = Routed(lambda: Rows(every=1), 3)
        seen.update(values[part], index[part])
        total.merge(seen)
    assert [p.values[:, 0].tolist() for p in total.parts] == [[0, 4], [2, 4], [0, 2, 6]]


def test_routed_rows_of_each_choice_reach_the_expert_that_is_chosen():
    values = torch.arange(8.0).reshape(2, 2, 2)
    seen, total = Routed(Hessian, 2), Routed(Hessian, 2)
    seen.update(values, torch.tensor([[0, 1], [1, 0]]))
    total.merge(seen)
    assert [part.count for part in total.parts] == [2, 2]
    expected = values[0, 1].outer(values[0, 1]) + values[1, 0].outer(values[1, 0])
    assert torch.equal(total.parts[1].sum.float(), expected)
    again = Routed.of(Hessian, total.tensors())
    assert [part.count for part in again.parts] == [2, 2]
    assert torch.equal(again.parts[0].sum, total.parts[0].sum)
