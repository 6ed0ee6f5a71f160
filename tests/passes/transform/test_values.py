from __future__ import annotations

import pytest
import torch

from qcompile.kernels.transform.flops import transform_flops
from qcompile.passes.transform.values import (
    Affine,
    BlockDiagonal,
    Compose,
    Diagonal,
    Hadamard,
    Identity,
    Orthogonal,
    Permutation,
    Shift,
    Transform,
    TransformCost,
    decode,
    random_hadamard,
    random_orthogonal,
    simplify,
)

N = 12


def values() -> dict[str, Transform]:
    generator = torch.Generator().manual_seed(0)
    scale = 0.5 + torch.rand(N, generator=generator, dtype=torch.float64)
    signs = torch.tensor([1, -1, -1] * 4, dtype=torch.int8)
    q = random_orthogonal(N, generator)
    block = random_orthogonal(4, generator)
    linear = q.rotation @ torch.diag(scale)
    permutation = Permutation(torch.randperm(N, generator=generator))
    return {
        "identity": Identity(N),
        "diagonal": Diagonal(scale),
        "permutation": permutation,
        "hadamard": Hadamard(N, N),
        "hadamard of blocks": Hadamard(N, 4, signs),
        "hadamard flipped": Hadamard(N, 12, signs, flipped=True),
        "orthogonal": q,
        "affine": Affine(linear),
        "compose": Compose((Diagonal(scale), q, permutation)),
        "blocks": BlockDiagonal((Hadamard(4, 4), random_orthogonal(3, generator), Identity(5))),
        "blocks that share": BlockDiagonal((block, block, block)),
    }


def shifted(offset: float) -> Shift:
    return Shift(torch.linspace(0, offset, N, dtype=torch.float64))


@pytest.mark.parametrize("kind", values())
def test_cost_is_that_of_the_operator(kind: str) -> None:
    value = values()[kind]
    encoded = value.encode()
    shapes = [numbers.shape for numbers in encoded.params]
    assert value.cost().flops == transform_flops(N, shapes, encoded.kind, encoded.dims)


