import os

import pytest
import torch

from qcompile.calibration.journal import Journal, default_directory
from qcompile.calibration.settings import parse_bytes
from qcompile.errors import DataError

KEY, OTHER = "ab" * 32, "cd" * 32


def test_entry_comes_back_as_it_was(tmp_path):
    journal = Journal(tmp_path / "made")
    tensors = {"a": torch.randn(3, 4).T, "b": torch.tensor(3, dtype=torch.uint8)}
    assert journal.get(KEY) is None
    journal.put(KEY, tensors)
    found = Journal(tmp_path / "made").get(KEY)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_damaged_entry_counts_as_absent(tmp_path):
    journal = Journal(tmp_path)
    journal.put(KEY, {"a": torch.zeros(1000)})
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:500])
    assert journal.get(KEY) is None


def test_what_was_not_used_for_longest_goes(tmp_path):
    journal = Journal(tmp_path)
    journal.put(KEY, {"a": torch.zeros(1000)})
    journal.put(OTHER, {"a": torch.zeros(1000)})
    for path in tmp_path.rglob("*.safetensors"):
        os.utime(path, (1, 1) if path.stem == KEY else None)
    small = Journal(tmp_path, kept_bytes=6000)
    small.put("ef" * 32, {"a": torch.zeros(1)})
    assert small.get(KEY) is None
    assert small.get(OTHER) is not None


def test_nothing_is_written_before_the_first_entry(tmp_path):
    Journal(tmp_path / "new").get(KEY)
    assert not (tmp_path / "new").exists()


def test_unusable_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"work directory '.*file' cannot be written to") as caught:
        Journal(tmp_path / "file").put(KEY, {"a": torch.zeros(1)})
    assert "--work-dir" in str(caught.value.remedy)


def test_default_directory_is_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_directory() == tmp_path / "qcompile" / "calibration"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2GiB", 2 << 30),
        ("500 MB", 500_000_000),
        ("1.5g", 1_500_000_000),
        (7, 7),
        ("64 kib", 65536),
    ],
)
def test_amounts_of_memory_are_read(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["much", "2 TiBs", "-1", "GiB", ""])
def test_no_amount_of_memory_is_told(text):
    with pytest.raises(DataError, match="is no amount of memory"):
        parse_bytes(text)
