"""Tokenizer, chat templates, decoding piece by piece, stop strings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny_lm import BOS, EOS, TURN, byte_tokenizer

from qcompile.errors import ArtifactError, QCompileError, RecipeError
from qcompile.text import IncrementalDecoder, StopMatcher, Tokenizer

MESSAGES = [{"role": "user", "content": "Hi <b>"}, {"role": "model", "content": "ünï"}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_tokenizer())


def with_template(template: str, **config: Any) -> Tokenizer:
    return Tokenizer(byte_tokenizer(), config=config, chat_template=template)


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_encode_adds_special_tokens_unless_told(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("A") == [BOS, 4 + 65]
    assert tokenizer.encode("A", add_special_tokens=False) == [4 + 65]
    assert tokenizer.decode([BOS, 4 + 65, TURN]) == "A"
    assert tokenizer.decode([4 + 65, TURN], skip_special_tokens=False) == "A<turn>"
    assert tokenizer.vocabulary_size == 260


def test_truncation_and_padding_of_the_checkpoint_are_dropped(directory: Path) -> None:
    backend = byte_tokenizer()
    backend.enable_truncation(3)
    backend.enable_padding(length=3)
    backend.save(str(directory / "tokenizer.json"))
    tokenizer = Tokenizer.load(directory)
    assert len(tokenizer.encode("A long text")) == 12
    assert len(tokenizer.encode("A")) == 2


def test_artifact_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("tokenizer.json", b"{}", "cannot be read as a tokenizer"),
        ("tokenizer.json", b"\xff", "not UTF-8"),
        ("tokenizer_config.json", b"{", "not valid JSON"),
        ("tokenizer_config.json", b"[]", "not a JSON object"),
        ("chat_template.jinja", b"\xff", "not UTF-8"),
    ],
)
def test_damaged_tokenizer_file_is_named(
    directory: Path, name: str, content: bytes, named: str
) -> None:
    (directory / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{name}.*{named}"):
        Tokenizer.load(directory)


@pytest.mark.parametrize(
    ("config", "file", "expected"),
    [
        ({"chat_template": "config"}, None, "config"),
        ({"chat_template": "config"}, "file", "file"),
        (
            {
                "chat_template": [
                    {"name": "tool_use", "template": "tools"},
                    {"name": "default", "template": "named"},
                ]
            },
            None,
            "named",
        ),
        ({"chat_template": "{{ bos_token }}{{ eos_token }}", "bos_token": "<s>",
          "eos_token": {"content": "</s>", "special": True}, "pad_token": None},
         None, "<s></s>"),
    ],
)  # fmt: skip
def test_chat_template_is_found_where_hugging_face_puts_it(
    directory: Path, config: dict[str, Any], file: str | None, expected: str
) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if file is not None:
        (directory / "chat_template.jinja").write_text(file)
    assert Tokenizer.load(directory).render_chat(MESSAGES) == expected


# --- chat templates -------------------------------------------------------------------------------

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + "
        "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "indented": (
        "{%- if messages %}\n    {{- messages[0].role }}\n{%- endif %}\n"
        "    {% for m in messages %}\n    {{ m.content | trim }}\n    {% endfor %}\n"
    ),
    "tojson": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "loop control": "{% for m in messages %}{{ m.role }}{% break %}{% endfor %}",
    "generation block": (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    ),
    "date": "{{ strftime_now('%Y') }}",
    "variables": "{{ nothing }}{{ tools }}{{ documents is none }}{{ extra }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_transformers_renders_them(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer())
    for prompt in (True, False):
        expected = theirs.apply_chat_template(
            MESSAGES,
            chat_template=TEMPLATES[name],
            tokenize=False,
            add_generation_prompt=prompt,
            extra="more",
        )
        rendered = with_template(TEMPLATES[name]).render_chat(
            MESSAGES, add_generation_prompt=prompt, extra="more"
        )
        assert rendered == expected


def test_chat_is_encoded_without_a_second_start_token() -> None:
    tokenizer = with_template("{{ bos_token }}{{ messages[0].content }}", bos_token="<bos>")
    assert tokenizer.encode_chat([{"role": "user", "content": "A"}]) == [BOS, 4 + 65]


def test_model_without_template_asks_for_a_plain_prompt(tokenizer: Tokenizer) -> None:
    assert not tokenizer.has_chat_template
    with pytest.raises(ArtifactError, match="no chat template") as caught:
        tokenizer.render_chat(MESSAGES)
    assert "plain prompt" in str(caught.value.remedy)


@pytest.mark.parametrize(
    ("template", "messages", "error", "named"),
    [
        ("{{ raise_exception('roles must alternate') }}", MESSAGES, RecipeError, "must alternate"),
        ("{{ messages[0].content + 1 }}", MESSAGES, RecipeError, "rejects these messages"),
        ("{{ messages[0].nothing.at.all }}", MESSAGES, RecipeError, "no attribute 'nothing'"),
        ("{{ 1 / 0 }}", MESSAGES, RecipeError, "division"),
        ("{% for %}", MESSAGES, ArtifactError, "broken at line 1"),
        ("fine", [], RecipeError, "at least one message"),
    ],
)
def test_failing_template_is_one_clear_error(
    template: str, messages: list[dict[str, str]], error: type[QCompileError], named: str
) -> None:
    with pytest.raises(error, match=named):
        with_template(template).render_chat(messages)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.append(1) }}",
        "{{ range(10000000) | list }}",
    ],
)
def test_template_cannot_leave_its_sandbox(template: str) -> None:
    with pytest.raises(RecipeError, match="rejects these messages"):
        with_template(template).render_chat(MESSAGES)


# --- decoding piece by piece ----------------------------------------------------------------------

TOKENS = st.lists(st.integers(0, 259), max_size=40)


@given(TOKENS)
def test_pieces_join_to_the_text_of_all_tokens(ids: list[int]) -> None:
    """Arbitrary bytes, most of them no UTF-8, with special tokens among them."""
    tokenizer = Tokenizer(byte_tokenizer())
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.push(token) for token in ids] + [decoder.flush()]
    assert "".join(pieces) == tokenizer.decode(ids)


@given(st.text(max_size=20), st.lists(st.integers(0, 259), max_size=8))
def test_characters_come_whole_and_at_once(text: str, context: list[int]) -> None:
    tokenizer = Tokenizer(byte_tokenizer())
    decoder = IncrementalDecoder(tokenizer, [*context, 4 + ord("!")])
    for character in text:
        *partial, last = [4 + byte for byte in character.encode()]
        assert [decoder.push(token) for token in partial] == [""] * len(partial)
        # U+FFFD itself looks like a broken character until the next one comes.
        if "\ufffd" not in text:
            assert decoder.push(last) == character
        else:
            decoder.push(last)


def test_context_keeps_the_space_of_the_first_word() -> None:
    words = {"▁The": 0, "▁sky": 1, "▁is": 2, "<s>": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words))
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.add_special_tokens(["<s>"])
    tokenizer = Tokenizer(backend)
    decoder = IncrementalDecoder(tokenizer, context=[3, 0])
    assert [decoder.push(token) for token in (1, 3, 2)] == [" sky", "", " is"]
    assert decoder.flush() == ""


def test_prompt_cut_inside_a_character_is_completed() -> None:
    euro = [4 + byte for byte in "€".encode()]
    decoder = IncrementalDecoder(Tokenizer(byte_tokenizer()), context=[4 + 65, *euro[:2]])
    assert decoder.push(euro[2]) == "€"


def test_byte_fallback_tokens_are_held_until_they_are_a_character() -> None:
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"a": 256, "<unk>": 257}
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    backend.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    decoder = IncrementalDecoder(Tokenizer(backend))
    first, second, third = "你".encode()
    assert [decoder.push(t) for t in (256, first, second, third, 256)] == ["a", "", "", "你", "a"]


# --- stop strings ---------------------------------------------------------------------------------


def expected_cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """By definition: read character by character, stop where a stop string first ends."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


LETTERS = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


@given(LETTERS, STOPS, st.lists(st.integers(1, 5), max_size=30))
def test_stopping_does_not_depend_on_how_the_text_is_cut(
    text: str, stops: list[str], sizes: list[int]
) -> None:
    matcher = StopMatcher(stops)
    expected, stop = expected_cut(text, stops)
    emitted, start = "", 0
    for size in [*sizes, len(text)]:
        emitted += matcher.push(text[start : start + size])
        start += size
        assert expected.startswith(emitted)  # nothing is ever taken back
    assert (emitted + matcher.flush(), matcher.matched) == (expected, stop)


@given(LETTERS, STOPS)
def test_only_what_may_become_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    emitted = matcher.push(text)
    if matcher.matched is None:
        held = text.removeprefix(emitted)
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_text_after_a_stop_string_is_swallowed() -> None:
    matcher = StopMatcher(["END"])
    assert [matcher.push(piece) for piece in ("one E", "ND two", "three")] == ["one ", "", ""]
    assert matcher.flush() == ""
    assert matcher.matched == "END"


def test_eos_token_is_no_text(tokenizer: Tokenizer) -> None:
    decoder = IncrementalDecoder(tokenizer)
    assert decoder.push(EOS) == ""
