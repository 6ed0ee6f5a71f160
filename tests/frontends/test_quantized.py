"""Quantized checkpoints: described, refused, and decoded from layouts that are packed here anew.

The packers below are written from the layouts' descriptions, one bit at a time, and share nothing
with the decoders.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qcompile.errors import ModelError
from qcompile.frontends.quantized import (
    DequantizedSource,
    QuantizedCheckpoint,
    dequantized_source,
    describe_quantization,
)
from qcompile.ir.weights import MemorySource, TensorSource, TensorSpec

N, K, GROUP = 32, 96, 32
G = K // GROUP
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def config_of(**entry: Any) -> dict[str, Any]:
    return {"model_type": "llama", "quantization_config": entry}


def compressed(format: str = "pack-quantized", **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return config_of(
        quant_method="compressed-tensors",
        format=format,
        config_groups={"group_0": group},
        ignore=["lm_head"],
    )


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def random_codes(bits: int, *shape: int) -> Tensor:
    codes = torch.randint(0, 2**bits, shape, generator=generator())
    codes.view(-1)[:2] = torch.tensor([0, 2**bits - 1])  # the ends of the range, always
    return codes


def random_scales(*shape: int) -> Tensor:
    return (torch.rand(*shape, generator=generator()) + 0.1).half()


def to_words(bit_string: list[int]) -> list[int]:
    """Bits, lowest first, to int32 words."""
    padded = bit_string + [0] * (-len(bit_string) % 32)
    words = []
    for start in range(0, len(padded), 32):
        word = sum(bit << place for place, bit in enumerate(padded[start : start + 32]))
        words.append(word - 2**32 if word >= 2**31 else word)
    return words


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """[R, C] codes to [R, ceil(C * bits / 32)] words, one stream of bits per row."""
    rows = [
        to_words([int(code) >> place & 1 for code in row for place in range(bits)]) for row in codes
    ]
    return torch.tensor(rows, dtype=torch.int32)


def pack_whole_codes(codes: Tensor, bits: int) -> Tensor:
    """As `pack_rows`, but a word holds 32 // bits codes and the rest of it is empty."""
    per_word = 32 // bits
    rows = []
    for row in codes:
        bit_string: list[int] = []
        for index, code in enumerate(row):
            bit_string += [int(code) >> place & 1 for place in range(bits)]
            if index % per_word == per_word - 1:
                bit_string += [0] * (32 - per_word * bits)
        rows.append(to_words(bit_string))
    return torch.tensor(rows, dtype=torch.int32)


def affine(codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor) -> Tensor:
    """(codes - zero) * scale by the definition: codes [N, K], zeros and scales [N, G]."""
    zero = torch.stack([zeros[:, group] for group in groups], dim=1)
    scale = torch.stack([scales[:, group] for group in groups], dim=1)
    return (codes - zero).float() * scale.float()


def in_order() -> Tensor:
    return torch.arange(K) // GROUP


def decode(tensors: dict[str, Tensor], config: dict[str, Any]) -> TensorSource:
    return dequantized_source(MemorySource(tensors, "some/model"), config, allow=True)


# --- GPTQ and AWQ ------------------------------------------------------------------------------


def gptq_tensors(bits: int, zeros: Tensor, codes: Tensor, stored_less: int) -> dict[str, Tensor]:
    """codes [N, K], zeros [N, G]; `stored_less` is 1 in the original format."""
    return {
        "model.layer.qweight": pack_rows(codes, bits).t().contiguous(),
        "model.layer.qzeros": pack_rows((zeros.t() - stored_less) % 2**bits, bits),
        "model.layer.scales": random_scales(N, G).t().contiguous(),
    }


@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_decoded(bits: int, format: str) -> None:
    codes, zeros = random_codes(bits, N, K), random_codes(bits, N, G)
    tensors = gptq_tensors(bits, zeros, codes, 1 if format == "gptq" else 0)
    config = config_of(
        quant_method="gptq", bits=bits, group_size=GROUP, checkpoint_format=format, sym=False
    )
    source = decode(tensors, config)
    assert source.specs() == {"model.layer.weight": TensorSpec((N, K), torch.float32)}
    expected = affine(codes, zeros, random_scales(N, G), in_order())
    assert torch.equal(source.read("model.layer.weight"), expected)


