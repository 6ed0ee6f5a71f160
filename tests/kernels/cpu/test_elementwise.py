"""RmsNorm and GatedActivation against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

_erfc = np.vectorize(math.erfc)

ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * 0.5 * _erfc(-x / math.sqrt(2)),
    # x (1 + tanh u) / 2, without the cancellation
    "gelu_tanh": lambda x: x / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "identity": lambda x: x,
}


@pytest.mark.parametrize("dim", [1, 15, 16, 33, 64, 576])
@pytest.mark.parametrize("weighted", [False, True])
def test_rms_norm_matches_float64(run_node, isa, dim, weighted) -> None:
    rng = np.random.default_rng(dim)
    x = rng.standard_normal((2, 3, dim)).astype(np.float32)
    weight = rng.standard_normal(dim).astype(np.float32) if weighted else None
    (y,) = run_node("RmsNorm", [x, weight], epsilon=1e-5)
    exact = x.astype(np.float64)
    expected = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5)
    if weight is not None:
        expected *= weight
    # A sum of `dim` squares in 32 partial sums, a square root and three roundings.
    np.testing.assert_allclose(y, expected, rtol=1e-6)


def test_rms_norm_of_zeros_is_zero(run_node, isa) -> None:
    (y,) = run_node("RmsNorm", [np.zeros((1, 20), np.float32)], epsilon=1e-6)
    np.testing.assert_array_equal(y, 0)


def test_rms_norm_refuses_a_weight_of_another_size(run_node) -> None:
    with pytest.raises(Exception, match=r"the_node.*weight has shape \[5\] instead of \[4\]"):
        run_node("RmsNorm", [np.zeros((1, 4), np.float32), np.zeros(5, np.float32)])


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_gated_activation_matches_float64(run_node, isa, kind) -> None:
    rng = np.random.default_rng(0)
    gate = np.concatenate([np.linspace(-12, 12, 4001), rng.standard_normal(1000) / 100])
    gate = gate.astype(np.float32)
    up = rng.standard_normal(gate.size).astype(np.float32)
    (y,) = run_node("GatedActivation", [gate, up], kind=kind)
    expected = ACTIVATIONS[kind](gate.astype(np.float64)) * up
    # exp(-x^2 / 2) of a float32 x^2 near 72 errs by 72 * 2^-24 = 4e-6; the others by less.
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_gated_activation_has_its_limits(run_node, isa, kind) -> None:
    gate = np.array([-200.0, -90.0, 90.0, 200.0, 0.0], np.float32)
    (y,) = run_node("GatedActivation", [gate, np.ones(5, np.float32)], kind=kind)
    with np.errstate(over="ignore"):
        expected = ACTIVATIONS[kind](gate.astype(np.float64))
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-35)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_gated_activation_keeps_nan(run_node, isa, kind) -> None:
    gate = np.array([np.nan] * 20, np.float32)
    (y,) = run_node("GatedActivation", [gate, np.ones(20, np.float32)], kind=kind)
    assert np.isnan(y).all()


def test_gated_activation_refuses_bad_input(make_session, run_node) -> None:
    x = np.zeros((2, 3), np.float32)
    with pytest.raises(Exception, match="kind = 'swish'"):
        make_session("GatedActivation", [x, x], kind="swish")
    with pytest.raises(Exception, match=r"the_node.*gate has shape \[2, 3\]"):
        run_node("GatedActivation", [x, x.T.copy()], kind="silu")
