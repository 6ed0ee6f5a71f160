"""Attention over caches of few bits: the bytes are the oracle's, and so is what is read of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from tests.kernels.cpu.test_attention import (
    TOLERANCE,
    Case,
    heads_first,
    oracle,
    random_case,
    rotate,
    with_rotary,
)

from qcompile.kernels.kv_append.rows import decode_rows, encode_rows, row_bytes

FORMATS = ("float", "bf16", "int8", "int4")


def encode(x: np.ndarray, format: str, group_size: int) -> np.ndarray:
    return encode_rows(torch.from_numpy(x.astype(np.float32)), format, group_size).numpy()


def decode(rows: np.ndarray, format: str, group_size: int, width: int) -> np.ndarray:
    return decode_rows(torch.from_numpy(rows.copy()), format, group_size, width).numpy()


def formats_of(case: Case, side: str) -> tuple[str, int]:
    return case.attributes[f"{side}_format"], case.attributes.get(f"{side}_group_size", 0)


def with_formats(case: Case, key: str, value: str, group_size: int = 0) -> Case:
    """Caches hold rows; the bytes behind the past are noise, as in a buffer that was used."""
    case = case.with_attributes(
        key_format=key, value_format=value, key_group_size=group_size, value_group_size=group_size
    )
    assert case.key_cache is not None
    assert case.value_cache is not None
    rows = []
    for side, cache in (("key", case.key_cache), ("value", case.value_cache)):
        encoded = encode(np.nan_to_num(cache), *formats_of(case, side))
        noise = np.random.default_rng(1).integers(0, 256, encoded.shape, np.uint8)
        rows.append(np.where(np.isnan(cache[..., :1]), noise, encoded))
    return replace(case, key_cache=rows[0], value_cache=rows[1])


def rounded_oracle(case: Case) -> tuple[np.ndarray, list[np.ndarray]]:
    """The output, and the rows of the new positions.

    What is new is rotated by the oracle in float64, which the kernel does in float32: it can land
    on another code. So keys that are rotated are compared by value, and no test of bytes rotates.
    """
    assert case.key_cache is not None
    assert case.value_cache is not None
    kv_heads = case.attributes["num_kv_heads"]
    queries = case.q.shape[1]
    total = case.key_mask.shape[1]
    exact = {
        key: value
        for key, value in case.attributes.items()
        if not key.endswith(("_format", "_group_size"))
    }
    caches, widths = [], []
    for side, cache, fresh in (
        ("key", case.key_cache, case.k),
        ("value", case.value_cache, case.v),
    ):
        width = fresh.shape[2] // kv_heads
        caches.append(decode(cache, *formats_of(case, side), width))
        widths.append(width)
    plain = replace(case, key_cache=caches[0], value_cache=caches[1], attributes=exact)
    grown = oracle(plain)[1:]
    new = []
    for side, cache, width in zip(("key", "value"), grown, widths, strict=True):
        encoded = encode(cache[:, :, total - queries : total], *formats_of(case, side))
        cache[:, :, total - queries : total] = decode(encoded, *formats_of(case, side), width)
        new.append(encoded)
    # All positions stand in the cache, so that nothing is rotated or appended again.
    heads_last = [c[:, :, :total].transpose(0, 2, 1, 3).reshape(len(c), total, -1) for c in grown]
    q = np.zeros((len(case.q), total, case.q.shape[2]), np.float32)
    q[:, total - queries :] = case.q
    keep = {k: v for k, v in exact.items() if k not in ("rotary_dim", "interleaved")}
    if case.cos is not None:
        turned = rotate(heads_first(case.q, exact["num_heads"]), case)
        q[:, total - queries :] = turned.transpose(0, 2, 1, 3).reshape(case.q.shape)
    bias = case.bias
    if bias is not None:
        whole = np.zeros((*bias.shape[:2], total, total), np.float32)
        whole[:, :, total - queries :] = bias
        bias = whole
    all_at_once = Case(
        q, heads_last[0], heads_last[1], key_mask=case.key_mask, bias=bias, sinks=case.sinks,
        attributes=keep,
    )  # fmt: skip
    return oracle(all_at_once)[0][:, total - queries :], new


def run(run_node: Any, case: Case, **options: Any) -> list[np.ndarray]:
    found: list[np.ndarray] = run_node(
        "QAttention", case.inputs, outputs=3, **options, **case.attributes
    )
    return found


def assert_matches(run_node: Any, case: Case) -> None:
    out, keys, values = run(run_node, case)
    expected, new = rounded_oracle(case)
    np.testing.assert_allclose(out, expected, rtol=0, atol=TOLERANCE)
    total, queries = case.key_mask.shape[1], case.q.shape[1]
    for got, before, want in zip(
        (keys, values), (case.key_cache, case.value_cache), new, strict=True
    ):
        np.testing.assert_array_equal(got[:, :, : total - queries], before[:, :, : total - queries])
        np.testing.assert_array_equal(got[:, :, total - queries : total], want)


@pytest.mark.parametrize("format", FORMATS[1:])
@pytest.mark.parametrize("dim", [6, 16, 40, 64, 128])
@pytest.mark.parametrize("queries", [1, 3, 40])
def test_head_sizes_match_oracle(
    run_node: Any, isa: str, format: str, dim: int, queries: int
) -> None:
    case = random_case(dim=dim, queries=queries, past=70, capacity=120)
    assert_matches(run_node, with_formats(case, format, format))


@pytest.mark.parametrize("group_size", [8, 16, 24, 32, 1000])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_groups_match_oracle(run_node: Any, isa: str, format: str, group_size: int) -> None:
    case = random_case(dim=64, value_dim=48, queries=2, past=9, capacity=16)
    assert_matches(run_node, with_formats(case, format, format, group_size))


@pytest.mark.parametrize("key", FORMATS)
@pytest.mark.parametrize("value", FORMATS)
def test_keys_and_values_may_differ(run_node: Any, isa: str, key: str, value: str) -> None:
    case = random_case(dim=32, queries=5, past=20, capacity=30)
    assert_matches(run_node, with_formats(case, key, value))


@pytest.mark.parametrize("kv_heads", [1, 2, 12])
@pytest.mark.parametrize("past", [0, 63, 255, 256, 600])
def test_single_queries_over_parts_of_keys_match_oracle(
    run_node: Any, isa: str, kv_heads: int, past: int
) -> None:
    case = random_case(heads=12, kv_heads=kv_heads, dim=16, queries=1, past=past, capacity=past + 8)
    assert_matches(run_node, with_formats(case, "int8", "int4"))


@pytest.mark.parametrize("queries", [1, 50])
@pytest.mark.parametrize("window", [1, 100, 129])
def test_windows_and_padding_match_oracle(
    run_node: Any, isa: str, queries: int, window: int
) -> None:
    case = random_case(queries=queries, past=290, capacity=350, window=window)
    mask = np.ones((2, 290 + queries), np.int64)
    mask[1, :200] = 0
    assert_matches(run_node, with_formats(replace(case, key_mask=mask), "int8", "int8"))


@pytest.mark.parametrize("queries", [1, 6])
def test_bias_sinks_and_cap_match_oracle(run_node: Any, isa: str, queries: int) -> None:
    case = random_case(queries=queries, past=200, capacity=220, softcap=3.0)
    bias = np.random.default_rng(3).standard_normal((2, 4, queries, 200 + queries))
    sinks = np.array([0.0, 3.0, -50.0, 20.0], np.float32)
    case = replace(case, bias=bias.astype(np.float32), sinks=sinks)
    assert_matches(run_node, with_formats(case, "int4", "int8"))


@pytest.mark.parametrize("format", FORMATS[1:])
def test_keys_are_rotated_before_they_are_rounded(run_node: Any, isa: str, format: str) -> None:
    case = with_rotary(random_case(dim=32, queries=6, past=4, capacity=12), 32)
    case = with_formats(case, format, format)
    _, keys, _ = run(run_node, case)
    new = rounded_oracle(case)[1][0]
    found, wanted = (decode(rows, format, 0, 32) for rows in (keys[:, :, 4:10], new))
    # Where float32 and float64 round to different codes, by one step.
    step = {"bf16": 2.0**-7, "int8": 1 / 25, "int4": 0.6}[format]
    assert np.abs(found - wanted).max() <= step
    assert (found == wanted).mean() > 0.9


@pytest.mark.parametrize("queries", [1, 100])
def test_thread_count_changes_no_bit(run_node: Any, isa: str, queries: int) -> None:
    case = random_case(queries=queries, past=300, capacity=300 + queries, heads=6, dim=64)
    case = with_formats(case, "int8", "int4", 32)
    for one, two in zip(run(run_node, case), run(run_node, case, threads=2), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("queries", [1, 5])
def test_bound_caches_grow_in_place(make_session: Any, isa: str, queries: int) -> None:
    case = with_formats(random_case(queries=queries, past=20, capacity=40), "int8", "int4")
    session = make_session("QAttention", case.inputs, outputs=3, **case.attributes)
    expected, new = rounded_oracle(case)
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
    np.testing.assert_allclose(out, expected, rtol=0, atol=TOLERANCE)
    for value, before, rows in zip(values[3:5], case.inputs[3:5], new, strict=True):
        grown = before.copy()
        grown[:, :, 20 : 20 + queries] = rows
        np.testing.assert_array_equal(value.numpy(), grown)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_what_no_scale_spans_shows(run_node: Any, isa: str, bad: float) -> None:
    case = random_case(batch=2, queries=2, past=3, capacity=8)
    case.v[1, 0, 3] = bad
    out = run(run_node, with_formats(case, "int8", "int8"))[0]
    assert not np.isfinite(out[1]).all()
    assert np.isfinite(out[0]).all()


@pytest.mark.parametrize("small", [1e-3, 1e-5, 1e-7, 1e-12])
def test_small_numbers_keep_the_oracles_bytes(run_node: Any, isa: str, small: float) -> None:
    case = random_case(queries=2, past=3, capacity=8)
    case = replace(case, k=case.k * np.float32(small), v=case.v * np.float32(small))
    case = with_formats(case, "int8", "int4")
    _, keys, values = run(run_node, case)
    for got, want in zip((keys, values), rounded_oracle(case)[1], strict=True):
        np.testing.assert_array_equal(got[:, :, 3:5], want)


def test_bad_caches_and_formats_are_named(run_node: Any, make_session: Any) -> None:
    case = with_formats(random_case(past=3, capacity=12), "int8", "int8")
    width = row_bytes(16, "int8", 0)
    with pytest.raises(Exception, match=rf"key_cache has shape .* capacity, {width}\]"):
        run(run_node, replace(case, key_cache=case.key_cache[..., 1:].copy()))
    without = replace(case, key_cache=None, value_cache=None, key_mask=np.ones((2, 5), np.int64))
    with pytest.raises(Exception, match="there is no cache"):
        run(run_node, without)
    for attributes in ({"key_format": "int3"}, {"value_format": ""}, {"key_group_size": -1}):
        changed = case.with_attributes(**attributes)
        with pytest.raises(Exception, match=r"is none of float, bf16|group size is negative"):
            make_session("QAttention", changed.inputs, outputs=3, **changed.attributes)