def test_gptq_groups_follow_g_idx() -> None:
    codes, zeros = random_codes(4, N, K), random_codes(4, N, G)
    groups = in_order()[torch.randperm(K, generator=generator())]
    tensors = gptq_tensors(4, zeros, codes, 1) | {"model.layer.g_idx": groups.int()}
    config = config_of(quant_method="gptq", bits=4, group_size=GROUP, desc_act=True)
    expected = affine(codes, zeros, random_scales(N, G), groups)
    assert torch.equal(decode(tensors, config).read("model.layer.weight"), expected)


def test_gptq_per_channel_has_one_group() -> None:
    codes, zeros = random_codes(4, N, K), random_codes(4, N, 1)
    tensors = gptq_tensors(4, zeros, codes, 1)
    tensors["model.layer.scales"] = random_scales(N, 1).t().contiguous()
    config = config_of(quant_method="gptq", bits=4, group_size=-1)
    expected = affine(codes, zeros, random_scales(N, 1), torch.zeros(K, dtype=torch.int64))
    assert torch.equal(decode(tensors, config).read("model.layer.weight"), expected)


def pack_awq(codes: Tensor) -> Tensor:
    """[R, C] codes to [R, C / 8] words: nibble i of a word is column AWQ_ORDER[i] of its eight."""
    shuffled = codes.reshape(codes.shape[0], -1, 8)[..., list(AWQ_ORDER)]
    return pack_rows(shuffled.reshape(codes.shape), 4)


def test_awq_is_decoded() -> None:
    codes, zeros = random_codes(4, N, K), random_codes(4, N, G)
    tensors = {
        "layer.qweight": pack_awq(codes.t()),
        "layer.qzeros": pack_awq(zeros.t()),
        "layer.scales": random_scales(N, G).t().contiguous(),
    }
    config = config_of(quant_method="awq", bits=4, group_size=GROUP, zero_point=True)
    expected = affine(codes, zeros, random_scales(N, G), in_order())
    assert torch.equal(decode(tensors, config).read("layer.weight"), expected)


# --- compressed-tensors ------------------------------------------------------------------------


def packed_tensors(
    codes: Tensor, bits: int, pack: Callable[[Tensor, int], Tensor]
) -> dict[str, Any]:
    return {
        "layer.weight_packed": pack(codes, bits),
        "layer.weight_scale": random_scales(N, G),
        "layer.weight_shape": torch.tensor([N, K]),
    }


@pytest.mark.parametrize("pack", [pack_rows, pack_whole_codes])
@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_symmetric_weights_are_decoded(
    bits: int, pack: Callable[[Tensor, int], Tensor]
) -> None:
    codes = random_codes(bits, N, K)
    config = compressed(num_bits=bits, type="int", symmetric=True, group_size=GROUP)
    middle = torch.full((N, G), 2 ** (bits - 1))
    source = decode(packed_tensors(codes, bits, pack), config)
    expected = affine(codes, middle, random_scales(N, G), in_order())
    assert torch.equal(source.read("layer.weight"), expected)
    assert set(source.specs()) == {"layer.weight"}


@pytest.mark.parametrize("stored", ["packed", "int8"])
def test_packed_zero_points_are_decoded(stored: str) -> None:
    codes, zeros = random_codes(4, N, K), random_codes(4, N, G)
    tensors = packed_tensors(codes, 4, pack_rows)
    tensors["layer.weight_zero_point"] = (
        pack_rows(zeros.t(), 4).t().contiguous()
        if stored == "packed"
        else (zeros - 8).to(torch.int8)
    )
    config = compressed(num_bits=4, type="int", symmetric=False, group_size=GROUP)
    expected = affine(codes, zeros, random_scales(N, G), in_order())
    assert torch.equal(decode(tensors, config).read("layer.weight"), expected)


@pytest.mark.parametrize("used", [True, False], ids=["used", "filled with -1"])
def test_packed_groups_follow_g_idx(used: bool) -> None:
    codes = random_codes(4, N, K)
    shuffled = in_order()[torch.randperm(K, generator=generator())]
    tensors = packed_tensors(codes, 4, pack_rows)
    tensors["layer.weight_g_idx"] = shuffled.int() if used else torch.full((K,), -1).int()
    config = compressed(num_bits=4, type="int", symmetric=True, group_size=GROUP)
    expected = affine(
        codes, torch.full((N, G), 8), random_scales(N, G), shuffled if used else in_order()
    )
    assert torch.equal(decode(tensors, config).read("layer.weight"), expected)


