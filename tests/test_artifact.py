"""Artifacts as users meet them: load, forward, generate, stream, chat, and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.tiny_lm import BOS, TinyModel, write_artifact

from qcompile.artifact import Artifact, load
from qcompile.errors import ArtifactError, RecipeError
from qcompile.generation import TextStream
from qcompile.kernels.cpu.layout import KERNEL_LAYOUT_VERSION
from qcompile.manifest import describe_files


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return TinyModel.random()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, model: TinyModel) -> Artifact:
    return load(write_artifact(tmp_path_factory.mktemp("artifact") / "lm", model), threads=1)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """An artifact that a test may damage."""
    return write_artifact(tmp_path / "copy")


def prompt_ids(text: str) -> list[int]:
    return [BOS, *(4 + byte for byte in text.encode())]


# --- running --------------------------------------------------------------------------------------


def test_forward_gives_logits_at_all_positions(artifact: Artifact, model: TinyModel) -> None:
    ids = prompt_ids("logits")
    # Logits of about 5, added up in float32 in another order.
    np.testing.assert_allclose(artifact.forward([ids])[0], model.logits(ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("cache", [True, False])
def test_greedy_tokens_equal_the_reference(tmp_path: Path, model: TinyModel, cache: bool) -> None:
    artifact = load(write_artifact(tmp_path / "lm", model, cache=cache), threads=1)
    for text in ("The capital of", "a", ""):
        [completion] = artifact.complete(text, max_new_tokens=40)
        assert list(completion.token_ids) == model.greedy(prompt_ids(text), 40)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 5, "top_k": 20}])
@pytest.mark.parametrize(("cache", "mask"), [(True, True), (False, True), (False, False)])
def test_batch_of_different_lengths_equals_one_by_one(
    tmp_path: Path, model: TinyModel, cache: bool, mask: bool, options: dict[str, Any]
) -> None:
    artifact = load(write_artifact(tmp_path / "lm", model, cache=cache, mask=mask), threads=1)
    prompts = ["a", "rather a long prompt", "middle"]
    together = artifact.complete(prompts, max_new_tokens=24, **options)
    assert together == [artifact.complete(p, max_new_tokens=24, **options)[0] for p in prompts]


def test_generate_returns_what_the_prompt_was(artifact: Artifact) -> None:
    text = artifact.generate("abc", max_new_tokens=8)
    ids = prompt_ids("abc")
    batch = [text, text]
    assert isinstance(text, str)
    assert len(text) > 0
    assert artifact.generate(["abc", "abc"], max_new_tokens=8) == batch
    assert artifact.generate(ids, max_new_tokens=8) == text
    assert artifact.generate(np.array(ids), max_new_tokens=8) == text
    assert artifact.generate([ids, ids], max_new_tokens=8) == batch
    assert artifact.generate(np.array([ids, ids]), max_new_tokens=8) == batch
    assert artifact.generate([], max_new_tokens=8) == []


def test_stream_yields_the_text_of_generate(artifact: Artifact) -> None:
    text = artifact.generate("abc", max_new_tokens=16)
    stream = artifact.generate("abc", stream=True, max_new_tokens=16)
    assert isinstance(stream, TextStream)
    assert "".join(stream) == text
    assert stream.completion.finish_reason == "length"
    assert "".join(artifact.stream("abc", max_new_tokens=16)) == text


def test_chat_goes_through_the_template(artifact: Artifact) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    # The template opens with a special token, so no start token comes before it.
    ids = artifact.tokenizer.encode("<turn>user: Hello\n<turn>model:", add_special_tokens=False)
    expected = artifact.generate(ids, max_new_tokens=12)
    assert artifact.chat(messages, max_new_tokens=12) == expected
    assert artifact.generate(messages, max_new_tokens=12) == expected
    assert artifact.generate([messages, messages], max_new_tokens=12) == [expected, expected]
    variables = {"add_generation_prompt": False}
    assert artifact.chat(messages, template_variables=variables, max_new_tokens=12) != expected


def test_generation_stops_at_the_context_of_the_model(tmp_path: Path) -> None:
    artifact = load(write_artifact(tmp_path / "lm", max_context=8), threads=1)
    [completion] = artifact.complete("abc", stop_token_ids=[])
    assert (len(completion.token_ids), completion.finish_reason) == (5, "context")
    with pytest.raises(RecipeError, match="at most 8"):
        artifact.generate("a long prompt")


def test_artifact_without_tokenizer_still_continues_tokens(
    tmp_path: Path, model: TinyModel
) -> None:
    directory = write_artifact(tmp_path / "lm", model, tokenizer=False, template=False)
    artifact = load(directory, threads=1)
    ids = [30, 40, 50]
    [completion] = artifact.complete(ids, max_new_tokens=5)
    assert list(completion.token_ids) == model.greedy(ids, 5)
    for call in (lambda: artifact.generate(ids), lambda: artifact.complete("text")):
        with pytest.raises(ArtifactError, match="has no tokenizer"):
            call()


def test_chat_without_template_asks_for_a_plain_prompt(tmp_path: Path) -> None:
    artifact = load(write_artifact(tmp_path / "lm", template=False), threads=1)
    with pytest.raises(ArtifactError, match="no chat template"):
        artifact.chat([{"role": "user", "content": "Hello"}])


@pytest.mark.parametrize(
    ("prompt", "options", "named"),
    [
        (["a", "b"], {"stream": True}, "only one prompt"),
        (5, {}, "a prompt is int"),
        ([1.5], {}, "a prompt is list"),
        (b"bytes", {}, "a prompt is bytes"),
        ("a", {"temperature": -1}, "temperature is -1"),
        ([-4], {}, "token id -4"),
    ],
)
def test_unusable_prompt_is_named(
    artifact: Artifact, prompt: Any, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(RecipeError, match=named):
        artifact.generate(prompt, **options)


def test_report_is_what_the_compiler_wrote(copy: Path) -> None:
    assert load(copy, threads=1).report == {}
    (copy / "report.json").write_text('{"seconds": {"quantize": 1.5}}')
    assert load(copy, threads=1).report == {"seconds": {"quantize": 1.5}}
    (copy / "report.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"report\.json cannot be read"):
        assert load(copy, threads=1).report


def test_repr_names_path_model_and_target(artifact: Artifact) -> None:
    assert repr(artifact) == f"Artifact({str(artifact.path)!r}, model='tiny', target='cpu')"


# --- refusals -------------------------------------------------------------------------------------


def set_manifest(directory: Path, **fields: object) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_path_may_be_a_string(copy: Path) -> None:
    assert load(str(copy), threads=1).path == copy


@pytest.mark.parametrize(
    ("layout", "remedy"),
    [(KERNEL_LAYOUT_VERSION + 1, "upgrade qcompile"), (0, "compile the model again")],
)
def test_other_kernel_layout_is_refused(copy: Path, layout: int, remedy: str) -> None:
    set_manifest(copy, kernel_layout_version=layout)
    with pytest.raises(ArtifactError, match=f"kernel layout {layout}") as caught:
        load(copy)
    assert caught.value.remedy == remedy


def test_current_kernel_layout_loads_the_kernels(copy: Path) -> None:
    set_manifest(copy, kernel_layout_version=KERNEL_LAYOUT_VERSION)
    assert load(copy, threads=1).generate("a", max_new_tokens=1)


def test_other_target_is_refused(copy: Path) -> None:
    set_manifest(copy, target="toaster")
    with pytest.raises(ArtifactError, match="target 'toaster'; this qcompile runs cpu"):
        load(copy)


def test_newer_schema_is_refused(copy: Path) -> None:
    set_manifest(copy, schema_version=1000)
    with pytest.raises(ArtifactError, match="newer qcompile"):
        load(copy)


def test_damage_is_found_unless_verification_is_turned_off(copy: Path) -> None:
    path = copy / "chat_template.jinja"
    path.write_text(path.read_text().replace("turn", "TURN"))
    with pytest.raises(ArtifactError, match=r"chat_template\.jinja is damaged"):
        load(copy)
    assert load(copy, verify=False, threads=1).generate("a", max_new_tokens=1)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"lacks its file chat_template\.jinja"):
        load(copy, verify=False)


@pytest.mark.parametrize("seed", range(25))
def test_flipped_bytes_are_an_artifact_error_or_harmless(copy: Path, seed: int) -> None:
    """Damage to any file, also where the hashes were made to match it."""
    rng = np.random.default_rng(seed)
    victim = sorted(path for path in copy.iterdir() if path.name != "tokenizer.json")[seed % 4]
    content = bytearray(victim.read_bytes())
    for position in rng.integers(0, min(len(content), 2000), 4):
        content[position] ^= int(rng.integers(1, 256))
    victim.write_bytes(content)
    if victim.name != "manifest.json":
        files = {name: info.model_dump() for name, info in describe_files(copy).items()}
        set_manifest(copy, files=files)
    try:
        artifact = load(copy, threads=1)
    except ArtifactError:
        return
    assert artifact.forward([[5, 6]]).shape[:2] == (1, 2)
