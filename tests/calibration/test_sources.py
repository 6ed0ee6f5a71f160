"""Every kind of calibration data ends as windows or inputs, or as an error with a remedy."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qcompile.calibration.samples import ExampleInputs, TokenWindows
from qcompile.calibration.sources import DataSource
from qcompile.errors import DataError
from qcompile.ir.types import Port, Role, Signature


def program(*roles):
    """What a source looks at: the signature and the name."""
    ports = tuple(Port(role.value, role) for role in roles)
    return SimpleNamespace(
        signature=Signature(ports, ()), provenance=SimpleNamespace(name="the model")
    )


TOKENS = program(Role.INPUT_IDS)
PLAIN = program(Role.TENSOR)


def source(given, **options):
    return DataSource(given, **{"tokenize": lambda t: list(t.encode()), "length": 4, **options})


class Dataset(dict):
    """What a source uses of a `datasets.Dataset`."""

    @property
    def column_names(self):
        return list(self)


def test_text_file_becomes_windows(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij")
    data = source(path)(TOKENS)
    assert data.tokens.tolist() == [list(b"abcd"), list(b"efgh")]
    assert data.description == "2 x 4 tokens of 'text.txt'"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["abcd", "ef"], [list(b"abcd"), list(b"\n\nef")]),
        (Dataset(text=["abcd", "ef"], label=[0, 1]), [list(b"abcd"), list(b"\n\nef")]),
        (Dataset(input_ids=[[1, 2, 3], [4, 5, 6]]), [[1, 2, 3], [4, 5, 6]]),
        (np.arange(9), [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (torch.arange(6).reshape(2, 3), [[0, 1, 2], [3, 4, 5]]),
        ([np.arange(3), np.arange(3, 8)], [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ],
    ids=["texts", "dataset", "token dataset", "tokens", "windows", "ragged tokens"],
)
def test_texts_and_tokens_become_windows(given, expected):
    found = source(given)(TOKENS)
    # One row is cut to the length asked for; rows of equal length stay as they are.
    assert found.tokens.tolist() == expected


def test_default_is_the_text_that_python_carries():
    data = source(None, samples=2)(TOKENS)
    assert data.tokens.shape == (2, 4)
    assert "standard library" in data.description


def test_samples_bound_the_windows():
    assert source(np.arange(100), samples=3)(TOKENS).tokens.shape == (3, 4)
    assert source(np.zeros((9, 5), dtype=int), samples=3)(TOKENS).tokens.shape == (3, 5)


def test_data_is_made_once():
    made = source(["abcdefgh"])
    assert made(TOKENS) is made(TOKENS)


def test_model_without_tokens_takes_inputs_or_those_of_the_trace():
    x = torch.ones(2, 3)
    assert isinstance(source([x, x])(PLAIN), ExampleInputs)
    assert source(None, examples=x)(PLAIN).samples == [x]


def test_given_data_passes_through():
    data = TokenWindows(np.ones((1, 2), dtype=np.int64))
    assert source(data)(TOKENS) is data


@pytest.mark.parametrize(
    ("given", "model", "message"),
    [
        (None, PLAIN, "'the model' reads no tokens"),
        ("text.txt", PLAIN, "reads no tokens"),
        ([], TOKENS, "is empty"),
        ([3.5, 4.5], TOKENS, "holds a float that is neither text nor tokens"),
        (Dataset(words=["a"]), TOKENS, "no column 'text' or 'input_ids', only 'words'"),
        (["ab"], TOKENS, "too short: it has 2 tokens"),
        ("self", TOKENS, "cannot write its own calibration text"),
    ],
)
def test_what_cannot_be_used_is_told_with_a_remedy(given, model, message):
    with pytest.raises(DataError, match=message) as caught:
        source(given)(model)
    assert caught.value.remedy


def test_text_without_tokenizer_is_told():
    with pytest.raises(DataError, match="no tokenizer"):
        source(["some text"], tokenize=None)(TOKENS)


def test_equal_data_has_equal_fingerprints():
    one, same, other = (TokenWindows(np.array([[1, 2, n]])) for n in (3, 3, 4))
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()
    x = torch.ones(2, 3)
    examples = [ExampleInputs([value]) for value in (x, x.clone(), x + 1, {"x": x})]
    first, equal, *others = (e.fingerprint() for e in examples)
    assert first == equal
    assert first not in others