def test_packed_short_last_group_is_decoded() -> None:
    codes = random_codes(4, N, K)
    tensors = packed_tensors(codes, 4, pack_rows) | {"layer.weight_scale": random_scales(N, 2)}
    config = compressed(num_bits=4, type="int", symmetric=True, group_size=64)
    expected = affine(codes, torch.full((N, 2), 8), random_scales(N, 2), torch.arange(K) // 64)
    assert torch.equal(decode(tensors, config).read("layer.weight"), expected)


@pytest.mark.parametrize("columns", [1, G], ids=["channel", "group"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
def test_scaled_weights_are_decoded(dtype: torch.dtype, columns: int) -> None:
    weight = (torch.randn(N, K, generator=generator()) * 20).to(dtype)
    scales = random_scales(N, columns)
    tensors = {
        "layer.weight": weight,
        "layer.weight_scale": scales,
        "layer.input_scale": torch.ones(1),
        "layer.bias": torch.ones(N),
    }
    format = "int-quantized" if dtype == torch.int8 else "float-quantized"
    config = compressed(format, num_bits=8, group_size=GROUP if columns > 1 else None)
    source = decode(tensors, config)
    assert set(source.specs()) == {"layer.weight", "layer.bias"}
    expected = weight.float() * scales.float().repeat_interleave(K // columns, dim=1)
    assert torch.equal(source.read("layer.weight"), expected)
    assert torch.equal(source.read("layer.bias"), torch.ones(N))


def test_scaled_weights_with_zero_points_are_decoded() -> None:
    weight = (random_codes(8, N, K) - 128).to(torch.int8)
    zeros = (random_codes(8, N, 1) - 128).to(torch.int8)
    scales = random_scales(N, 1)
    tensors = {
        "layer.weight": weight,
        "layer.weight_scale": scales,
        "layer.weight_zero_point": zeros,
    }
    config = compressed("int-quantized", num_bits=8, type="int", strategy="channel")
    expected = (weight.float() - zeros.float()) * scales.float()
    assert torch.equal(decode(tensors, config).read("layer.weight"), expected)


def test_one_scale_per_tensor_is_decoded() -> None:
    weight = torch.randn(N, K, generator=generator()).to(torch.float8_e4m3fn)
    tensors = {"layer.weight": weight, "layer.weight_scale": torch.tensor(0.5)}
    config = compressed("float-quantized", num_bits=8, type="float", strategy="tensor")
    assert torch.equal(decode(tensors, config).read("layer.weight"), weight.float() * 0.5)


def test_dense_weights_stay_as_they_are() -> None:
    tensors = {"layer.weight": torch.ones(N, K), "layer.weight_scale": torch.ones(N, 1)}
    source = decode(tensors, compressed("dense", num_bits=8))
    assert set(source.specs()) == {"layer.weight"}
    assert torch.equal(source.read("layer.weight"), torch.ones(N, K))


def test_fp8_blocks_with_a_short_last_one_are_decoded() -> None:
    weight = torch.randn(40, 96, generator=generator()).to(torch.float8_e4m3fn)
    scales = random_scales(2, 3).float()
    tensors = {"layer.weight": weight, "layer.weight_scale_inv": scales}
    config = config_of(quant_method="fp8", weight_block_size=[32, 32], activation_scheme="dynamic")
    rows, columns = torch.arange(40) // 32, torch.arange(96) // 32
    expected = weight.float() * scales[rows][:, columns]
    assert torch.equal(decode(tensors, config).read("layer.weight"), expected)


# --- bitsandbytes ------------------------------------------------------------------------------


def bitsandbytes_tensors(
    codes: Tensor, codebook: Tensor, kind: str, *, nested: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors as saved, and the absmax of every block of 64."""
    flat = codes.reshape(-1)
    blocks = -(-flat.numel() // 64)
    state: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": 64,
        "dtype": "float16",
        "shape": list(codes.shape),
    }
    absmax = torch.rand(blocks, generator=generator()) + 0.5
    tensors = {"layer.weight.absmax": absmax, "layer.weight.quant_map": codebook}
    if nested:
        inner, outer = random_codes(8, blocks).to(torch.uint8), torch.tensor([2.0, 3.0])
        table = torch.linspace(-1, 1, 256)
        state |= {"nested_blocksize": 32, "nested_dtype": "float32", "nested_offset": 4.0}
        tensors |= {
            "layer.weight.absmax": inner,
            "layer.weight.nested_absmax": outer,
            "layer.weight.nested_quant_map": table,
        }
        absmax = torch.stack(
            [table[int(code)] * outer[index // 32] + 4.0 for index, code in enumerate(inner)]
        )
    padded = torch.cat([flat, torch.zeros(flat.numel() % 2, dtype=flat.dtype)]).reshape(-1, 2)
    tensors["layer.weight"] = (padded[:, 0] * 16 + padded[:, 1]).to(torch.uint8).unsqueeze(1)
    raw = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors[f"layer.weight.quant_state.bitsandbytes__{kind}"] = raw
    return tensors, absmax


@pytest.mark.parametrize("shape", [(32, 96), (33, 97)], ids=["whole blocks", "odd"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_4bit_is_decoded(kind: str, nested: bool, shape: tuple[int, int]) -> None:
    codes = random_codes(4, *shape)
    codebook = torch.randn(16, generator=generator())
    tensors, absmax = bitsandbytes_tensors(codes, codebook, kind, nested=nested)
    config = config_of(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type=kind)
    source = decode(tensors, config)
    assert source.specs() == {"layer.weight": TensorSpec(shape, torch.float32)}
    per_element = absmax.repeat_interleave(64)[: codes.numel()].reshape(shape)
    assert torch.equal(source.read("layer.weight"), codebook[codes] * per_element)


def test_bitsandbytes_int8_is_decoded() -> None:
    weight = (random_codes(8, N, K) - 128).to(torch.int8)
    scales = random_scales(N).float()
    tensors = {
        "layer.weight": weight,
        "layer.SCB": scales,
        "layer.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    config = config_of(load_in_8bit=True)
    source = decode(tensors, config)
    assert set(source.specs()) == {"layer.weight"}
    expected = weight.float() * scales[:, None] / 127
    # Scales are divided by 127 before or after the product: one rounding apart.
    torch.testing.assert_close(source.read("layer.weight"), expected, rtol=2e-7, atol=0)


def test_bitsandbytes_layout_of_a_gpu_is_refused() -> None:
    tensors = {
        "layer.weight": torch.zeros(N, K, dtype=torch.int8),
        "layer.SCB": torch.ones(N),
        "layer.weight_format": torch.tensor(2, dtype=torch.uint8),
    }
    with pytest.raises(ModelError, match="a layout of a GPU's own"):
        decode(tensors, config_of(load_in_8bit=True)).read("layer.weight")


# --- the source --------------------------------------------------------------------------------


def small_gptq() -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = gptq_tensors(4, random_codes(4, N, G), random_codes(4, N, K), 1)
    return tensors, config_of(quant_method="gptq", bits=4, group_size=GROUP)


def test_large_weights_are_decoded_in_chunks_to_the_same_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qcompile.frontends.packed.layouts._CHUNK_ELEMENTS", 1)
    codes, zeros = random_codes(4, 80, K), random_codes(4, 80, G)
    scales = random_scales(80, G)
    tensors = {
        "layer.qweight": pack_awq(codes.t()),
        "layer.qzeros": pack_awq(zeros.t()),
        "layer.scales": scales.t().contiguous(),
    }
    config = config_of(quant_method="awq", bits=4, group_size=GROUP)
    expected = affine(codes, zeros, scales, in_order())
    assert torch.equal(decode(tensors, config).read("layer.weight"), expected)
    codebook = torch.randn(16, generator=generator())
    stored, absmax = bitsandbytes_tensors(codes, codebook, "nf4", nested=False)
    config = config_of(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    expected = codebook[codes] * absmax.repeat_interleave(64).reshape(80, K)
    assert torch.equal(decode(stored, config).read("layer.weight"), expected)


def test_other_tensors_pass_unchanged() -> None:
    tensors, config = small_gptq()
    norm = torch.randn(K, generator=generator()).bfloat16()
    source = decode(tensors | {"model.norm.weight": norm}, config)
    assert isinstance(source, TensorSource)
    assert source.identity == "some/model"
    assert set(source.specs()) == {"model.layer.weight", "model.norm.weight"}
    assert source.read("model.norm.weight").dtype == torch.bfloat16
    assert torch.equal(source.read("model.norm.weight"), norm)


def test_packed_tensors_cannot_be_read() -> None:
    source = decode(*small_gptq())
    with pytest.raises(ModelError, match="no tensor 'model.layer.qweight'".replace(".", r"\.")):
        source.read("model.layer.qweight")


def test_fingerprint_differs_from_that_of_the_stored_checkpoint() -> None:
    tensors, config = small_gptq()
    assert decode(tensors, config).fingerprint() == decode(tensors, config).fingerprint()
    assert decode(tensors, config).fingerprint() != MemorySource(tensors).fingerprint()
    other = config_of(**{**config["quantization_config"], "checkpoint_format": "gptq_v2"})
    assert decode(tensors, config).fingerprint() != decode(tensors, other).fingerprint()


@pytest.mark.parametrize("missing", ["qzeros", "scales"])
def test_missing_part_of_a_layer_is_named(missing: str) -> None:
    tensors, config = small_gptq()
    del tensors[f"model.layer.{missing}"]
    with pytest.raises(ModelError, match=rf"no tensor 'model\.layer\.{missing}'"):
        decode(tensors, config)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("qweight", torch.zeros(12, N + 1, dtype=torch.int32), "qweight of shape"),
        ("qweight", torch.zeros(12, N), "qweight of shape .* and type torch.float32"),
        ("qweight", torch.zeros(12, dtype=torch.int32), r"a tensor of shape \[12\]"),
        ("qzeros", torch.zeros(G, 5, dtype=torch.int32), "5 bits"),
        ("qzeros", torch.zeros((), dtype=torch.int32), r"a tensor of shape \[\]"),
        ("scales", torch.zeros(G + 2, N), "qzeros of shape"),
        ("g_idx", torch.zeros(7, dtype=torch.int32), "g_idx of wrong size"),
    ],
)
def test_tensors_that_do_not_fit_name_the_layer(name: str, tensor: Tensor, message: str) -> None:
    tensors, config = small_gptq()
    with pytest.raises(ModelError, match=rf"layer 'model\.layer' of 'some/model'.*{message}"):
        decode(tensors | {f"model.layer.{name}": tensor}, config)


def test_group_index_past_the_end_is_refused() -> None:
    tensors, config = small_gptq()
    tensors["model.layer.g_idx"] = torch.full((K,), G, dtype=torch.int32)
    with pytest.raises(ModelError, match="g_idx past the last group"):
        decode(tensors, config).read("model.layer.weight")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("weight_packed", torch.zeros(N, K // 2, dtype=torch.uint8), "an FP4 or MX format"),
        ("weight_packed", torch.zeros(N, 11, dtype=torch.int32), "rows of 11 words for 96 inputs"),
        ("weight_shape", torch.tensor([N + 1, K]), "32 rows for 33"),
        ("weight_shape", torch.tensor([N, -K]), "weight_shape"),
        ("weight_shape", torch.tensor([N]), "weight_shape of 1 numbers"),
        ("weight_scale", torch.ones(N + 1, G), "scales of shape"),
        ("weight_scale", torch.ones(N, 7), "7 groups of 96"),
    ],
)
def test_compressed_tensors_that_do_not_fit_name_the_layer(
    name: str, tensor: Tensor, message: str
) -> None:
    tensors = packed_tensors(random_codes(4, N, K), 4, pack_rows)
    config = compressed(num_bits=4, type="int", symmetric=True, group_size=GROUP)
    with pytest.raises(ModelError, match=f"layer 'layer' of 'some/model'.*{message}"):
        decode(tensors | {f"layer.{name}": tensor}, config)


@pytest.mark.parametrize(
    "state",
    [
        b"{",
        b"[]",
        b"{}",
        b'{"shape": 3, "blocksize": 64}',
        b'{"shape": [32, 96], "blocksize": 0}',
        b'{"shape": [32, 96], "blocksize": 63}',
        b'{"shape": [32, 96], "blocksize": 64, "nested_blocksize": 32, "nested_offset": null}',
        b'{"shape": [32, 9999999], "blocksize": 64}',
    ],
)
def test_bad_quant_state_names_the_layer(state: bytes) -> None:
    tensors, _ = bitsandbytes_tensors(random_codes(4, N, K), torch.ones(16), "nf4", nested=False)
    raw = torch.from_numpy(np.frombuffer(state, np.uint8).copy())
    tensors["layer.weight.quant_state.bitsandbytes__nf4"] = raw
    config = config_of(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    with pytest.raises(ModelError, match="layer 'layer' of 'some/model' cannot be dequantized"):
        decode(tensors, config)


# --- what it is, and refusals ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            config_of(quant_method="gptq", bits=4, group_size=128, sym=True),
            "a GPTQ checkpoint (format gptq): 4-bit weights, groups of 128, symmetric; not "
            "quantized: lm_head",
        ),
        (
            config_of(quant_method="gptq", bits=3, group_size=-1, sym=False, lm_head=True),
            "a GPTQ checkpoint (format gptq): 3-bit weights, per channel, with zero points",
        ),
        (
            config_of(quant_method="awq", w_bit=4, group_size=64, zero_point=True, version="GEMM"),
            "an AWQ checkpoint (format gemm): 4-bit weights, groups of 64, with zero points",
        ),
        (
            compressed(num_bits=4, symmetric=True, group_size=32),
            "a compressed-tensors checkpoint (format pack-quantized): 4-bit weights, groups of "
            "32, symmetric; not quantized: lm_head",
        ),
        (
            config_of(
                config_groups={
                    "a": {
                        "weights": {"num_bits": 8, "strategy": "channel", "symmetric": True},
                        "input_activations": {"num_bits": 8, "type": "int"},
                    }
                },
                format="int-quantized",
            ),
            "a compressed-tensors checkpoint (format int-quantized): 8-bit weights, per channel, "
            "symmetric, int8 activations",
        ),
        (
            config_of(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=list("abcd")
            ),
            "a bitsandbytes checkpoint (format nf4): 4-bit weights; not quantized: a, b, c and 1 "
            "more",
        ),
        (
            config_of(load_in_8bit=True),
            "a bitsandbytes checkpoint (format int8): 8-bit weights, per channel, symmetric",
        ),
        (
            config_of(
                quant_method="fp8", weight_block_size=[128, 128], activation_scheme="dynamic"
            ),
            "an FP8 checkpoint (format fp8): 8-bit weights, blocks of 128 x 128, fp8 activations",
        ),
        (
            {"text_config": config_of(quant_method="hqq", bits=4, group_size=64)},
            "a 'hqq' checkpoint (format hqq): 4-bit weights, groups of 64",
        ),
    ],
)
def test_description_is_a_sentence(config: dict[str, Any], expected: str) -> None:
    assert str(describe_quantization(config)) == expected


def test_groups_that_differ_leave_the_number_open() -> None:
    config = compressed(num_bits=4, group_size=32)
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"] = {"targets": ["re:.*down"], "weights": {"num_bits": 8, "group_size": 32}}
    described = describe_quantization(config)
    assert described is not None
    assert (described.bits, described.group_size) == (None, 32)


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"text_config": {}}])
def test_float_checkpoint_passes_as_it_is(config: dict[str, Any]) -> None:
    source = MemorySource({"x": torch.ones(1)})
    assert describe_quantization(config) is None
    assert dequantized_source(source, config, allow=False) is source


def test_quantized_checkpoint_is_refused_unless_asked_for() -> None:
    tensors, config = small_gptq()
    with pytest.raises(ModelError, match=r"a GPTQ checkpoint(.|\n)*float model.*--dequantize"):
        dequantized_source(MemorySource(tensors), config, allow=False)


@pytest.mark.parametrize(
    "config",
    [
        config_of(quant_method="aqlm"),
        config_of(quant_method="gptq", bits=4, checkpoint_format="marlin"),
        config_of(quant_method="gptq", bits=4, is_marlin_format=True),
        config_of(quant_method="awq", bits=4, version="gemv"),
        compressed("nvfp4-pack-quantized", num_bits=4),
    ],
)
def test_unknown_layout_is_refused_in_any_case(config: dict[str, Any]) -> None:
    source = MemorySource({"x": torch.ones(1)})
    for allow in (True, False):
        with pytest.raises(ModelError, match=r"cannot be dequantized here(.|\n)*float model"):
            dequantized_source(source, config, allow=allow)
    described = describe_quantization(config)
    assert isinstance(described, QuantizedCheckpoint)
    with pytest.raises(ModelError, match="cannot be dequantized here"):
        DequantizedSource(source, described)


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": 3},
        config_of(quant_method="gptq", bits="4"),
        config_of(quant_method="gptq", bits=True),
        config_of(quant_method="gptq", sym="yes"),
        config_of(quant_method="awq", version=3),
        config_of(quant_method="awq", modules_to_not_convert=[3]),
        config_of(quant_method="fp8", weight_block_size=[128]),
        config_of(quant_method="fp8", weight_block_size=[128, 0]),
        config_of(quant_method="compressed-tensors", config_groups=[1]),
        config_of(quant_method="compressed-tensors", config_groups={"a": {"weights": 3}}),
    ],
)
def test_malformed_config_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="in the model's quantization_config should be"):
        describe_quantization(config)
