"""What ONNX Runtime raises, and what users see of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from qcompile.errors import ArtifactError

ORT_ERRORS: Final = (
    ort_state.EPFail,
    ort_state.Fail,
    ort_state.InvalidArgument,
    ort_state.InvalidGraph,
    ort_state.InvalidProtobuf,
    ort_state.NoSuchFile,
    ort_state.NotImplemented,
    ort_state.RuntimeException,
    UnicodeDecodeError,  # an error that quotes a damaged name
)
"""They have no common base but `Exception`."""


@contextmanager
def naming_failures() -> Iterator[None]:
    """Runs a model whose inputs are our own: if it fails, the artifact is to blame.

    Raises:
        ArtifactError: It failed.
    """
    try:
        yield
    except (*ORT_ERRORS, RuntimeError) as error:  # of bound buffers it raises RuntimeError itself
        raise ArtifactError(
            f"the model of this artifact failed as it ran: {error}",
            remedy="if memory lasts, compile the model again",
        ) from error
