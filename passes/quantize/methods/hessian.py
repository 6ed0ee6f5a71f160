"""Second-moment matrices made fit for factorization."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.calibration.statistics import Hessian
from qcompile.errors import ModelError
from qcompile.kernels.lookup_vectors.reference import turn

_ATTEMPTS = 6


@dataclass(frozen=True, eq=False)
class Feedback:
    """How errors made so far move what the columns after them should become.

    With ``H = (L + I)^T D (L + I)``, L strictly lower triangular and D diagonal, the error
    ``trace(E H E^T)`` is the sum over columns k of ``D_k |e_k + sum_{i<k} L_ki e_i|^2``.

    Attributes:
        lower: L in the order of `order`, float32 [K, K]: row k is what column k asks for.
        pivots: D in the same order, float32 [K]: what is left of the moments of each column's
            input when those behind it are known, damping included.
        order: The columns in the order in which they are worked on, int64 [K].
        notes: What the user should know.
    """

    lower: Tensor
    pivots: Tensor
    order: Tensor
    notes: tuple[str, ...] = ()


class Inputs:
    """What was seen of the inputs that some weights share; factorizations are made once.

    Args:
        hessian: Their second moments.
        rows: Some of them, float32 [n, K], where a method asks for `Rows`.
    """

    def __init__(self, hessian: Hessian, rows: Tensor | None = None) -> None:
        self.hessian = hessian
        self.rows = rows
        self._made: dict[tuple[float, bool], Feedback] = {}
        self._turned: dict[int, Inputs] = {}
        self._lock = threading.Lock()

    @property
    def importance(self) -> Tensor:
        """Second moment of each input, float32 [K]: what an error of its column costs."""
        return self.hessian.matrix.diagonal().to(torch.float32)

    def feedback(
        self, *, damping: float, descending: bool, name: str, order: Tensor | None = None
    ) -> Feedback:
        """See the function of this name; an order of one's own is factorized each time."""
        if order is not None:
            return feedback(
                self.hessian, damping=damping, descending=descending, name=name, order=order
            )
        with self._lock:
            key = damping, descending
            if key not in self._made:
                self._made[key] = feedback(
                    self.hessian, damping=damping, descending=descending, name=name
                )
            return self._made[key]

    def turned(self, block: int) -> Inputs:
        """These inputs in the basis that vector codebooks turn weights to, made once; see `turn`.

        Args:
            block: Order of the Hadamard matrices.
        """
        with self._lock:
            if block not in self._turned:
                # Symmetric, so that turning the rows of the transpose turns the other side.
                moments = turn(turn(self.hessian.sum, block).T, block)
                peak = torch.full_like(self.hessian.peak, torch.inf)  # not known in another basis
                self._turned[block] = Inputs(Hessian(moments, self.hessian.count, peak))
            return self._turned[block]

    def energy(self, weight: Tensor) -> float:
        """Mean square of the layer's output on these inputs, summed over outputs.

        Args:
            weight: float32 [N, K], or an error of one.
        """
        matrix = self.hessian.matrix.to(torch.float32)
        return float((weight @ matrix).mul_(weight).sum(dtype=torch.float64))

    def relative_error(self, weight: Tensor, decoded: Tensor) -> float:
        """Mean squared error of the layer's output over its mean square, on these inputs.

        Args:
            weight: float32 [N, K].
            decoded: What stands for it, float32 [N, K].
        """
        whole = self.energy(weight)
        return self.energy(weight - decoded) / whole if whole > 0 else 0.0


def feedback(
    hessian: Hessian,
    *,
    damping: float,
    descending: bool,
    name: str,
    order: Tensor | None = None,
) -> Feedback:
    """Factorizes a damped Hessian, in float64.

    Inputs that were always zero get a diagonal of 1: they neither give nor take errors. If the
    factorization fails the damping is raised tenfold and the outcome says so.

    Args:
        hessian: Of the inputs.
        damping: Fraction of the mean diagonal that is added to the diagonal.
        descending: Whether columns are worked on by falling diagonal instead of as they stand.
        name: What messages call the weight.
        order: The columns in the order in which they are worked on instead, int64 [K].

    Raises:
        ModelError: There are no statistics, or they cannot be factorized.

    Source: Frantar et al. 2022 (GPTQ), section 3; Chee et al. 2023 (QuIP) for this form.
    """
    if not hessian.count:
        raise ModelError(
            f"no input of '{name}' was seen during calibration",
            remedy="use more calibration data, or leave the weight to rounding to nearest",
        )
    matrix = hessian.matrix
    diagonal = matrix.diagonal()
    notes: list[str] = []
    dead = diagonal == 0
    if bool(dead.any()):
        notes.append(f"{int(dead.sum())} of {len(dead)} inputs were always zero")
        diagonal[dead] = 1.0
    if order is None:
        falling = torch.argsort(diagonal, descending=True, stable=True)
        order = falling if descending else torch.arange(len(matrix))
    matrix = matrix[order][:, order]
    level = float(diagonal[~dead].mean()) if not bool(dead.all()) else 1.0
    factor, used = _factorize(matrix, level, damping, name)
    if used != damping:
        notes.append(f"damping raised from {damping:g} to {used:g}: its inputs are dependent")
    roots = factor.diagonal().clone()
    lower = factor.div_(roots).fill_diagonal_(0.0).T.to(torch.float32)
    pivots = roots.square_().to(torch.float32)
    return Feedback(lower.contiguous(), pivots, order, tuple(notes))


def _factorize(matrix: Tensor, level: float, damping: float, name: str) -> tuple[Tensor, float]:
    """R upper triangular with R R^T the damped matrix, and the damping that it took."""
    for _ in range(_ATTEMPTS):
        damped = matrix.clone()
        damped.diagonal().add_(damping * level)
        # Reversing rows and columns makes the lower factor of a matrix an upper one.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed and bool(lower.isfinite().all()):
            return lower.flip(0, 1), damping
        damping = damping * 10 if damping else 1e-6
    raise ModelError(
        f"the inputs of '{name}' cannot be factorized, even with a damping of {damping:g}",
        remedy="look at the model in float32: some of its activations are far out of range",
    )
