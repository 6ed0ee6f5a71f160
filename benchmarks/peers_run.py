"""Quantizes a model with another project's package and leaves its decoded weights: see `peers.py`.

Runs in an environment that has that package (and transformers, gguf, safetensors) and not qcompile.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

Weights = dict[str, torch.Tensor]


def gptq(model: PreTrainedModel, tokens: torch.Tensor, bits: int, group: int) -> Weights:
    """GPTQ of llmcompressor, symmetric."""
    from llmcompressor.modifiers.gptq import GPTQModifier

    scheme = _scheme(bits, group, symmetric=True)
    modifier = GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"])
    return _oneshot(model, tokens, [modifier])


def awq(model: PreTrainedModel, tokens: torch.Tensor, bits: int, group: int) -> Weights:
    """AWQ of llmcompressor, asymmetric; its smoothing changes norms as well."""
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():
        # It pins memory for copies to an accelerator, which raises where there is none.
        IntermediatesCache.pin_memory = lambda *_: None
    scheme = _scheme(bits, group, symmetric=False)
    quantize = QuantizationModifier(config_groups={"all": scheme}, ignore=["lm_head"])
    return _oneshot(model, tokens, [AWQModifier(duo_scaling="both"), quantize])


def hqq(model: PreTrainedModel, tokens: torch.Tensor, bits: int, group: int) -> Weights:
    """HQQ of hqq: data-free, asymmetric, zero points in float16 (whole numbers at 4 bit)."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    del tokens
    config = BaseQuantizeConfig(nbits=bits, group_size=group or None, axis=1)
    decoded = {}
    for name, linear in _linears(model):
        quantized = HQQLinear(
            linear, config, compute_dtype=torch.float32, device="cpu", del_orig=False
        )
        decoded[f"{name}.weight"] = quantized.dequantize()
    return decoded


def autoround(model: PreTrainedModel, tokens: torch.Tensor, bits: int, group: int) -> Weights:
    """SignRound of auto-round, symmetric, in as many steps and windows as the row `signround`."""
    from auto_round import AutoRound
    from auto_round.schemes import QuantizationScheme

    scheme = QuantizationScheme(
        bits=bits, group_size=group or -1, sym=True, data_type="int", act_bits=16
    )
    rounder = AutoRound(
        model,
        scheme=scheme,
        tokenizer=_tokenizer(model),
        dataset=list(tokens.split(1)),
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        iters=100,
        batch_size=2,
        device_map="cpu",
    )
    quantized, _ = rounder.quantize()
    return {f"{name}.weight": linear.weight for name, linear in _linears(quantized)}


PEERS: dict[str, Callable[[PreTrainedModel, torch.Tensor, int, int], Weights]] = {
    "gptq": gptq,
    "hqq": hqq,
    "autoround": autoround,
    "awq": awq,
}


def _scheme(bits: int, group: int, *, symmetric: bool) -> dict[str, Any]:
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    return {
        "targets": ["Linear"],
        "weights": {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy},
    }


def _oneshot(model: PreTrainedModel, tokens: torch.Tensor, recipe: list[Any]) -> Weights:
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from datasets import Dataset
    from llmcompressor import oneshot

    rows = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    oneshot(
        model=model,
        processor=_tokenizer(model),
        dataset=Dataset.from_dict(rows),
        recipe=recipe,
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
        shuffle_calibration_samples=False,
        tie_word_embeddings=False,
    )
    changed = {name: p.detach() for name, p in model.named_parameters() if "norm" in name}
    for name, linear in _linears(model):
        decoded = fake_quantize(
            linear.weight,
            linear.weight_scale,
            getattr(linear, "weight_zero_point", None),
            linear.quantization_scheme.weights,
            getattr(linear, "weight_g_idx", None),
        )
        changed[f"{name}.weight"] = decoded
    return changed


def _linears(model: PreTrainedModel) -> list[tuple[str, torch.nn.Linear]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]


def _load(gguf: Path, folder: Path) -> PreTrainedModel:
    """The model out of a directory of its own: peers look for its configuration beside it."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    model.hf_quantizer = None  # its weights are floats by now
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _tokenizer(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model.name_or_path)


def main() -> None:
    """Runs one peer and writes `OUT/weights.safetensors` and `OUT/facts.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--model", type=Path, required=True, help="a .gguf file")
    parser.add_argument("--tokens", type=Path, required=True, help=".npy, int64 [windows, length]")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group", type=int, required=True, help="0: one scale per row")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    model = _load(options.model, options.out / "model")
    model.config.use_cache = False
    tokens = torch.from_numpy(np.load(options.tokens))
    started, cpu = time.perf_counter(), time.process_time()
    decoded = PEERS[options.peer](model, tokens, options.bits, options.group)
    facts = {
        "minutes": (time.perf_counter() - started) / 60,
        "cpu_minutes": (time.process_time() - cpu) / 60,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    tensors = {k: v.detach().to(torch.float32).contiguous().clone() for k, v in decoded.items()}
    save_file(tensors, options.out / "weights.safetensors")
    (options.out / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main()
