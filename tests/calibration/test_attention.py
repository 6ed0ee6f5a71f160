import pytest
import torch

from qcompile.calibration.attention import attention
from qcompile.kernels.attention import reference

PLAIN = {"mask": None, "sinks": None, "window": 0, "softcap": 0.0, "causal": True}


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"window": 6},
        {"window": 3},
        {"softcap": 2.0},
        {"causal": False},
        {"sinks": torch.tensor([0.1, -0.2, 0.3, 0.4])},
        {"mask": torch.randn(1, 1, 6, 6)},
        {"key_mask": torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])},
        {"key_mask": torch.ones(2, 6, dtype=torch.int64)},
    ],
    ids=str,
)
def test_attention_of_calibration_is_that_of_the_oracle(changed):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    arguments = {**PLAIN, "key_mask": None, "scale": 0.3, **changed}
    found = attention(q, k, v, **arguments)
    torch.testing.assert_close(found, reference.attention(q, k, v, **arguments))


def test_queries_over_a_past_see_all_of_it():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    arguments = {**PLAIN, "key_mask": None, "scale": 0.3}
    found = attention(q, k, v, **arguments)
    torch.testing.assert_close(found, reference.attention(q, k, v, **arguments))
