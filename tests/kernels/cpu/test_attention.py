"""Attention against a direct float64 evaluation of softmax(q k^T) v."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

# float32 sums of at most a few hundred products of order one, and an exp of 2 units.
TOLERANCE = 3e-6


@dataclass(frozen=True)
class Case:
    """Inputs of one call in the order of the operator, and its attributes."""

    q: np.ndarray  # [B, S, Hq * D]
    k: np.ndarray
    v: np.ndarray
    key_cache: np.ndarray | None = None  # [B, Hkv, C, D]
    value_cache: np.ndarray | None = None
    key_mask: np.ndarray | None = None  # [B, T]
    bias: np.ndarray | None = None
    cos: np.ndarray | None = None
    sin: np.ndarray | None = None
    sinks: np.ndarray | None = None
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> list[np.ndarray | None]:
        return [
            *(self.q, self.k, self.v, self.key_cache, self.value_cache),
            *(self.key_mask, self.bias, self.cos, self.sin, self.sinks),
        ]

    @property
    def outputs(self) -> int:
        return 1 if self.key_cache is None else 3

    def with_attributes(self, **attributes: Any) -> Case:
        return replace(self, attributes={**self.attributes, **attributes})


def random_case(
    *,
    batch: int = 2,
    queries: int = 5,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    value_dim: int | None = None,
    past: int | None = None,
    capacity: int = 0,
    seed: int = 0,
    **attributes: Any,
) -> Case:
    """Gaussian tensors; with `past`, caches of `capacity` whose unused end is NaN."""
    rng = np.random.default_rng(seed)
    value_dim = value_dim or dim

    def gaussian(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    case = Case(
        q=gaussian(batch, queries, heads * dim),
        k=gaussian(batch, queries, kv_heads * dim),
        v=gaussian(batch, queries, kv_heads * value_dim),
        attributes={"num_heads": heads, "num_kv_heads": kv_heads, "causal": 1, **attributes},
    )
    if past is None:
        return case
    keys = gaussian(batch, kv_heads, capacity, dim)
    values = gaussian(batch, kv_heads, capacity, value_dim)
    keys[:, :, past:], values[:, :, past:] = np.nan, np.nan
    mask = np.ones((batch, past + queries), np.int64)
    return replace(case, key_cache=keys, value_cache=values, key_mask=mask)


def heads_first(x: np.ndarray, heads: int) -> np.ndarray:
    batch, tokens, width = x.shape
    return x.reshape(batch, tokens, heads, width // heads).transpose(0, 2, 1, 3).astype(np.float64)


def rotate(x: np.ndarray, case: Case) -> np.ndarray:
    """Rotary embedding of [B, H, S, D]."""
    if case.cos is None or case.sin is None:
        return x
    dim = case.attributes["rotary_dim"]
    interleaved = case.attributes.get("interleaved", 0)
    first = slice(0, dim, 2) if interleaved else slice(0, dim // 2)
    second = slice(1, dim, 2) if interleaved else slice(dim // 2, dim)
    cos, sin = case.cos[:, None], case.sin[:, None]
    out = x.copy()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out


def visible_keys(case: Case, queries: int, total: int) -> np.ndarray:
    """Boolean [B or 1, 1, S, T]."""
    past = total - queries
    i, j = np.arange(queries)[:, None] + past, np.arange(total)[None]
    visible = np.ones((1, 1, queries, total), bool)
    if case.attributes.get("causal"):
        visible &= j <= i
    if case.attributes.get("window"):
        visible &= j > i - case.attributes["window"]
    if case.key_mask is not None:
        visible = visible & (case.key_mask[:, None, None, :] != 0)
    return visible


def oracle(case: Case) -> list[np.ndarray]:
    heads, kv_heads = case.attributes["num_heads"], case.attributes["num_kv_heads"]
    q = rotate(heads_first(case.q, heads), case)
    k = rotate(heads_first(case.k, kv_heads), case)
    v = heads_first(case.v, kv_heads)
    batch, _, queries, dim = q.shape
    caches: list[np.ndarray] = []
    if case.key_cache is not None and case.value_cache is not None and case.key_mask is not None:
        total = case.key_mask.shape[1]
        for cache, fresh in ((case.key_cache, k), (case.value_cache, v)):
            grown = cache.copy()
            grown[:, :, total - queries : total] = fresh
            caches.append(grown)
        k, v = (cache[:, :, :total].astype(np.float64) for cache in caches)
    k, v = (np.repeat(x, heads // kv_heads, axis=1) for x in (k, v))
    scores = q @ k.transpose(0, 1, 3, 2) * case.attributes.get("scale", dim**-0.5)
    cap = case.attributes.get("softcap", 0)
    if cap:
        scores = cap * np.tanh(scores / cap)
    if case.bias is not None:
        scores = scores + case.bias
    scores = np.where(visible_keys(case, queries, k.shape[2]), scores, -np.inf)
    if case.sinks is not None:
        sinks = np.broadcast_to(case.sinks[None, :, None, None], (*scores.shape[:3], 1))
        scores = np.concatenate([scores, sinks], axis=-1)
    largest = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(largest), largest, 0))
    sums = weights.sum(-1, keepdims=True)
    weights = weights / np.where(sums == 0, 1, sums)
    out = weights[..., : k.shape[2]] @ v
    return [out.transpose(0, 2, 1, 3).reshape(batch, queries, -1), *caches]


def run(run_node, case: Case, **options: Any) -> list[np.ndarray]:
    return run_node("Attention", case.inputs, outputs=case.outputs, **options, **case.attributes)


def assert_matches(run_node, case: Case) -> None:
    actual, expected = run(run_node, case), oracle(case)
    np.testing.assert_allclose(actual[0], expected[0], rtol=0, atol=TOLERANCE)
    if case.outputs > 1 and case.key_mask is not None:
        total = case.key_mask.shape[1]
        for got, want in zip(actual[1:], expected[1:], strict=True):
            # Rotated keys: two products and a sum.
            np.testing.assert_allclose(got[:, :, :total], want[:, :, :total], rtol=0, atol=1e-6)


def with_rotary(case: Case, rotary_dim: int, *, shared: bool = False, interleaved: int = 0) -> Case:
    batch, queries, _ = case.q.shape
    angles = np.random.default_rng(5).uniform(0, 6, (batch, queries, rotary_dim // 2))
    angles = angles[:1] if shared else angles
    tables = {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    case = case.with_attributes(rotary_dim=rotary_dim, interleaved=interleaved)
    return replace(case, **tables)


@pytest.mark.parametrize("dim", [5, 16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("queries", [1, 3, 40])
def test_head_sizes_match_oracle(run_node, isa, dim, queries) -> None:
    assert_matches(run_node, random_case(dim=dim, queries=queries))


def test_values_may_have_another_size(run_node, isa) -> None:
    assert_matches(run_node, random_case(dim=24, value_dim=11))


@pytest.mark.parametrize("kv_heads", [1, 3, 6])
@pytest.mark.parametrize("queries", [1, 7])
@pytest.mark.parametrize("batch", [1, 9])
def test_grouped_heads_match_oracle(run_node, isa, kv_heads, queries, batch) -> None:
    case = random_case(
        heads=6, kv_heads=kv_heads, queries=queries, batch=batch, past=70, capacity=80
    )
    assert_matches(run_node, case)


def test_without_causality_all_keys_count(run_node, isa) -> None:
    assert_matches(run_node, random_case(queries=70, causal=0))


@pytest.mark.parametrize("window", [1, 3, 64, 1000])
@pytest.mark.parametrize("causal", [0, 1])
def test_window_hides_old_keys(run_node, isa, window, causal) -> None:
    assert_matches(run_node, random_case(queries=150, window=window, causal=causal))
    assert_matches(
        run_node, random_case(queries=2, past=140, capacity=150, window=window, causal=causal)
    )


def test_softcap_and_scale_match_oracle(run_node, isa) -> None:
    case = random_case(queries=9, softcap=2.0, scale=0.9)
    assert_matches(run_node, case)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 6), (1, 4, 6), (2, 4, 1), (2, 4, 6)])
@pytest.mark.parametrize("queries", [1, 6])
def test_bias_is_broadcast(run_node, isa, shape, queries) -> None:
    case = random_case(queries=queries, past=90, capacity=100)
    shape = (*shape[:2], min(shape[2], queries), 90 + queries)
    bias = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    assert_matches(run_node, replace(case, bias=bias))


def test_infinite_bias_hides_keys(run_node, isa) -> None:
    case = random_case(queries=6)
    bias = np.zeros((1, 1, 6, 6), np.float32)
    bias[..., 2] = -np.inf
    bias[..., 0, :] = -np.inf
    actual = run(run_node, replace(case, bias=bias))[0]
    np.testing.assert_allclose(actual, oracle(replace(case, bias=bias))[0], rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(actual[:, 0], 0)


@pytest.mark.parametrize("queries", [1, 5])
def test_sinks_take_weight(run_node, isa, queries) -> None:
    sinks = np.array([0.0, 3.0, -50.0, 20.0], np.float32)
    assert_matches(run_node, replace(random_case(queries=queries), sinks=sinks))


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("rotary_dim", [2, 12, 24])
@pytest.mark.parametrize("cached", [False, True])
def test_rotary_embedding_matches_oracle(run_node, isa, interleaved, rotary_dim, cached) -> None:
    cache = {"past": 4, "capacity": 12} if cached else {}
    case = random_case(dim=24, queries=6, **cache)
    for shared in (False, True):
        rotated = with_rotary(case, rotary_dim, shared=shared, interleaved=interleaved)
        assert_matches(run_node, rotated)


def test_rotary_embedding_of_single_queries_matches_oracle(run_node, isa) -> None:
    case = with_rotary(random_case(queries=1, past=9, capacity=16, batch=5), 16)
    assert_matches(run_node, case)


@pytest.mark.parametrize("queries", [1, 8])
def test_left_padding_hides_keys(run_node, isa, queries) -> None:
    case = random_case(batch=3, queries=queries, past=70, capacity=90)
    mask = np.ones((3, 70 + queries), np.int64)
    mask[1, :3], mask[2, :72] = 0, 0  # row 2: some queries see nothing at all
    assert_matches(run_node, replace(case, key_mask=mask))


def test_rows_that_see_nothing_are_zero(run_node, isa) -> None:
    case = random_case(batch=2, queries=6)
    mask = np.ones((2, 6), np.int64)
    mask[1, :4] = 0
    (out,) = run(run_node, replace(case, key_mask=mask))
    np.testing.assert_array_equal(out[1, :4], 0)
    assert (out[1, 4:] != 0).all()


def test_nan_stays_in_its_row(run_node, isa) -> None:
    case = random_case(batch=1, queries=6, heads=2, kv_heads=2)
    case.q[0, 3] = np.nan
    (out,) = run(run_node, case)
    assert np.isnan(out[0, 3]).all()
    assert np.isfinite(np.delete(out[0], 3, axis=0)).all()


def test_large_scores_do_not_overflow(run_node, isa) -> None:
    case = random_case(queries=40)
    case = replace(case, q=case.q * 100)
    # Scores reach 400, where float32 has steps of 3e-5, and exp turns those into relative errors.
    np.testing.assert_allclose(run(run_node, case)[0], oracle(case)[0], rtol=0, atol=2e-4)


def test_decoding_continues_a_prefill(run_node, isa) -> None:
    # Token by token over a growing cache gives what one pass over all tokens gives.
    whole = random_case(batch=1, queries=70, dim=32)
    (expected,) = run(run_node, whole)
    keys = np.zeros((1, 2, 70, 32), np.float32)
    values = np.zeros((1, 2, 70, 32), np.float32)
    for begin, end in [(0, 64), (64, 65), (65, 68), (68, 69), (69, 70)]:
        step = replace(
            whole,
            q=whole.q[:, begin:end],
            k=whole.k[:, begin:end],
            v=whole.v[:, begin:end],
            key_cache=keys,
            value_cache=values,
            key_mask=np.ones((1, end), np.int64),
        )
        out, keys, values = run(run_node, step)
        np.testing.assert_allclose(out, expected[:, begin:end], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("queries", [1, 5])
def test_bound_caches_grow_in_place(make_session, isa, queries) -> None:
    case = with_rotary(random_case(queries=queries, past=20, capacity=40), 16)
    session = make_session("Attention", case.inputs, outputs=3, **case.attributes)
    expected = oracle(case)
    binding = session.io_binding()
    values = [None if x is None else ort.OrtValue.ortvalue_from_numpy(x) for x in case.inputs]
    for i, value in enumerate(values):
        if value is not None:
            binding.bind_ortvalue_input(f"x{i}", value)
    binding.bind_output("y0")
    binding.bind_ortvalue_output("y1", values[3])
    binding.bind_ortvalue_output("y2", values[4])
    session.run_with_iobinding(binding)
    out = binding.get_outputs()[0].numpy()
    np.testing.assert_allclose(out, expected[0], rtol=0, atol=TOLERANCE)
    for value, want in zip(values[3:5], expected[1:], strict=True):
        # The NaN behind the last token is still there: nothing else was written.
        np.testing.assert_allclose(value.numpy(), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("queries", [1, 100])
def test_thread_count_changes_no_bit(run_node, isa, queries) -> None:
    case = random_case(queries=queries, past=300, capacity=300 + queries, heads=6, dim=64)
    for one, two in zip(run(run_node, case), run(run_node, case, threads=2), strict=True):
        np.testing.assert_array_equal(one, two)


def test_empty_queries_give_an_empty_output(run_node, isa) -> None:
    case = random_case(queries=0, past=3, capacity=4)
    out, keys, _ = run(run_node, case)
    assert out.shape == (2, 0, 64)
    np.testing.assert_array_equal(keys[:, :, :3], case.key_cache[:, :, :3])


def _zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": _zeros(2, 5, 63)}, r"q has shape \[2, 5, 63\]"),
        ({"q": _zeros(5, 64)}, r"q has shape \[5, 64\]"),
        ({"k": _zeros(2, 5, 64)}, "but q has heads of 16"),
        ({"v": _zeros(2, 4, 32)}, r"k or v has shape \[2, 4, 32\]"),
        ({"value_cache": None}, "must be given together"),
        ({"key_mask": None}, "caches need a key_mask"),
        ({"key_mask": np.ones((2, 4), np.int64)}, "key_mask has shape"),
        ({"key_mask": np.ones((1, 8), np.int64)}, "key_mask has shape"),
        ({"key_mask": np.ones((2, 13), np.int64)}, "do not fit the cache's capacity of 12"),
        ({"key_cache": _zeros(2, 2, 12, 15)}, "key_cache has shape"),
        ({"value_cache": _zeros(2, 2, 11, 16)}, "value_cache has shape"),
        ({"bias": _zeros(1, 3, 5, 8)}, "bias has shape"),
        ({"sinks": _zeros(3)}, "sinks have shape"),
        ({"cos": _zeros(1, 5, 8)}, "rotary_dim is 0"),
        ({"key_cache": None, "value_cache": None}, "and no cache"),
    ],
)
def test_bad_inputs_are_named(run_node, changes, message) -> None:
    case = replace(random_case(past=3, capacity=12), **changes)
    with pytest.raises(Exception, match=message) as error:
        run_node("Attention", case.inputs, outputs=3, **case.attributes)
    assert "com.qcompile.Attention node 'the_node'" in str(error.value)


def test_bad_rotary_tables_are_named(run_node) -> None:
    case = random_case().with_attributes(rotary_dim=8)
    with pytest.raises(Exception, match="needs both cos and sin"):
        run(run_node, replace(case, cos=_zeros(1, 5, 4)))
    with pytest.raises(Exception, match="cos or sin has shape"):
        run(run_node, replace(case, cos=_zeros(1, 5, 4), sin=_zeros(1, 4, 4)))
    with pytest.raises(Exception, match="exceeds the head size"):
        run(run_node, replace(case.with_attributes(rotary_dim=18), cos=_zeros(1, 5, 9)))


def test_missing_cache_outputs_are_named(run_node) -> None:
    case = random_case(past=3, capacity=12)
    with pytest.raises(Exception, match="the output key_cache_out is not"):
        run_node("Attention", case.inputs, outputs=1, **case.attributes)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"num_heads": 5}, "no multiple of num_kv_heads"),
        ({"num_kv_heads": 0}, "no multiple of num_kv_heads"),
        ({"window": -1}, "window = -1"),
        ({"rotary_dim": 3}, "rotary_dim = 3"),
        ({"softcap": -1.0}, "softcap is negative"),
    ],
)
def test_bad_attributes_are_named(make_session, attributes, message) -> None:
    case = random_case().with_attributes(**attributes)
    with pytest.raises(Exception, match=message):
        make_session("Attention", case.inputs, **case.attributes)
