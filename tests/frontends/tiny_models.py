"""Tiny random models of many architectures, and what transformers says of them.

Each has two layers; where an architecture has two kinds of layer (windows, experts, dense), one of
each.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor

from qcompile.frontends.huggingface import capture_model
from qcompile.ir.program import Program
from qcompile.passes.canonicalize import canonicalize
from qcompile.passes.raise_ops import raise_program

VOCABULARY = 96
TOLERANCE = 1e-5
"""Of max |difference| over max |logit| in float32, as the project promises; most are below 1e-6."""

_WINDOWS = ["sliding_attention", "full_attention"]
_MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
_DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_MAMBA = {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "conv_kernel": 4}
_MAMBA_LAYERS = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
_MAMBA2_LAYERS = {
    **_MAMBA_LAYERS,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 4,
}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_FALCON = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}


def _llama_like(**changes: Any) -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
        **changes,
    }


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


CORE: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _llama_like()),
    "llama-tied": ("llama", _llama_like(tie_word_embeddings=True)),
    "mistral": ("mistral", _llama_like(sliding_window=4)),
    "qwen2": ("qwen2", _llama_like()),
    "qwen3": ("qwen3", _llama_like(head_dim=8)),
    "phi3": ("phi3", _llama_like(partial_rotary_factor=0.5)),
    "gemma2": (
        "gemma2",
        _llama_like(head_dim=8, sliding_window=4, layer_types=_WINDOWS, query_pre_attn_scalar=8),
    ),
    "gemma3": (
        "gemma3_text",
        _llama_like(head_dim=8, sliding_window=4, layer_types=_WINDOWS, query_pre_attn_scalar=8),
    ),
    "gpt2": ("gpt2", _GPT),
    "opt": (
        "opt",
        {
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
        },
    ),
    "gpt-neox": ("gpt_neox", _llama_like(rotary_pct=0.5)),
    "olmo2": ("olmo2", _llama_like()),
    "falcon": (
        "falcon",
        {**_FALCON, "multi_query": True, "parallel_attn": True, "alibi": False, "bias": False},
    ),
    "falcon-alibi": (
        "falcon",
        {**_FALCON, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
    ),
    "mixtral": ("mixtral", _llama_like(**_MIXTRAL)),
    "qwen3-moe": ("qwen3_moe", _llama_like(**_QWEN_MOE, head_dim=8, mlp_only_layers=[])),
    "bert": ("bert", _llama_like(type_vocab_size=2)),
}
"""What the project promises by name."""

MORE: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama-llama3-rope": (
        "llama",
        _llama_like(
            **_rope(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            )
        ),
    ),
    "llama-yarn": (
        "llama",
        _llama_like(**_rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    ),
    "qwen2-windows": (
        "qwen2",
        _llama_like(use_sliding_window=True, sliding_window=4, max_window_layers=1),
    ),
    "qwen2-moe": ("qwen2_moe", _llama_like(**_QWEN_MOE, shared_expert_intermediate_size=24)),
    "gemma": ("gemma", _llama_like(head_dim=8)),
    "falcon-grouped": (
        "falcon",
        {**_FALCON, "num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False},
    ),
    "opt-projected": (
        "opt",
        {
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 16,
            "do_layer_norm_before": False,
        },
    ),
    "cohere": ("cohere", _llama_like()),
    "cohere2": ("cohere2", _llama_like(sliding_window=4, layer_types=_WINDOWS)),
    "glm": ("glm", _llama_like(head_dim=8)),
    "glm4-moe": (
        "glm4_moe",
        _llama_like(
            head_dim=8,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            moe_intermediate_size=24,
            first_k_dense_replace=1,
        ),
    ),
    "granite": (
        "granite",
        _llama_like(
            embedding_multiplier=3.0,
            residual_multiplier=0.5,
            logits_scaling=2.0,
            attention_multiplier=0.2,
        ),
    ),
    "granite-moe": ("granitemoe", _llama_like(**_MIXTRAL)),
    "stablelm": ("stablelm", _llama_like(partial_rotary_factor=0.5)),
    "phi": ("phi", _llama_like(partial_rotary_factor=0.5)),
    "phi-moe": ("phimoe", _llama_like(**_MIXTRAL)),
    "starcoder2": ("starcoder2", _llama_like(sliding_window=4)),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    "gptj": ("gptj", {**_GPT, "rotary_dim": 4}),
    "codegen": ("codegen", {**_GPT, "rotary_dim": 4}),
    "gpt-neo": (
        "gpt_neo",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
            "max_position_embeddings": 64,
            "intermediate_size": 48,
        },
    ),
    "gpt-bigcode": ("gpt_bigcode", {**_GPT, "multi_query": True}),
    "ctrl": ("ctrl", {**_GPT, "dff": 48}),
    "smollm3": ("smollm3", _llama_like(no_rope_layers=[1, 0])),
    "deepseek-v2": ("deepseek_v2", _llama_like(**_LATENT, topk_method="greedy")),
    "deepseek-v3": ("deepseek_v3", _llama_like(**_LATENT)),
    "gpt-oss": (
        "gpt_oss",
        _llama_like(head_dim=8, sliding_window=4, layer_types=_WINDOWS, **_MIXTRAL),
    ),
    "olmoe": ("olmoe", _llama_like(num_experts=4, num_experts_per_tok=2)),
    "olmo3": ("olmo3", _llama_like(sliding_window=4, layer_types=_WINDOWS)),
    "nemotron": ("nemotron", _llama_like(partial_rotary_factor=0.5)),
    "persimmon": ("persimmon", _llama_like(partial_rotary_factor=0.5)),
    "apertus": ("apertus", _llama_like()),
    "diffllama": ("diffllama", _llama_like()),
    "nanochat": ("nanochat", _llama_like()),
    "xglm": (
        "xglm",
        {
            "d_model": 32,
            "ffn_dim": 48,
            "num_layers": 2,
            "attention_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
    "distilbert": (
        "distilbert",
        {
            "dim": 32,
            "hidden_dim": 48,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
    "roberta": ("roberta", _llama_like(type_vocab_size=1, pad_token_id=1)),
    "modernbert": (
        "modernbert",
        _llama_like(
            local_attention=8, global_attn_every_n_layers=2, cls_token_id=0, sep_token_id=1
        ),
    ),
    "glm4": ("glm4", _llama_like(head_dim=8)),
    "ernie4.5": ("ernie4_5", _llama_like(head_dim=8)),
    "ernie4.5-moe": (
        "ernie4_5_moe",
        _llama_like(
            moe_num_experts=4,
            moe_k=2,
            moe_intermediate_size=24,
            moe_layer_start_index=1,
            moe_layer_end_index=1,
        ),
    ),
    "exaone4": ("exaone4", _llama_like(head_dim=8, sliding_window=4, layer_types=_WINDOWS)),
    "hunyuan": ("hunyuan_v1_dense", _llama_like(head_dim=8)),
    "arcee": ("arcee", _llama_like()),
    "seed-oss": ("seed_oss", _llama_like(head_dim=8)),
    "helium": ("helium", _llama_like(head_dim=8)),
    "olmo": ("olmo", _llama_like()),
    "flex-olmo": ("flex_olmo", _llama_like(num_experts=4, num_experts_per_tok=2)),
    "granite-moe-shared": (
        "granitemoeshared",
        _llama_like(**_MIXTRAL, shared_intermediate_size=24),
    ),
    "dots1": (
        "dots1",
        _llama_like(
            head_dim=8,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            moe_intermediate_size=24,
            first_k_dense_replace=1,
            n_shared_experts=1,
        ),
    ),
    "minimax-m2": ("minimax_m2", _llama_like(**_MIXTRAL, head_dim=8)),
    "jetmoe": ("jetmoe", _llama_like(**_MIXTRAL, kv_channels=8)),
    "doge": ("doge", _llama_like()),
    "bitnet": ("bitnet", _llama_like()),
    "biogpt": ("biogpt", _llama_like()),
    "electra": ("electra", _llama_like(embedding_size=16)),
    "albert": ("albert", _llama_like(embedding_size=16, num_hidden_groups=1, inner_group_num=1)),
    "mpnet": ("mpnet", _llama_like()),
    "xlm-roberta": ("xlm-roberta", _llama_like(pad_token_id=1)),
    "nomic-bert": ("nomic_bert", _llama_like()),
    "esm": ("esm", _llama_like(position_embedding_type="rotary", mask_token_id=4)),
}
"""What was tried beyond that."""

GROWING_ROPE: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama-dynamic-rope": (
        "llama",
        _llama_like(
            **_rope("dynamic", factor=4.0),
        )
        | {"max_position_embeddings": 8},
    ),
    "phi3-longrope": (
        "phi3",
        _llama_like(
            original_max_position_embeddings=8,
            **_rope(
                "longrope",
                short_factor=[1.0, 1.1, 1.2, 1.3],
                long_factor=[2.0, 2.1, 2.2, 2.3],
                original_max_position_embeddings=8,
                factor=2.0,
            ),
        ),
    ),
}
"""Rotary frequencies that change once a sequence is longer than 8 positions."""

STATES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "lfm2": ("lfm2", _llama_like(layer_types=["conv", "full_attention"])),
    "lfm2-moe": (
        "lfm2_moe",
        _llama_like(
            layer_types=["conv", "full_attention"],
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            num_dense_layers=1,
        ),
    ),
    "qwen3-next": (
        "qwen3_next",
        _llama_like(**_DELTA, **_QWEN_MOE, head_dim=8, shared_expert_intermediate_size=24),
    ),
    "lfm3": (
        "lfm3",
        _llama_like(
            head_dim=8,
            num_hidden_layers=3,
            sliding_window=4,
            layer_types=["conv", "sliding_attention", "full_attention"],
        ),
    ),
    "qwen3.5-moe": (
        "qwen3_5_moe_text",
        _llama_like(**_DELTA, **_QWEN_MOE, head_dim=8, shared_expert_intermediate_size=24),
    ),
    "qwen3.5": ("qwen3_5_text", _llama_like(**_DELTA, head_dim=8)),
    "olmo-hybrid": ("olmo_hybrid", _llama_like(**_DELTA)),
    "kimi-linear": (
        "kimi_linear",
        _llama_like(
            **_LATENT,
            layer_types=["linear_attention", "full_attention"],
            linear_head_dim=8,
            linear_num_heads=4,
        ),
    ),
    "zaya": (
        "zaya",
        _llama_like(
            layer_types=["hybrid"] * 2,
            head_dim=8,
            moe_intermediate_size=24,
            num_experts=4,
            num_experts_per_tok=1,
            router_hidden_size=16,
        ),
    ),
    "mamba": ("mamba", _MAMBA),
    "falcon-mamba": ("falcon_mamba", _MAMBA),
    "jamba": (
        "jamba",
        _llama_like(
            **_MAMBA_LAYERS,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=4,
            num_experts_per_tok=2,
        ),
    ),
    "mamba2": ("mamba2", {**_MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4}),
    "bamba": ("bamba", _llama_like(**_MAMBA2_LAYERS, attn_layer_indices=[1])),
    "granite-moe-hybrid": (
        "granitemoehybrid",
        _llama_like(
            **_MAMBA2_LAYERS,
            **_MIXTRAL,
            layer_types=["mamba", "attention"],
            shared_intermediate_size=24,
        ),
    ),
    "falcon-h1": ("falcon_h1", _llama_like(**_MAMBA2_LAYERS, mamba_d_ssm=64, head_dim=8)),
    "zamba": (
        "zamba",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"],
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
    "zamba2": (
        "zamba2",
        _llama_like(
            **{k: v for k, v in _MAMBA2_LAYERS.items() if k != "mamba_n_heads"},
            n_mamba_heads=8,
            mamba_headdim=8,
            mamba_ngroups=2,
            layers_block_type=["mamba", "hybrid"],
            num_mem_blocks=1,
            num_key_value_heads=4,
        ),
    ),
    "nemotron-h": (
        "nemotron_h",
        _llama_like(
            head_dim=8,
            hybrid_override_pattern="M*-",
            num_hidden_layers=3,
            ssm_state_size=8,
            mamba_num_heads=8,
            mamba_head_dim=8,
            n_groups=2,
            chunk_size=4,
        ),
    ),
}
"""Decoders whose caches hold states of fixed size beside or instead of keys and values."""

WITHOUT_CACHE: Mapping[str, tuple[str, dict[str, Any]]] = {
    "minimax": (
        "minimax",
        _llama_like(**_MIXTRAL, head_dim=8, layer_types=["linear_attention", "full_attention"]),
    ),
}
"""Decoders that cannot be followed with what they keep."""

ALL = {**CORE, **MORE, **GROWING_ROPE, **STATES, **WITHOUT_CACHE}


def tiny_model(name: str) -> Any:
    """A model with random weights, large enough that every part of it shows in the logits."""
    architecture, options = ALL[name]
    config = transformers.AutoConfig.for_model(architecture, vocab_size=VOCABULARY, **options)
    masked = type(config) in transformers.AutoModelForMaskedLM._model_mapping
    auto = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            elif parameter_name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:
                parameter.add_(0.1 * noise)
    return model


@functools.cache
def raised_tiny_model(name: str) -> tuple[Any, Program]:
    """A tiny model, and its program in terms of the dialect with its shapes checked."""
    model = tiny_model(name)
    program = raise_program(canonicalize(capture_model(model)))
    program.verify(shapes=True)
    return model, program


def tokens(batch: int, length: int, padding: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Ids and a mask with the given number of padded positions on the left of each row."""
    ids = torch.randint(2, VOCABULARY, (batch, length), generator=torch.manual_seed(length))
    mask = torch.ones_like(ids)
    for row, padded in enumerate(padding):
        mask[row, :padded] = 0
    return ids, mask


