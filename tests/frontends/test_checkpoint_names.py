"""A model's parameters are found in its checkpoint, under whatever name and layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.frontends.tiny_models import tiny_model

from qcompile.errors import ModelError
from qcompile.frontends.checkpoint import open_checkpoint
from qcompile.frontends.checkpoint_names import define_weights
from qcompile.frontends.huggingface import build_shell
from qcompile.ir.weights import MemorySource, WeightStore, describe, sources


def shell_of(model: Any) -> Any:
    return build_shell(model.config, type(model)).model


def saved(name: str, folder: Path) -> tuple[Any, Path]:
    model = tiny_model(name)
    model.save_pretrained(folder)
    return model, folder


def weights_of(model: Any, folder: Path) -> tuple[WeightStore, dict[str, str]]:
    return define_weights(shell_of(model), open_checkpoint(folder))


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt-neox", "gpt2", "gpt-oss", "bert"])
def test_every_tensor_has_the_value_that_transformers_gives_it(name: str, tmp_path: Path) -> None:
    model, folder = saved(name, tmp_path)
    store, canonical = weights_of(model, folder)

    state = model.state_dict()
    assert set(canonical) == set(state)
    for parameter, entry in canonical.items():
        torch.testing.assert_close(store.materialize(entry), state[parameter], rtol=0, atol=0)


def test_tied_parameters_share_one_entry(tmp_path: Path) -> None:
    model, folder = saved("llama-tied", tmp_path)
    store, canonical = weights_of(model, folder)

    assert canonical["lm_head.weight"] == canonical["model.embed_tokens.weight"]
    assert len(store) == len(set(canonical.values()))


def test_stacked_experts_are_views_of_the_checkpoint(tmp_path: Path) -> None:
    model, folder = saved("mixtral", tmp_path)
    stored = open_checkpoint(folder).specs()
    per_expert = [name for name in stored if ".experts.0." in name]
    assert per_expert  # the checkpoint has one tensor per expert and projection

    store, canonical = weights_of(model, folder)
    entry = canonical["model.layers.0.mlp.experts.gate_up_proj"]

    assert store.spec(entry).shape == (4, 2 * 48, 32)
    assert len(list(sources(store.expression(entry)))) == 8
    assert describe(store.expression(entry)).startswith("convert(")


def test_narrow_weights_appear_in_float32(tmp_path: Path) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    store, canonical = weights_of(model, tmp_path)

    entry = canonical["model.norm.weight"]
    assert store.spec(entry).dtype == torch.float32
    assert store.materialize(entry).dtype == torch.float32


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    model, folder = saved("llama", tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})

    with pytest.raises(ModelError, match=r"lacks 1 tensors .*model\.layers\.1\.mlp\.up_proj"):
        weights_of(model, folder)


def test_tensor_of_another_shape_is_named() -> None:
    model = tiny_model("llama")
    tensors = dict(model.state_dict())
    tensors["model.norm.weight"] = torch.ones(7)

    with pytest.raises(ModelError, match=r"'model\.norm\.weight' .* shape \[7\].*needs \[32\]"):
        define_weights(shell_of(model), MemorySource(tensors))