@pytest.mark.parametrize("kind", values())
def test_inverse_undoes_and_dual_is_the_inverse_transposed(kind: str) -> None:
    value = values()[kind]
    identity = torch.eye(N, dtype=torch.float64)
    matrix = value.matrix()
    torch.testing.assert_close(matrix @ value.inverse().matrix(), identity, rtol=0, atol=1e-14)
    torch.testing.assert_close(matrix @ value.dual().matrix().T, identity, rtol=0, atol=1e-14)
    torch.testing.assert_close(value.transposed().matrix(), matrix.T, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", values())
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_apply_is_the_product_with_the_matrix_along_an_axis(kind: str, axis: int) -> None:
    value = values()[kind]
    x = torch.randn(N, N, N, dtype=torch.float64)
    expected = torch.tensordot(x, value.matrix(), dims=([axis], [0])).movedim(-1, axis)
    torch.testing.assert_close(value.apply(x, axis), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", values())
def test_encoded_and_decoded_is_the_same(kind: str) -> None:
    value = values()[kind]
    encoded = value.encode()
    again = decode(encoded.kind, encoded.params, encoded.dims, value.size)
    assert torch.equal(again.matrix(), value.matrix())
    assert torch.equal(again.dual().matrix(), value.dual().matrix())


@pytest.mark.parametrize("kind", values())
def test_transform_and_its_inverse_cancel(kind: str) -> None:
    value = values()[kind]
    for pair in ((value, value.inverse()), (value.inverse(), value)):
        found = simplify(Compose(pair))
        torch.testing.assert_close(
            found.matrix(), torch.eye(N, dtype=torch.float64), rtol=0, atol=1e-14
        )
        assert found.cost().flops <= 2 * N  # scales whose product is 1 but for rounding may stay


@pytest.mark.parametrize("kind", ["hadamard", "permutation", "orthogonal", "compose", "blocks"])
def test_inverses_that_are_exact_leave_nothing(kind: str) -> None:
    value = values()[kind]
    if kind == "compose":
        value = Compose((value, Permutation(torch.arange(N).flip(0))))
        value = Compose(tuple(p for p in value.parts if not isinstance(p, Compose)))
    assert isinstance(simplify(Compose((value, value.inverse()))), Identity)


def test_values_of_one_kind_merge() -> None:
    v = values()
    cases: list[tuple[type, tuple[Transform, ...]]] = [
        (Diagonal, (v["diagonal"], v["diagonal"])),
        (Permutation, (v["permutation"], v["permutation"])),
        (Orthogonal, (v["orthogonal"], v["orthogonal"])),
        (Affine, (v["affine"], v["orthogonal"])),
        (Shift, (shifted(1), shifted(2))),
    ]
    for kind, parts in cases:
        merged = simplify(Compose(parts))
        assert type(merged) is kind
        torch.testing.assert_close(
            merged.apply(torch.eye(N, dtype=torch.float64)),
            Compose(parts).apply(torch.eye(N, dtype=torch.float64)),
            rtol=0,
            atol=1e-13,
        )


def test_values_of_different_kinds_stay_in_order() -> None:
    v = values()
    parts = (v["diagonal"], v["hadamard"], v["hadamard"].inverse(), v["permutation"])
    found = simplify(Compose(parts))
    assert isinstance(found, Compose)
    assert [type(part) for part in found.parts] == [Diagonal, Permutation]


def test_blocks_of_one_kind_become_one_value() -> None:
    scale = torch.tensor([2.0, 3.0], dtype=torch.float64)
    swap = Permutation(torch.tensor([1, 0]))
    diagonal = simplify(BlockDiagonal((Identity(2), Diagonal(scale))))
    permutation = simplify(BlockDiagonal((swap, Identity(1), swap)))
    hadamard = simplify(BlockDiagonal((Hadamard(4, 4), Hadamard(8, 4))))
    assert isinstance(diagonal, Diagonal)
    assert diagonal.scale.tolist() == [1, 1, 2, 3]
    assert isinstance(permutation, Permutation)
    assert permutation.index.tolist() == [1, 0, 2, 4, 3]
    assert isinstance(hadamard, Hadamard)
    assert (hadamard.n, hadamard.block) == (12, 4)


def test_shift_goes_back_and_is_not_seen_by_weights() -> None:
    shift = shifted(3)
    x = torch.randn(2, N, dtype=torch.float64)
    torch.testing.assert_close(shift.inverse().apply(shift.apply(x)), x, rtol=0, atol=1e-15)
    assert not shift.is_linear
    assert isinstance(shift.dual(), Identity)


def test_fast_hadamard_costs_less_than_a_matrix() -> None:
    n = 1024
    fast, dense = Hadamard(n, n).cost(), Orthogonal(torch.eye(n)).cost()
    assert fast.flops == n * (10 + 1)
    assert fast.parameter_bits == 0
    assert dense.flops == 2 * n * n
    assert dense.parameter_bits == 32 * n * n


def test_blocks_that_share_a_matrix_store_it_once() -> None:
    block = Orthogonal(torch.eye(4, dtype=torch.float64))
    shared = BlockDiagonal((block, block, block))
    assert shared.encode().params[0].shape == (4, 4)
    assert shared.cost() == TransformCost(flops=3 * 2 * 16, parameter_bits=32 * 16)


@pytest.mark.parametrize(
    ("n", "online", "kind", "words"),
    [
        (12, False, Hadamard, "a Hadamard matrix for 12"),
        (9, False, Orthogonal, "random orthogonal factor of order 9"),
        (18, False, Orthogonal, "factor of order 9 times a Hadamard matrix of order 2"),
        (18, True, Hadamard, "Hadamard matrices on blocks of 2"),
    ],
)
def test_rotation_is_chosen_by_what_orders_there_are(
    n: int, online: bool, kind: type, words: str
) -> None:
    found = random_hadamard(n, torch.Generator().manual_seed(0), online=online)
    assert isinstance(found.value, kind)
    assert words in found.choice
    q = found.value.matrix()
    torch.testing.assert_close(q @ q.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-14)


def test_hadamard_of_an_unknown_order_is_refused() -> None:
    with pytest.raises(ValueError, match="blocks of 6 on 12"):
        Hadamard(12, 6)
