from __future__ import annotations

import pytest
import torch

from qcompile.errors import ModelError
from qcompile.ir.weights import MemorySource, Source, TensorSpec, WeightStore, describe, sources


class CountingSource(MemorySource):
    """A checkpoint that counts how often each tensor is read."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self.reads: list[str] = []

    def read(self, name: str) -> torch.Tensor:
        self.reads.append(name)
        return super().read(name)


def store_of(source: MemorySource, dtype: torch.dtype = torch.float32) -> WeightStore:
    store = WeightStore()
    for name, spec in source.specs().items():
        store.define(name, Source(source, name), TensorSpec(spec.shape, dtype))
    return store


def test_nothing_is_read_before_materialize() -> None:
    source = CountingSource({"w": torch.ones(2, 3)})
    store = store_of(source)
    store.derive(
        "t", ("w",), lambda w: w.T, TensorSpec((3, 2), torch.float32), exact=True, label="transpose"
    )
    assert source.reads == []
    assert store.materialize("t").shape == (3, 2)
    assert source.reads == ["w"]


def test_bfloat16_checkpoint_is_seen_as_float32() -> None:
    source = MemorySource({"w": torch.tensor([1.5, 2.0], dtype=torch.bfloat16)})
    value = store_of(source).materialize("w")
    assert value.dtype == torch.float32
    assert value.tolist() == [1.5, 2.0]


def test_pending_arithmetic_is_done_in_float64_and_rounded_once() -> None:
    # (1 + 2^-24) - 1 is 0 in float32 arithmetic and 2^-24 when it is rounded at the end only.
    store = store_of(MemorySource({"w": torch.tensor([2.0**-24])}))
    spec = TensorSpec((1,), torch.float32)
    store.derive("w", ("w",), lambda w: w + 1, spec, exact=False, label="add")
    store.derive("w", ("w",), lambda w: w - 1, spec, exact=False, label="sub")
    assert store.materialize("w").item() == 2.0**-24


def test_exact_views_of_integers_keep_their_dtype() -> None:
    store = WeightStore()
    store.put("codes", torch.arange(6, dtype=torch.uint8).reshape(2, 3))
    spec = TensorSpec((3, 2), torch.uint8)
    store.derive("t", ("codes",), lambda c: c.T, spec, exact=True, label="transpose")
    assert store.materialize("t", torch.float64).dtype == torch.uint8


def test_copies_do_not_see_later_definitions() -> None:
    store = store_of(MemorySource({"w": torch.ones(1)}))
    twin = store.copy()
    twin.put("w", torch.zeros(1))
    assert store.materialize("w").item() == 1
    assert twin.materialize("w").item() == 0


def test_tied_names_share_an_expression() -> None:
    store = store_of(MemorySource({"embed": torch.ones(1)}))
    store.define("head", store.expression("embed"), store.spec("embed"))
    assert store.expression("head") == store.expression("embed")


def test_wrong_shape_in_the_checkpoint_names_the_weight() -> None:
    source = MemorySource({"w": torch.ones(2, 3)})
    store = WeightStore()
    store.define("w", Source(source, "w"), TensorSpec((3, 3), torch.float32))
    with pytest.raises(ModelError, match=r"'w' has shape \[2, 3\], the program needs \[3, 3\]"):
        store.materialize("w")


def test_describe_shows_pending_operators_and_sources_lists_what_is_read() -> None:
    store = store_of(MemorySource({"a": torch.ones(1), "b": torch.ones(1)}))
    spec = TensorSpec((2,), torch.float32)
    store.derive("c", ("a", "b"), lambda *t: torch.cat(t), spec, exact=True, label="cat")
    assert describe(store.expression("c")) == "cat(a, b)"
    assert [source.name for source in sources(store.expression("c"))] == ["a", "b"]


def test_memory_source_fingerprint_follows_values() -> None:
    one, two = MemorySource({"w": torch.ones(2)}), MemorySource({"w": torch.zeros(2)})
    assert one.fingerprint() == MemorySource({"w": torch.ones(2)}).fingerprint()
    assert one.fingerprint() != two.fingerprint()
