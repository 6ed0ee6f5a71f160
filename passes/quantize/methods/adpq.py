"""AdpQ: the largest weights of each row are stored apart, and the grid of the others is finer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qcompile.formats import SparseFormat
from qcompile.passes.quantize.methods.base import Method, Outcome, Task
from qcompile.passes.quantize.methods.parts import undivided
from qcompile.passes.quantize.methods.rtn import Rtn


@dataclass(frozen=True)
class Adpq(Method):
    """Divides the weights of each row by an adaptive lasso, without any data.

    The format says how many survive the shrinkage: ``int4-g64-asym/1%fp16``. A penalty for each row
    leaves that many; they get floats beside their codes, and the others are rounded to nearest with
    scales of their own. The paper stores the survivors as integers with scales of their own: at
    the few that these formats have, a float costs less than these scales.

    Source: Ghaffari et al. 2024, "AdpQ: A Zero-shot Calibration Free Adaptive Post Training
    Quantization Method for LLMs".
    """

    def quantize(self, task: Task) -> Outcome:
        """Divides, then rounds. Only rounds where the format has no floats beside its codes."""
        format = task.format
        if not isinstance(format, SparseFormat):
            return undivided(Rtn().quantize(task), format)
        size = task.weight.abs()
        first_to_go = size.sort(dim=-1, descending=True).values[:, format.count(size.shape[1]) :]
        penalty = first_to_go[:, :1].square()
        survivors = adaptive_lasso(task.weight, penalty)
        index = format.largest(survivors.abs())
        rest = task.weight.scatter(1, index, 0.0)
        base = format.base.encode(rest, scale_search=task.scale_search, name=task.name)
        lacking = task.weight - format.base.decode(base)
        return Outcome(format.join(base, index, lacking.gather(1, index), task.name))


def adaptive_lasso(weight: Tensor, penalty: Tensor) -> Tensor:
    """Minimizes ``1/2 (x - w)^2 + penalty |x| / |w|``: small weights go, large ones hardly shrink.

    Args:
        weight: w, [N, K].
        penalty: Broadcast against it; what is smaller than its square root becomes 0.

    Returns:
        x, [N, K].

    Source: Ghaffari et al. 2024, section 3.
    """
    size = weight.abs()
    shrunk = (size - penalty / size.clamp(min=1e-30)).clamp(min=0)
    return weight.sign() * shrunk
