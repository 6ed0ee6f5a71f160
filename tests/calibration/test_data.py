import numpy as np
import pytest

from qcompile.calibration.data import load_text, windows
from qcompile.errors import DataError


def test_default_text_is_long_english_and_always_the_same():
    text = load_text()
    assert len(text) > 300_000
    assert text.lower().count(" the ") > 1_000
    assert load_text() == text


def test_text_file_is_read_as_utf8_without_its_mark(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffGrüße, Welt\n".encode())
    assert load_text(path) == "Grüße, Welt\n"
    assert load_text(str(path)) == "Grüße, Welt\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t ", "is empty"),
        (b"GGUF\x03\0\0\0", "null bytes"),
        (b"caf\xe9 au lait", "byte 3 cannot be decoded"),
    ],
)
def test_unusable_text_file_is_named_with_its_fault(tmp_path, content, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"bad\.txt.*{message}"):
        load_text(path)


def test_missing_text_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt' does not exist"):
        load_text(tmp_path / "nowhere.txt")


def test_directory_in_place_of_text_is_named(tmp_path):
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        load_text(tmp_path)


def test_windows_are_consecutive_and_drop_the_rest():
    cut = windows(range(11), 4, 100)
    assert cut.dtype == np.int64
    assert cut.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_windows_stop_at_max_tokens():
    assert windows(range(100), 4, 11).shape == (2, 4)


@pytest.mark.parametrize(
    ("count", "window", "limit", "message"),
    [
        (3, 4, 100, "has 3 tokens, one window takes 4"),
        (0, 4, 100, "has 0 tokens"),
        (100, 1, 100, "predicts nothing"),
        (100, 8, 7, "max_tokens is 7, less than one window of 8"),
    ],
)
def test_windows_error_says_how_many_tokens_it_takes(count, window, limit, message):
    with pytest.raises(DataError, match=message):
        windows(range(count), window, limit)
