"""Generation over a model that is a table: what is sampled, when it stops, what is streamed."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny_lm import BOS, EOS, PAD, VOCABULARY, byte_tokenizer

from qcompile.errors import ArtifactError, RecipeError
from qcompile.generation import Generation, GenerationOptions, Sampler, TextStream
from qcompile.manifest import GenerationInfo
from qcompile.text import Tokenizer

SPECIAL = GenerationInfo(eos_token_ids=(EOS,), bos_token_id=BOS, pad_token_id=PAD)


def tokens_of(text: str | bytes) -> list[int]:
    return [4 + byte for byte in (text.encode() if isinstance(text, str) else text)]


@dataclasses.dataclass
class Parrot:
    """After a prompt that ends in byte X it says ``lines[X]``, then the end token forever.

    Whatever it is fed must be what it said, at the place where it said it.
    """

    lines: dict[str, bytes]
    takes_padding: bool = True
    vocabulary_size: int = VOCABULARY
    batches: list[int] = dataclasses.field(default_factory=list)
    steps: int = 0

    def decoder(self, batch: int, capacity: int) -> ParrotDecoder:
        self.batches.append(batch)
        return ParrotDecoder(self)


class ParrotDecoder:
    def __init__(self, parrot: Parrot) -> None:
        self.parrot = parrot
        self.said: list[list[int]] = []
        self.heard: list[int] = []

    def advance(self, input_ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        self.parrot.steps += 1
        mask = np.ones_like(input_ids) if mask is None else mask
        if not self.said:
            prompts = [list(ids[real == 1]) for ids, real in zip(input_ids, mask, strict=True)]
            assert all(real[-1] == 1 for real in mask), "prompts end together"
            lines = [self.parrot.lines[chr(prompt[-1] - 4)] for prompt in prompts]
            self.said = [[*tokens_of(line), EOS] for line in lines]
            self.heard = [0] * len(lines)
        else:
            for row, real in enumerate(mask[:, 0]):
                if real:
                    assert input_ids[row, 0] == self.said[row][self.heard[row]]
                    self.heard[row] += 1
        logits = np.zeros((len(self.said), VOCABULARY), np.float32)
        for row, count in enumerate(self.heard):
            logits[row, self.said[row][min(count, len(self.said[row]) - 1)]] = 1
        return logits


def generate(
    parrot: Parrot, *prompts: str, special: GenerationInfo = SPECIAL, **options: object
) -> Generation:
    return Generation(
        parrot,
        [tokens_of(prompt) for prompt in prompts],
        GenerationOptions(**options),
        special=special,
        tokenizer=Tokenizer(byte_tokenizer()),
    )


# --- ends -----------------------------------------------------------------------------------------


def test_text_ends_at_the_end_token_which_is_no_text() -> None:
    [completion] = generate(Parrot({"a": b"hello"}), "a").completions
    assert completion.text == "hello"
    assert completion.token_ids == (*tokens_of("hello"), EOS)
    assert (completion.finish_reason, completion.prompt_tokens) == ("stop", 1)


def test_text_ends_at_max_new_tokens() -> None:
    parrot = Parrot({"a": b"hello"})
    [completion] = generate(parrot, "a", max_new_tokens=3).completions
    assert (completion.text, completion.finish_reason) == ("hel", "length")
    assert parrot.steps == 3  # the last token is not run


def test_no_new_tokens_runs_nothing() -> None:
    parrot = Parrot({"a": b"hello"})
    [completion] = generate(parrot, "a", max_new_tokens=0).completions
    assert (completion.text, completion.token_ids) == ("", ())
    assert completion.finish_reason == "length"
    assert parrot.steps == 0


def test_text_ends_where_the_context_is_full() -> None:
    special = SPECIAL.model_copy(update={"max_context": 4})
    completions = generate(Parrot({"a": b"hello"}), "aa", "aaaa", special=special).completions
    # Positions 2 and 3 can be run; the token that position 3 yields has none of its own.
    assert [c.text for c in completions] == ["hel", "h"]
    assert {c.finish_reason for c in completions} == {"context"}


def test_extra_stop_token_ends_the_text() -> None:
    [completion] = generate(Parrot({"a": b"hello"}), "a", stop_token_ids=tokens_of("l")).completions
    assert (completion.text, completion.finish_reason) == ("he", "stop")


@pytest.mark.parametrize("stop", ["lo w", ("xyz", "lo w"), ["o world", "lo w"]])
def test_stop_string_over_several_tokens_is_cut_off(stop: str) -> None:
    parrot = Parrot({"a": b"hello world"})
    [completion] = generate(parrot, "a", stop=stop).completions
    assert (completion.text, completion.finish_reason) == ("hel", "stop")
    assert parrot.steps == len("hello w")


def test_beginning_of_a_stop_string_is_text_when_the_rest_does_not_come() -> None:
    [completion] = generate(Parrot({"a": b"hell"}), "a", stop="llo").completions
    assert (completion.text, completion.finish_reason) == ("hell", "stop")


def test_cut_character_at_the_end_is_replaced() -> None:
    [completion] = generate(Parrot({"a": "5 €".encode()}), "a", max_new_tokens=4).completions
    assert completion.text == "5 \ufffd"


# --- streaming ------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    st.text("ab€ü", min_size=0, max_size=12),
    st.lists(st.text("ab€", min_size=1, max_size=3), max_size=2),
    st.integers(1, 30),
)
def test_streamed_pieces_join_to_the_text(text: str, stop: list[str], limit: int) -> None:
    options = {"stop": stop, "max_new_tokens": limit}
    parrot = Parrot({"a": text.encode()})
    [whole] = generate(parrot, "a", **options).completions
    stream = TextStream(generate(parrot, "a", **options))
    pieces = list(stream)
    assert "" not in pieces
    assert "".join(pieces) == whole.text
    assert stream.completion == whole
    assert not any(each in whole.text for each in stop)
    if limit > len(text.encode()):
        cuts = [text.find(each) for each in stop if each in text]
        assert whole.text.startswith(text[: min(cuts, default=len(text))])


def test_pieces_come_while_the_model_runs() -> None:
    parrot = Parrot({"a": b"hello"})
    stream = TextStream(generate(parrot, "a"))
    assert parrot.steps == 0
    assert (next(stream), parrot.steps) == ("h", 1)
    assert (next(stream), parrot.steps) == ("e", 2)
    assert stream.completion.text == "hello"


# --- batches --------------------------------------------------------------------------------------

LINES = {"a": b"hello", "b": b"", "c": "déjà vu, déjà lu".encode()}


@pytest.mark.parametrize("takes_padding", [True, False])
def test_batch_of_different_lengths_equals_one_by_one(takes_padding: bool) -> None:
    prompts = ["a", "xxb", "yyyyc", "xa"]
    parrot = Parrot(LINES, takes_padding)
    together = generate(parrot, *prompts, stop="lu").completions
    alone = [generate(Parrot(LINES), prompt, stop="lu").completions[0] for prompt in prompts]
    assert together == alone
    assert [c.text for c in together] == ["hello", "", "déjà vu, déjà ", "hello"]
    # What cannot mask padding runs one by one.
    assert parrot.batches == ([4] if takes_padding else [1, 1, 1, 1])


def test_batch_of_equal_lengths_runs_together_without_masks() -> None:
    parrot = Parrot(LINES, takes_padding=False)
    assert [c.text for c in generate(parrot, "a", "a").completions] == ["hello", "hello"]
    assert parrot.batches == [2]


def test_batch_yields_pieces_with_their_row() -> None:
    pieces = list(generate(Parrot({"a": b"12", "b": b"xyz"}), "a", "b"))
    assert pieces == [(0, "1"), (1, "x"), (0, "2"), (1, "y"), (1, "z")]


def test_empty_batch_gives_nothing() -> None:
    assert generate(Parrot({})).completions == []


# --- sampling -------------------------------------------------------------------------------------


def logits_of(*probabilities: float) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.array(probabilities, np.float32))


def draws(count: int, logits: np.ndarray, **options: object) -> np.ndarray:
    sampler = Sampler(GenerationOptions(seed=1, **options))
    return np.bincount([sampler(logits) for _ in range(count)], minlength=len(logits)) / count


def test_zero_temperature_takes_the_first_likeliest_token() -> None:
    assert draws(3, logits_of(0.2, 0.4, 0.4)).tolist() == [0, 1, 0]


def test_sampling_follows_the_softmax() -> None:
    # The standard error of a frequency is below 0.5 / sqrt(4000) = 0.008.
    np.testing.assert_allclose(
        draws(4000, logits_of(0.1, 0.6, 0.3), temperature=1), [0.1, 0.6, 0.3], atol=0.03
    )


def test_temperature_sharpens_and_flattens() -> None:
    weights = np.array([0.1, 0.6, 0.3]) ** (1 / 2)
    np.testing.assert_allclose(
        draws(4000, logits_of(0.1, 0.6, 0.3), temperature=2), weights / weights.sum(), atol=0.03
    )
    assert draws(50, logits_of(0.1, 0.6, 0.3), temperature=1e-9).tolist() == [0, 1, 0]


def test_top_k_keeps_the_likeliest() -> None:
    frequencies = draws(2000, logits_of(0.1, 0.4, 0.2, 0.3), temperature=1, top_k=2)
    np.testing.assert_allclose(frequencies, [0, 4 / 7, 0, 3 / 7], atol=0.04)
    assert draws(10, logits_of(0.4, 0.6), temperature=1, top_k=9).sum() == 1


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.3, [1]), (0.4, [1]), (0.5, [1, 3]), (0.71, [1, 2, 3]), (1.0, [0, 1, 2, 3])],
)
def test_top_p_keeps_the_fewest_that_hold_the_probability(top_p: float, kept: list[int]) -> None:
    logits = logits_of(0.1, 0.4, 0.2, 0.3)
    frequencies = draws(400, logits + 5, temperature=1, top_p=top_p - 1e-6)
    assert np.flatnonzero(frequencies).tolist() == kept


def test_top_p_counts_what_top_k_left() -> None:
    # 0.4 and 0.3 are 4/7 and 3/7 among themselves: the first alone holds 0.5.
    logits = logits_of(0.1, 0.4, 0.2, 0.3)
    assert draws(50, logits, temperature=1, top_k=2, top_p=0.5).tolist() == [0, 1, 0, 0]


def test_seed_repeats_and_rows_of_a_batch_draw_as_if_alone() -> None:
    class Coin(Parrot):
        def decoder(self, batch: int, capacity: int) -> Coin:
            self.batch = batch
            return self

        def advance(self, input_ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
            logits = np.full((self.batch, VOCABULARY), -np.inf, np.float32)
            logits[:, tokens_of("HT")] = 0
            return logits

    options = {"temperature": 1.0, "max_new_tokens": 40}
    texts = [c.text for c in generate(Coin({}), "a", "b", seed=3, **options).completions]
    [alone] = generate(Coin({}), "b", seed=3, **options).completions
    assert texts == [alone.text] * 2
    assert set(alone.text) == {"H", "T"}
    assert generate(Coin({}), "b", seed=4, **options).completions[0].text != alone.text
    free = {generate(Coin({}), "b", **options).completions[0].text for _ in range(3)}
    assert len(free) == 3  # equal by chance once in 2**38


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_reported(bad: float, temperature: float) -> None:
    logits = np.array([0.5, bad, 2.0], np.float32)
    with pytest.raises(ArtifactError, match=rf"logit {bad} for token 1"):
        Sampler(GenerationOptions(temperature=temperature))(logits)


def test_logits_without_any_candidate_are_reported() -> None:
    with pytest.raises(ArtifactError, match="logit -inf"):
        Sampler(GenerationOptions())(np.full(3, -np.inf, np.float32))


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": -1},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"seed": -1},
    ],
)
def test_option_out_of_range_is_named(options: dict) -> None:
    [(name, value)] = options.items()
    with pytest.raises(RecipeError, match=f"{name} is {value}"):
        GenerationOptions(**options)


def test_empty_stop_string_is_refused() -> None:
    with pytest.raises(RecipeError, match="stop string is empty"):
        GenerationOptions(stop=["a", ""])
    assert GenerationOptions(stop="").stop_strings == ()


def test_unusable_prompt_is_refused_before_anything_runs() -> None:
    parrot = Parrot({"a": b"x"})
    special = SPECIAL.model_copy(update={"max_context": 4})
    with pytest.raises(RecipeError, match="has no tokens"):
        generate(parrot, "a", "")
    with pytest.raises(RecipeError, match="has 5 tokens; the model was made for at most 4"):
        generate(parrot, "aaaaa", special=special)
    with pytest.raises(RecipeError, match=f"token id {VOCABULARY}"):
        Generation(parrot, [[VOCABULARY]], GenerationOptions(), special=SPECIAL)
    assert parrot.steps == 0


def test_without_tokenizer_only_tokens_are_produced() -> None:
    prompt = tokens_of("a")
    generation = Generation(Parrot({"a": b"hi"}), [prompt], GenerationOptions(), special=SPECIAL)
    [completion] = generation.completions
    assert (completion.text, completion.token_ids) == ("", (*tokens_of("hi"), EOS))
    with pytest.raises(RecipeError, match="stop strings need a tokenizer"):
        Generation(Parrot({}), [prompt], GenerationOptions(stop="x"), special=SPECIAL)
