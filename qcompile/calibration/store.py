"""Activations of all micro-batches: in memory, or in memory-mapped files past a limit."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

_SMALL = 1 << 16
"""Bytes below which a value always stays in memory: masks, ids, sizes."""


class ActivationStore:
    """Values by micro-batch and node.

    What a value is does not depend on where it is kept: tensors are contiguous in either place.

    Args:
        memory_limit: Bytes of the whole process past which new values go to files; None never
            does.
        directory: Where files are made; the system's temporary directory by default.

    Attributes:
        spilled_bytes: All bytes that went to files.
    """

    def __init__(self, memory_limit: int | None = None, directory: Path | None = None) -> None:
        self._limit = memory_limit
        self._parent = directory
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._values: dict[tuple[int, fx.Node], Any] = {}
        self._files = 0
        self.spilled_bytes = 0

    def __enter__(self) -> ActivationStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def put(self, batch: int, node: fx.Node, value: Any) -> None:
        """Keeps the value that a node has in a micro-batch."""
        if isinstance(value, Tensor):
            value = value.detach().contiguous()
            if self._limit is not None and value.nbytes > _SMALL and self._is_full(value.nbytes):
                value = self._spill(value)
        self._values[batch, node] = value

    def get(self, batch: int, node: fx.Node) -> Any:
        """A kept value; a tensor must not be written to."""
        value = self._values[batch, node]
        return value.read() if isinstance(value, _OnDisk) else value

    def drop(self, batch: int, node: fx.Node) -> None:
        """Forgets a value, if it is kept."""
        value = self._values.pop((batch, node), None)
        if isinstance(value, _OnDisk):
            value.path.unlink()

    def close(self) -> None:
        """Forgets everything."""
        self._values.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _is_full(self, more: int) -> bool:
        return self._limit is not None and resident_bytes() + more > self._limit

    def _spill(self, value: Tensor) -> _OnDisk:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="qcompile-", dir=self._parent)
        path = Path(self._folder.name, str(self._files))
        self._files += 1
        self.spilled_bytes += value.nbytes
        value.flatten().view(torch.uint8).numpy().tofile(path)
        return _OnDisk(path, tuple(value.shape), value.dtype)


class _OnDisk:
    """A tensor in a file of its own."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.path = path
        self._shape = shape
        self._dtype = dtype

    def read(self) -> Tensor:
        # Copy on write: the tensor may look writable, the file stays as it is.
        content = torch.from_numpy(np.memmap(self.path, np.uint8, mode="c"))
        return content.view(self._dtype).reshape(self._shape)


def resident_bytes() -> int:
    """Memory that this process has at present; where the system does not tell, its peak."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return pages * os.sysconf("SC_PAGE_SIZE")


def release_freed_memory() -> None:
    """Gives memory that was freed back to the system, where the C library tends to keep it.

    Matrices of changing sizes leave holes in glibc's arenas, which count as this process's memory
    and would send activations to files before their time.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
