import math
import types

import numpy as np
import pytest
import torch
from torch import nn

from qcompile.errors import DataError, ModelError
from qcompile.evaluation import Evaluation, as_logits_model, evaluate
from qcompile.frontends.huggingface import capture_model

VOCABULARY = 256


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def encode(self, text):
        return list(text.encode())


class Table(nn.Module):
    """Predicts the next token from the present one alone."""

    def __init__(self, seed=0, vocabulary=VOCABULARY):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn(vocabulary, vocabulary, generator=generator) * 3
        self.table = nn.Parameter(table)

    def forward(self, input_ids):
        return self.table[input_ids]


class Recorder:
    """A `LogitsModel` around a function, which remembers the batches it saw."""

    tokenizer = Bytes()

    def __init__(self, function):
        self.function = function
        self.shapes = []

    def logits(self, input_ids):
        self.shapes.append(input_ids.shape)
        return self.function(input_ids)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return path


def uniform(input_ids):
    return np.zeros((*input_ids.shape, VOCABULARY), dtype=np.float32)


def expected_figures(text, window, model, reference):
    """Perplexity, KL and agreement once more, all at once in float64."""
    ids = torch.tensor(list(text.read_bytes()))
    ids = ids[: len(ids) // window * window].reshape(-1, window)
    found = torch.log_softmax(model(ids).double(), -1)[:, :-1]
    wanted = torch.log_softmax(reference(ids).double(), -1)[:, :-1]
    nll = -found.gather(-1, ids[:, 1:, None]).mean()
    kl = (wanted.exp() * (wanted - found)).sum(-1).mean()
    agreement = (found.argmax(-1) == wanted.argmax(-1)).double().mean()
    return float(nll.exp()), float(kl), float(agreement)


def test_perplexity_of_uniform_predictions_is_the_vocabulary(text):
    result = evaluate(Recorder(uniform), text, window=32)
    assert result.perplexity == pytest.approx(VOCABULARY, rel=1e-6)  # float32 logarithm of 1/256
    assert result.kl is None
    assert result.top1_agreement is None
    assert result.reference_perplexity is None


def test_perplexity_of_certain_predictions_is_one(text):

    def oracle(batch):
        logits = np.full((*batch.shape, VOCABULARY), -1e4, dtype=np.float32)
        for row, tokens in enumerate(batch):
            for position, following in enumerate([*tokens[1:], 0]):
                logits[row, position, following] = 0
        return logits

    assert evaluate(Recorder(oracle), text, window=32).perplexity == 1.0


@pytest.mark.parametrize("window", [2, 7, 200])
@pytest.mark.parametrize("batch_size", [1, 3])
@torch.no_grad()
def test_figures_match_a_direct_computation_in_float64(text, window, batch_size):
    model, reference = Table(seed=0), Table(seed=1)
    result = evaluate(
        model,
        text,
        tokenizer=Bytes(),
        reference=reference,
        window=window,
        batch_size=batch_size,
    )
    perplexity, kl, agreement = expected_figures(text, window, model, reference)
    # Log-probabilities are float32: a few units of 6e-8 of values around 10.
    assert result.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert result.kl == pytest.approx(kl, rel=1e-5)
    assert result.top1_agreement == pytest.approx(agreement, abs=1e-12)
    assert result.tokens == len(text.read_bytes()) // window * (window - 1)


def test_model_equals_itself(text):
    model = Table()
    result = evaluate(model, text, tokenizer=Bytes(), reference=model, window=64)
    assert result.kl == 0.0
    assert result.top1_agreement == 1.0
    assert result.perplexity == result.reference_perplexity


def test_divergence_is_zero_where_the_reference_rules_a_token_out(text):
    def without_token_zero(input_ids):
        logits = uniform(input_ids)
        logits[..., 0] = -np.inf
        return logits

    model = Recorder(without_token_zero)
    result = evaluate(model, text, reference=Recorder(without_token_zero), window=64)
    assert result.kl == 0.0


def test_divergence_is_infinite_where_the_model_rules_out_what_the_reference_allows(text):
    def without_token_zero(input_ids):
        logits = uniform(input_ids)
        logits[..., 0] = -np.inf
        return logits

    result = evaluate(Recorder(without_token_zero), text, reference=Recorder(uniform), window=64)
    assert result.kl == math.inf


def test_batches_are_bounded_by_batch_size_and_max_tokens(text):
    model = Recorder(uniform)
    seen = []
    progress = types.SimpleNamespace(
        stage=lambda name, total=None: seen.append(total),
        advance=lambda n=1, detail="": seen.append(n),
        done=lambda: None,
    )
    result = evaluate(model, text, window=16, max_tokens=100, batch_size=4, progress=progress)
    assert model.shapes == [(4, 16), (2, 16)]
    assert seen == [6, 4, 2]
    assert result.tokens == 6 * 15


def test_module_is_evaluated_in_evaluation_mode_and_left_as_it_was(text):
    model = nn.Sequential(Table(), nn.Dropout(0.9))
    model[0].eval()
    plain = evaluate(model[0], text, tokenizer=Bytes(), window=64)
    dropped = evaluate(model, text, tokenizer=Bytes(), window=64)
    assert dropped.perplexity == plain.perplexity
    assert model.training
    assert model[1].training
    assert not model[0].training


def test_module_may_return_a_tuple_or_an_object_with_logits(text):
    class Wrapped(Table):
        def __init__(self, wrap):
            super().__init__()
            self.wrap = wrap

        def forward(self, input_ids):
            return self.wrap(super().forward(input_ids))

    direct = evaluate(Table(), text, tokenizer=Bytes(), window=64)
    for wrap in (lambda x: (x, None), lambda x: types.SimpleNamespace(logits=x)):
        wrapped = evaluate(Wrapped(wrap), text, tokenizer=Bytes(), window=64)
        assert wrapped.perplexity == direct.perplexity
    with pytest.raises(ModelError, match="Wrapped returns a dict"):
        evaluate(Wrapped(lambda x: {"y": x}), text, tokenizer=Bytes(), window=64)


def test_artifact_is_run_through_its_forward(text):
    table = Table().table.detach().numpy()
    artifact = types.SimpleNamespace(
        forward=lambda input_ids: table[input_ids],
        tokenizer=Bytes(),
    )
    direct = evaluate(Table(), text, tokenizer=Bytes(), window=64)
    assert evaluate(artifact, text, window=64).perplexity == direct.perplexity


def test_program_and_the_model_it_came_from_agree(tiny_checkpoint, text):
    transformers = pytest.importorskip("transformers")
    directory = tiny_checkpoint("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    program = capture_model(model)
    result = evaluate(
        program, text, tokenizer=tokenizer, reference=model, window=32, max_tokens=256
    )
    assert result.kl < 1e-8  # both are float32, with other orders of summation
    assert result.top1_agreement == 1.0
    assert result.perplexity == pytest.approx(result.reference_perplexity, rel=1e-5)


def test_tokenizer_of_transformers_does_not_warn_about_long_texts(tiny_checkpoint, text, caplog):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_checkpoint("llama"))
    tokenizer.model_max_length = 8
    transformers.utils.logging.enable_propagation()
    evaluate(Table(), text, tokenizer=tokenizer, window=32)
    assert not caplog.records


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_name_the_window(text, bad):
    def broken(input_ids):
        logits = uniform(input_ids)
        if broken.calls == 1:
            logits[1, 5, 7] = bad
        broken.calls += 1
        return logits

    broken.calls = 0
    with pytest.raises(ModelError, match=r"the model gives logits .* in window 3, position 5"):
        evaluate(Recorder(broken), text, window=16, batch_size=2)


def test_vocabularies_that_differ_are_refused(text):
    with pytest.raises(ModelError, match="vocabulary of 256, the reference of 300"):
        evaluate(Table(), text, tokenizer=Bytes(), reference=Table(vocabulary=300), window=64)


def test_token_outside_of_the_vocabulary_is_refused(text):
    model = Recorder(lambda ids: np.zeros((*ids.shape, 50), dtype=np.float32))
    with pytest.raises(ModelError, match="outside of the vocabulary of the model, 50"):
        evaluate(model, text, window=64)


def test_logits_of_the_last_position_only_are_refused(text):
    model = Recorder(lambda ids: uniform(ids)[:, -1:])
    with pytest.raises(ModelError, match="of all positions"):
        evaluate(model, text, window=64)


def test_missing_tokenizer_says_what_to_pass(text):
    with pytest.raises(DataError, match="tokenizer= to evaluate"):
        evaluate(Table(), text)


def test_text_shorter_than_a_window_says_how_much_it_takes(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("a")
    with pytest.raises(DataError, match="has 1 tokens, one window takes 512"):
        evaluate(Recorder(uniform), path)


def test_object_that_is_no_model_is_refused():
    with pytest.raises(ModelError, match="a str cannot be evaluated"):
        as_logits_model("some/path")


def test_evaluation_becomes_a_plain_dict():
    figures = Evaluation(12.5, 0.01, 0.9, 12.0, 511, 512, 1.5)
    assert figures.to_dict() == {
        "perplexity": 12.5,
        "kl": 0.01,
        "top1_agreement": 0.9,
        "reference_perplexity": 12.0,
        "tokens": 511,
        "window": 512,
        "seconds": 1.5,
    }
