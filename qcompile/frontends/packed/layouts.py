"""The documented layouts of packed weights, decoded to float32.

Each function takes tensors as they stand in a checkpoint and returns the weight as a linear layer
has it: [N, K], output features first. Work goes in chunks of rows, so that the memory in use is
the result and a few megabytes. Shapes are the caller's to check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 20
_ROW_MULTIPLE = 32  # keeps the chunks of rows on the borders of packed words

# AWQ's GEMM kernel wants nibble i of a word to be column (0, 2, 4, 6, 1, 3, 5, 7)[i]; this is
# its inverse: which nibble holds column i.
_AWQ_NIBBLE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)


def decode_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, groups: Tensor, bits: int, zero_offset: int
) -> Tensor:
    """GPTQ: codes packed along the input, zero points along the output.

    Args:
        qweight: [K * bits / 32, N] int32, a stream of bits down each column.
        qzeros: [G, N * bits / 32] int32, a stream of bits along each row.
        scales: [G, N] floating.
        groups: [K] int64, the group of each input (``g_idx``).
        bits: 2, 3, 4 or 8.
        zero_offset: Added to the stored zero points, modulo 2^bits: 1 in the original format
            (which stores them less one), 0 in ``gptq_v2``.
    """
    outputs, inputs = scales.shape[1], groups.shape[0]
    zeros = (unpack_stream(qzeros, bits, outputs) + zero_offset) & (2**bits - 1)

    def codes(start: int, stop: int) -> Tensor:
        return unpack_stream(qweight[:, start:stop].t().contiguous(), bits, inputs)

    return _affine((outputs, inputs), codes, scales.t(), zeros.t(), groups)


def decode_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor, groups: Tensor) -> Tensor:
    """AWQ (version ``gemm``): 4 bits, packed along the output, nibbles interleaved.

    Args:
        qweight: [K, N / 8] int32.
        qzeros: [G, N / 8] int32.
        scales: [G, N] floating.
        groups: [K] int64, the group of each input.
    """
    outputs, inputs = scales.shape[1], groups.shape[0]

    def codes(start: int, stop: int) -> Tensor:
        return _unpack_awq(qweight[:, start // 8 : -(-stop // 8)]).t()

    return _affine((outputs, inputs), codes, scales.t(), _unpack_awq(qzeros).t(), groups)


def decode_packed(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    groups: Tensor,
    bits: int,
    *,
    padded_words: bool,
) -> Tensor:
    """compressed-tensors ``pack-quantized``: codes offset by 2^(bits-1), packed along the input.

    Args:
        packed: [N, words] int32.
        scale: [N, G] or [1, 1] floating.
        zero: [N, G] int32, in the range of the codes; None for the middle of the range.
        groups: [K] int64, the group of each input.
        bits: 1 to 8.
        padded_words: Whether a word holds only whole codes (releases before 0.11 or so did this
            for 3, 5, 6 and 7 bits), rather than a stream that crosses from word to word.
    """
    outputs, inputs = packed.shape[0], groups.shape[0]
    unpack = unpack_words if padded_words else unpack_stream
    if zero is None:
        zero = torch.full_like(scale, 2 ** (bits - 1), dtype=torch.int32)

    def codes(start: int, stop: int) -> Tensor:
        return unpack(packed[start:stop].contiguous(), bits, inputs)

    return _affine((outputs, inputs), codes, scale, zero, groups)


def decode_scaled(
    weight: Tensor, scale: Tensor, zero: Tensor | None, block: tuple[int, int]
) -> Tensor:
    """Integers or small floats in a tensor of their own type, times a scale per block.

    Args:
        weight: [N, K] int8 or an 8-bit float type.
        scale: [ceil(N / rows), ceil(K / columns)] floating.
        zero: Of the scale's shape, subtracted before scaling; None for zero.
        block: (rows, columns) that share a scale.
    """
    outputs, inputs = weight.shape
    columns = torch.arange(inputs) // block[1]
    result = torch.empty(outputs, inputs)
    for start, stop in _row_chunks(outputs, inputs):
        rows = torch.arange(start, stop) // block[0]
        values = weight[start:stop].to(torch.float32)
        if zero is not None:
            values -= zero.to(torch.float32)[rows][:, columns]
        result[start:stop] = values * scale.to(torch.float32)[rows][:, columns]
    return result


def decode_codebook4(
    packed: Tensor, absmax: Tensor, codebook: Tensor, block_size: int, shape: tuple[int, ...]
) -> Tensor:
    """NF4 and FP4 of bitsandbytes: two codes a byte, the first in the high half, blocks flattened.

    Args:
        packed: uint8, ceil(elements / 2) of them in any shape.
        absmax: [ceil(elements / block_size)] float32.
        codebook: [16] float32.
        block_size: Elements that share an absmax, even.
        shape: Of the weight.
    """
    data = packed.reshape(-1)
    result = torch.empty(torch.Size(shape).numel())
    step = max(1, _CHUNK_ELEMENTS // block_size) * block_size
    for start in range(0, result.numel(), step):
        chunk = data[start // 2 : (start + step) // 2]
        codes = torch.stack((chunk >> 4, chunk & 15), dim=1).reshape(-1)
        part = result[start : start + step]
        blocks = torch.arange(start, start + part.numel()) // block_size
        torch.mul(codebook[codes[: part.numel()].long()], absmax[blocks], out=part)
    return result.reshape(shape)


def decode_nested_absmax(
    codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int, offset: float
) -> Tensor:
    """Double quantization of bitsandbytes: the absmax values of blocks, themselves in 8 bits.

    Args:
        codes: [blocks] uint8.
        absmax: [ceil(blocks / block_size)] float32.
        codebook: [256] float32.
        block_size: Blocks that share a second-level absmax.
        offset: Their mean, which was subtracted.
    """
    second_level = torch.arange(codes.numel()) // block_size
    return codebook[codes.reshape(-1).long()] * absmax[second_level] + offset


def unpack_stream(words: Tensor, bits: int, count: int) -> Tensor:
    """Unsigned codes from rows of int32 words, lowest bit first, crossing word borders.

    Args:
        words: [R, W] int32, contiguous.
        bits: Per code, 1 to 8.
        count: Codes per row, at most W * 32 / bits.

    Returns:
        [R, count] uint8.
    """
    mask = 2**bits - 1
    octets = words.contiguous().view(torch.uint8)
    if 8 % bits == 0:
        parts = [(octets >> shift) & mask for shift in range(0, 8, bits)]
        return torch.stack(parts, dim=-1).reshape(words.shape[0], -1)[:, :count]
    positions = torch.arange(count) * bits
    first = positions // 8
    second = (first + 1).clamp(max=octets.shape[1] - 1)  # past the end only where it is not needed
    pairs = octets[:, first].to(torch.int32) | octets[:, second].to(torch.int32) << 8
    codes: Tensor = (pairs >> (positions % 8).to(torch.int32)) & mask
    return codes.to(torch.uint8)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Unsigned codes from rows of int32 words that hold 32 // bits whole codes each.

    Returns:
        [R, count] uint8.
    """
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    codes: Tensor = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.to(torch.uint8).reshape(words.shape[0], -1)[:, :count]


def _unpack_awq(words: Tensor) -> Tensor:
    """[R, W] int32 to [R, 8 W] uint8, columns in order."""
    nibbles = unpack_stream(words, 4, words.shape[1] * 8).reshape(words.shape[0], -1, 8)
    return nibbles[..., list(_AWQ_NIBBLE_OF_COLUMN)].reshape(words.shape[0], -1)


def _affine(
    shape: tuple[int, int],
    codes: Callable[[int, int], Tensor],
    scale: Tensor,
    zero: Tensor,
    groups: Tensor,
) -> Tensor:
    """(codes - zero) * scale: `codes` gives rows [start, stop), scale and zero are [N or 1, G]."""
    outputs, inputs = shape
    scale = scale.to(torch.float32).expand(outputs, -1)
    zero = zero.to(torch.float32).expand(outputs, -1)
    result = torch.empty(outputs, inputs)
    for start, stop in _row_chunks(outputs, inputs):
        values = codes(start, stop).to(torch.float32)
        values -= zero[start:stop][:, groups]
        torch.mul(values, scale[start:stop][:, groups], out=result[start:stop])
    return result


def _row_chunks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK_ELEMENTS // (max(columns, 1) * _ROW_MULTIPLE)) * _ROW_MULTIPLE
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