@torch.no_grad()
def expected_logits(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """What transformers computes for a whole batch at once."""
    accepted = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {}
    if "position_ids" in accepted and model.can_generate():
        options["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    if "use_cache" in accepted:
        options["use_cache"] = False
    logits: Tensor = model(input_ids=ids, attention_mask=mask, **options).logits
    return logits


def expected_decoded_logits(model: Any, ids: Tensor, mask: Tensor, cuts: tuple[int, ...]) -> Tensor:
    """What transformers computes piece by piece, with its own cache.

    This is not what it computes at once where rotary frequencies depend on the length so far:
    keys in the cache keep the rotation of their time.
    """
    from transformers import DynamicCache

    accepted = inspect.signature(model.forward).parameters
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, pieces = DynamicCache(), []
    for start, end in itertools.pairwise((0, *cuts, ids.shape[1])):
        options = {"position_ids": positions[:, start:end]} if "position_ids" in accepted else {}
        output = model(
            input_ids=ids[:, start:end],
            attention_mask=mask[:, :end],
            past_key_values=cache,
            use_cache=True,
            **options,
        )
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1)


def decoded_logits(program: Program, ids: Tensor, mask: Tensor, cuts: tuple[int, ...]) -> Tensor:
    """What the program computes piece by piece, with the cache handed on."""
    bounds = (0, *cuts, ids.shape[1])
    past, pieces = None, []
    for start, end in itertools.pairwise(bounds):
        output = program(ids[:, start:end], mask[:, :end], past_key_values=past)
        past = output.past_key_values
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1)


@torch.no_grad()
def relative_error(found: Tensor, expected: Tensor, mask: Tensor) -> float:
    """Max |difference| over max |logit|, both on positions that are not padding."""
    difference = (found - expected)[mask.bool()].abs().max()
    return float(difference / expected[mask.bool()].abs().max())
