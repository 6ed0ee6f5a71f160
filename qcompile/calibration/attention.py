"""Attention over whole windows: what the oracle computes, without its table of scores."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from qcompile.kernels.attention import reference


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> Tensor:
    """See `qcompile.kernels.attention.reference.attention` for arguments and result.

    Plain causal attention without padding goes to torch's fused kernel, all else to the oracle.
    """
    tokens = query.shape[2]
    is_plain = (
        causal
        and tokens == key.shape[2]
        and mask is None
        and sinks is None
        and softcap == 0
        and (window == 0 or window >= tokens)
        and (key_mask is None or bool((key_mask != 0).all()))
    )
    if not is_plain:
        return reference.attention(
            query, key, value, mask, key_mask, sinks, scale, causal, window, softcap
        )
    return functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
