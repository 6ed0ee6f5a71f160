"""Architectures compiled for the CPU decode what transformers computes."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from tests.frontends.tiny_models import (
    CORE,
    MORE,
    TOLERANCE,
    expected_logits,
    raised_tiny_model,
    relative_error,
    tokens,
)

from qcompile.artifact import load
from qcompile.backends.cpu.decoding import CachedDecoder
from qcompile.backends.cpu.runtime import CpuSession
from qcompile.backends.decoding import Decoder, GrowingDecoder, TokenBatch
from qcompile.compiler import compile
from qcompile.manifest import read_manifest

CUTS = (0, 5, 6, 7)
"""A prompt of five tokens, then two tokens one by one."""

LATENT = ("deepseek-v2", "deepseek-v3", "diffllama", "doge", "jetmoe")
"""Their caches are read by more than one attention: latents, or keys that several heads share."""


def compiled(name: str, directory: Path) -> CpuSession:
    model, _ = raised_tiny_model(name)
    compile(model, "float", output=directory / name, check="off")
    return CpuSession(directory / name, read_manifest(directory / name), threads=1)


def decode(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    pieces = [
        torch.tensor(decoder.append(TokenBatch(ids[:, start:end].numpy()), count=end - start))
        for start, end in itertools.pairwise(CUTS)
    ]
    return torch.cat(pieces, dim=1)


def check(name: str, directory: Path, kind: type[Decoder]) -> None:
    session = compiled(name, directory)
    ids, mask = tokens(2, CUTS[-1], ())
    decoder = session.decoder(2, CUTS[-1])
    expected = expected_logits(raised_tiny_model(name)[0], ids, mask)

    assert isinstance(decoder, kind)
    assert relative_error(decode(decoder, ids), expected, mask) <= TOLERANCE


@pytest.mark.parametrize(
    "name", [LATENT[0], *(pytest.param(name, marks=pytest.mark.exhaustive) for name in LATENT[1:])]
)
def test_caches_with_other_readers_grow_as_tensors(name: str, tmp_path: Path) -> None:
    check(name, tmp_path, GrowingDecoder)

    (completion,) = load(tmp_path / name).complete([2, 3, 4], max_new_tokens=4)
    assert len(completion.token_ids) == 4


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", sorted({*CORE, *MORE} - {*LATENT}))
def test_decoding_in_place_equals_transformers(name: str, tmp_path: Path) -> None:
    if not raised_tiny_model(name)[1].signature.is_causal_lm:
        pytest.skip("encodes only")
    check(name, tmp_path, CachedDecoder)
