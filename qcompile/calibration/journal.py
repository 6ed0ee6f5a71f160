"""Finished work by content: what was computed once of the same things is read back.

An entry's key is a hash of all that decides about it; its file is written aside and renamed, so
that it is whole whenever the process ends. What cannot be read counts as never written.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from qcompile.errors import DataError

_SUFFIX = ".safetensors"

_ABANDONED_SECONDS = 3600.0
"""A file half written for as long as this was left by a process that was killed."""

KEPT_BYTES = 8 << 30
"""Past this much, entries that were not used for the longest time go."""


class Journal:
    """A directory of entries.

    Args:
        directory: Made when the first entry is written.
        kept_bytes: The most that entries may take at that time.
    """

    def __init__(self, directory: Path, *, kept_bytes: int = KEPT_BYTES) -> None:
        self.directory = directory
        self._kept_bytes = kept_bytes
        self._is_open = False

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of an entry, or None."""
        path = self._path(key)
        try:
            tensors = safetensors.torch.load(path.read_bytes())
            os.utime(path)
        except (OSError, safetensors.SafetensorError):
            return None
        return tensors

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Adds an entry.

        Raises:
            DataError: It cannot be written.
        """
        path = self._path(key)
        content = safetensors.torch.save({k: t.contiguous() for k, t in tensors.items()})
        try:
            if not self._is_open:
                self._prune()
                self._is_open = True
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                try:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                    os.replace(file.name, path)
                finally:  # an error or Ctrl-C leaves nothing half written
                    Path(file.name).unlink(missing_ok=True)
        except OSError as error:
            raise DataError(
                f"work directory '{self.directory}' cannot be written to: {error.strerror}",
                remedy="make room there, or name another with --work-dir",
            ) from error

    def _path(self, key: str) -> Path:
        return self.directory / key[:2] / f"{key}{_SUFFIX}"

    def _prune(self) -> None:
        """Removes what was used least recently, and what killed processes left half written."""
        found = [path for path in self.directory.glob("??/*") if path.is_file()]
        entries = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in found)
        total = sum(size for _, size, _ in entries)
        abandoned = time.time() - _ABANDONED_SECONDS
        for changed, size, path in entries:
            if total > self._kept_bytes or (path.suffix != _SUFFIX and changed < abandoned):
                path.unlink(missing_ok=True)
                total -= size


def default_directory() -> Path:
    """Where journals are unless the user says otherwise: in the user's cache directory."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "qcompile", "calibration")
