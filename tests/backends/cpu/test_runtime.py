"""The CPU session against the same model in NumPy: caches, masks, chunks, bad input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tests.tiny_lm import POSITIONS, VOCABULARY, TinyModel, save_manifest, write_artifact

from qcompile.backends import decoding
from qcompile.backends.cpu.decoding import CachedDecoder
from qcompile.backends.cpu.runtime import CpuSession
from qcompile.backends.decoding import RecomputingDecoder, TokenBatch
from qcompile.errors import ArtifactError, RecipeError
from qcompile.manifest import (
    GenerationInfo,
    Manifest,
    Signature,
    ValueInfo,
    read_manifest,
)

# Logits of about 5 from a few sums of eight float32 products, added in another order.
TOLERANCE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return TinyModel.random()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, model: TinyModel) -> Path:
    return write_artifact(tmp_path_factory.mktemp("lm") / "cached", model)


@pytest.fixture(scope="module")
def session(directory: Path) -> CpuSession:
    return CpuSession(directory, read_manifest(directory), threads=1)


@pytest.fixture(scope="module")
def uncached(tmp_path_factory: pytest.TempPathFactory, model: TinyModel) -> CpuSession:
    directory = write_artifact(tmp_path_factory.mktemp("lm") / "uncached", model, cache=False)
    return CpuSession(directory, read_manifest(directory), threads=1)


def some_ids(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, VOCABULARY, shape)


def test_forward_equals_the_reference_at_all_positions(
    session: CpuSession, uncached: CpuSession, model: TinyModel
) -> None:
    ids = some_ids(3, 7)
    expected = np.stack([model.logits(list(row)) for row in ids])
    np.testing.assert_allclose(session.forward(ids), expected, **TOLERANCE)
    np.testing.assert_allclose(uncached.forward(ids), expected, **TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_ignores_padding_on_either_side(
    session: CpuSession, uncached: CpuSession, model: TinyModel, side: str
) -> None:
    ids = some_ids(2, 9)
    real = slice(4, 9) if side == "left" else slice(0, 5)
    mask = np.ones_like(ids)
    mask[1] = 0
    mask[1, real] = 1
    expected = model.logits(list(ids[1, real]))
    for each in (session, uncached):
        np.testing.assert_allclose(each.forward(ids, mask)[1, real], expected, **TOLERANCE)


def test_forward_uses_given_positions(session: CpuSession, model: TinyModel) -> None:
    ids = some_ids(1, 5)
    shifted = TinyModel(**{**vars(model), "positions": model.positions[3:]})
    got = session.forward(ids, position_ids=np.arange(3, 8)[None])
    np.testing.assert_allclose(got[0], shifted.logits(list(ids[0])), **TOLERANCE)


def test_forward_in_chunks_equals_forward_at_once(
    session: CpuSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, mask = some_ids(2, 11), np.ones((2, 11), np.int64)
    mask[0, :6] = 0
    at_once = session.forward(ids, mask)
    monkeypatch.setattr(decoding, "PREFILL_CHUNK", 4)
    np.testing.assert_allclose(
        session.forward(ids, mask)[mask == 1], at_once[mask == 1], **TOLERANCE
    )


def test_decoding_token_by_token_equals_the_reference(
    session: CpuSession, uncached: CpuSession, model: TinyModel
) -> None:
    ids = some_ids(2, 12)
    expected = np.stack([model.logits(list(row)) for row in ids])
    for each, kind in ((session, CachedDecoder), (uncached, RecomputingDecoder)):
        decoder = each.decoder(batch=2, capacity=12)
        assert isinstance(decoder, kind)
        np.testing.assert_allclose(decoder.advance(ids[:, :5]), expected[:, 4], **TOLERANCE)
        for step in range(5, 12):
            got = decoder.advance(ids[:, step : step + 1])
            np.testing.assert_allclose(got, expected[:, step], **TOLERANCE)


def test_decoding_with_masked_tokens_equals_the_rows_alone(
    session: CpuSession, model: TinyModel
) -> None:
    """Left padding, then one row that stops while the other goes on and comes back."""
    ids = some_ids(2, 8)
    mask = np.ones_like(ids)
    mask[0, :3] = 0
    mask[1, 5:7] = 0
    decoder = session.decoder(batch=2, capacity=8)
    decoder.advance(ids[:, :5], mask[:, :5])
    for step in range(5, 8):
        logits = decoder.advance(ids[:, step : step + 1], mask[:, step : step + 1])
    for row in range(2):
        alone = model.logits(list(ids[row][mask[row] == 1]))
        np.testing.assert_allclose(logits[row], alone[-1], **TOLERANCE)


def test_long_prompt_is_prefilled_in_chunks(
    session: CpuSession, model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "PREFILL_CHUNK", 16)
    ids = some_ids(1, 50)
    runs = []
    append = CachedDecoder.append
    monkeypatch.setattr(
        CachedDecoder,
        "append",
        lambda self, tokens, *, count: (
            runs.append(tokens.ids.shape[1]) or append(self, tokens, count=count)
        ),
    )
    logits = session.decoder(1, 50).advance(ids)
    assert runs == [16, 16, 16, 2]
    np.testing.assert_allclose(logits[0], model.logits(list(ids[0]))[-1], **TOLERANCE)


def test_cache_grows_without_losing_what_it_holds(session: CpuSession, model: TinyModel) -> None:
    ids = some_ids(2, 150)
    decoder = session.decoder(batch=2, capacity=10)
    assert isinstance(decoder, CachedDecoder)
    capacities = set()
    for step in range(150):
        logits = decoder.advance(ids[:, step : step + 1])
        capacities.add(decoder.capacity)
    assert (decoder.length, capacities) == (150, {64, 128, 256})
    expected = np.stack([model.logits(list(row))[-1] for row in ids])
    np.testing.assert_allclose(logits, expected, **TOLERANCE)


def test_cache_is_appended_in_place(session: CpuSession) -> None:
    decoder = session.decoder(batch=1, capacity=32)
    assert isinstance(decoder, CachedDecoder)
    cache = decoder._buffers["past_key_values.0.key"]
    decoder.advance(some_ids(1, 3))
    written = cache.any(axis=(1, 3))[0]
    assert written.tolist() == [True] * 3 + [False] * (decoder.capacity - 3)
    decoder.advance(some_ids(1, 1))
    assert decoder._buffers["past_key_values.0.key"] is cache
    assert cache.any(axis=(1, 3))[0].sum() == 4


def test_one_session_serves_several_decoders(session: CpuSession, model: TinyModel) -> None:
    first, second = some_ids(1, 4, seed=2), some_ids(1, 6, seed=3)
    decoders = [session.decoder(1, 8) for _ in range(2)]
    decoders[0].advance(first[:, :3])
    decoders[1].advance(second[:, :5])
    for decoder, ids in zip(decoders, (first, second), strict=True):
        expected = model.logits(list(ids[0]))[-1]
        np.testing.assert_allclose(decoder.advance(ids[:, -1:])[0], expected, **TOLERANCE)


def test_token_batch_chunks_join_to_the_whole() -> None:
    whole = TokenBatch(some_ids(2, 7), mask=np.ones((2, 7), np.int64))
    parts = [part for _, part in whole.chunks(3)]
    assert [part.ids.shape[1] for part in parts] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate([part.ids for part in parts], 1), whole.ids)
    assert all(part.mask is not None and part.positions is None for part in parts)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"input_ids": [[5, VOCABULARY]]}, f"token id {VOCABULARY}"),
        ({"input_ids": [[5, -1]]}, "token id -1"),
        ({"input_ids": [5, 6]}, r"int64 \[2\]"),
        ({"input_ids": [[0.5]]}, "float64"),
        ({"input_ids": np.empty((1, 0), np.int64)}, r"\[1, 0\]"),
        ({"input_ids": [[5]], "attention_mask": [[1, 1]]}, r"attention_mask is int64 \[1, 2\]"),
        ({"input_ids": [[5]], "token_type_ids": [[1]]}, "takes no token_type_ids"),
        ({"input_ids": [[5] * (POSITIONS + 1)]}, "257 tokens"),
    ],
)
def test_forward_names_the_bad_argument(session: CpuSession, arguments: dict, named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        session.forward(**arguments)


def test_padding_is_refused_by_a_model_without_mask(tmp_path: Path, model: TinyModel) -> None:
    directory = write_artifact(tmp_path / "lm", model, cache=False, mask=False)
    session = CpuSession(directory, read_manifest(directory), threads=1)
    assert not session.takes_padding
    assert session.forward([[5, 6]], [[1, 1]]).shape == (1, 2, VOCABULARY)
    with pytest.raises(RecipeError, match="takes no attention_mask"):
        session.forward([[5, 6]], [[0, 1]])


@pytest.mark.parametrize("threads", [0, -2])
def test_threads_below_one_are_refused(directory: Path, threads: int) -> None:
    with pytest.raises(RecipeError, match=f"threads is {threads}"):
        CpuSession(directory, read_manifest(directory), threads=threads)


# --- any module -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adder(tmp_path_factory: pytest.TempPathFactory) -> CpuSession:
    """``sum = a + b`` over float32 [n, 2]."""
    directory = tmp_path_factory.mktemp("module")
    values = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2])
        for name in ("a", "b", "sum")
    }
    node = helper.make_node("Add", ["a", "b"], ["sum"])
    graph = helper.make_graph([node], "adder", [values["a"], values["b"]], [values["sum"]])
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), directory / "model.onnx")
    a, b, total = (
        ValueInfo(name=name, dtype="float32", shape=("n", 2)) for name in ("a", "b", "sum")
    )
    signature = Signature(inputs=(a, b), outputs=(total,))
    save_manifest(directory, signature, GenerationInfo(), task="module")
    return CpuSession(directory, read_manifest(directory), threads=1)


def test_run_maps_inputs_to_outputs_by_name(adder: CpuSession) -> None:
    outputs = adder.run({"b": [[1, 2]], "a": np.array([[0.5, 0.25]])})
    assert {name: value.tolist() for name, value in outputs.items()} == {"sum": [[1.5, 2.25]]}


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ({"a": [[1.0, 2.0]]}, "input 'b' is missing"),
        ({"a": [[1.0, 2.0]], "b": [[1.0, 2.0]], "c": 0}, "input 'c' is not one"),
        ({"a": [[1.0, 2.0]], "b": [1.0, 2.0]}, r"input 'b' is float64 \[2\]"),
        ({"a": [[1.0, 2.0]], "b": [[1.0, 2.0, 3.0]]}, r"input 'b' is float64 \[1, 3\]"),
        ({"a": [[1.0, 2.0]], "b": [["x", "y"]]}, "input 'b' is <U1"),
        ({"a": [[1.0, 2.0]] * 2, "b": [[1.0, 2.0]] * 3}, r"a \[2, 2\], b \[3, 2\]"),
    ],
)
def test_run_names_the_bad_input(adder: CpuSession, inputs: dict, named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        adder.run(inputs)


def test_module_refuses_to_generate(adder: CpuSession) -> None:
    with pytest.raises(RecipeError, match="cannot generate"):
        adder.decoder(1, 1)
    with pytest.raises(RecipeError, match="no logits"):
        adder.forward([[1]])


# --- manifests that do not fit the model ---------------------------------------------------------


def changed(directory: Path, change: str) -> Manifest:
    """The manifest with one thing wrong."""
    manifest = read_manifest(directory)
    inputs, outputs = list(manifest.signature.inputs), list(manifest.signature.outputs)
    roles = [value.role for value in inputs]
    if change == "renamed":
        inputs[0] = inputs[0].model_copy(update={"name": "tokens"})
    elif change == "dtype":
        outputs[-1] = outputs[-1].model_copy(update={"dtype": "float16"})
        manifest = manifest.model_copy(update={"task": "module"})
    elif change == "size":
        index = roles.index("past_key")
        inputs[index] = inputs[index].model_copy(
            update={"shape": ("batch", 1, "capacity", 2**31 - 1)}
        )
    elif change == "undescribed":
        del inputs[roles.index("logit_positions")]
    elif change == "no mask":
        del inputs[roles.index("attention_mask")]
    elif change == "unpaired":
        del inputs[roles.index("past_value")]
    elif change == "no capacity":
        index = roles.index("past_key")
        inputs[index] = inputs[index].model_copy(update={"shape": ("batch", 1, 8, 8)})
    elif change == "unknown role":
        inputs[0] = inputs[0].model_copy(update={"role": "tensor"})
    elif change == "vocabulary":
        outputs[-1] = outputs[-1].model_copy(update={"shape": ("batch", "n", "vocabulary")})
    signature = Signature(inputs=tuple(inputs), outputs=tuple(outputs))
    return manifest.model_copy(update={"signature": signature})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("renamed", "describes 'tokens' .* no such value"),
        ("dtype", "describes 'logits' as float16"),
        ("size", "describes 'past_key_values.0.key' .* shape is"),
        ("undescribed", "does not describe 'logit_positions'"),
        ("no mask", "attention_mask must tell"),
        ("unpaired", "value cache of layer 0"),
        ("no capacity", "is not .batch, ..., capacity"),
        ("unknown role", "needs input_ids and logits"),
        ("vocabulary", "logits are not float32"),
    ],
)
def test_manifest_that_does_not_fit_the_model_is_refused(
    directory: Path, change: str, named: str
) -> None:
    with pytest.raises(ArtifactError, match=named):
        CpuSession(directory, changed(directory, change), threads=1)


@pytest.mark.parametrize("content", [b"", b"not a protobuf at all", None])
def test_model_file_that_is_no_model_is_refused(directory: Path, content: bytes | None) -> None:
    manifest = read_manifest(directory)
    broken = directory.parent / f"broken-{content!r:.6}"
    broken.mkdir()
    if content is not None:
        (broken / "model.onnx").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"cannot load .*model.onnx"):
        CpuSession(broken, manifest)


def test_loading_and_generating_imports_neither_torch_nor_transformers(directory: Path) -> None:
    program = (
        "import sys; from qcompile.artifact import load\n"
        "artifact = load(sys.argv[1], threads=1)\n"
        "artifact.generate('a', max_new_tokens=2)\n"
        "artifact.chat([{'role': 'user', 'content': 'b'}], max_new_tokens=2)\n"
        "print(sorted({'torch', 'transformers', 'onnx'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(directory)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
