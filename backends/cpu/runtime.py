"""Runs compiled models on the CPU with ONNX Runtime; the weights are memory-mapped."""

from __future__ import annotations

import onnxruntime

from qcompile.backends.cpu.decoding import CachedDecoder, grows_in_place
from qcompile.backends.decoding import Decoder
from qcompile.backends.onnx.runtime import OnnxSession
from qcompile.kernels.cpu import library_path


class CpuSession(OnnxSession):
    """A loaded model of qcompile's own operators; see `OnnxSession` for its arguments."""

    def _options(self) -> onnxruntime.SessionOptions:
        options = super()._options()
        if self._manifest.kernel_layout_version is not None:
            options.register_custom_ops_library(str(library_path()))
        return options

    def _decoder(self, batch: int, capacity: int) -> Decoder:
        if self._has_cache and grows_in_place(self._signature):
            return CachedDecoder(self._runtime, self._signature, batch, capacity)
        return super()._decoder(batch, capacity)
