"""The journal of calibration under faults: entries are whole or absent."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from qcompile.calibration.journal import Journal
from qcompile.errors import DataError

KEY = "ab" * 32
ENTRY = {"a": torch.arange(4)}


def fill_disk(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupt(descriptor: int) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("fault", "raised"), [(fill_disk, DataError), (interrupt, BaseException)])
def test_entry_that_is_not_finished_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: object, raised: type[BaseException]
) -> None:
    monkeypatch.setattr(os, "fsync", fault)
    with pytest.raises(raised):
        Journal(tmp_path).put(KEY, ENTRY)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_a_killed_process_left_goes_when_it_is_old(tmp_path: Path) -> None:
    Journal(tmp_path).put(KEY, ENTRY)
    old, new = (tmp_path / "ab" / name for name in ("tmpold", "tmpnew"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    Journal(tmp_path).put("cd" * 32, ENTRY)
    assert not old.exists()
    assert new.exists()  # another process may be writing it
    assert Journal(tmp_path).get(KEY) is not None
