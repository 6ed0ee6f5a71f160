"""What the machine can do at most, measured beside what is compared with it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_BUFFER = 512 * 2**20
_TURNS = 1 << 21


class Probes:
    """Memory bandwidth and the rate of byte products.

    Args:
        threads: That share the work.

    Raises:
        SystemExit: There is no C compiler.
    """

    def __init__(self, threads: int) -> None:
        compiler = shutil.which("cc")
        if compiler is None:
            raise SystemExit("the probes of the machine's limits need a C compiler")
        source = Path(__file__).with_name("probes.c")
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "probes.so"
            flags = ["-O3", "-march=native", "-shared", "-fPIC"]
            subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
            self._library = ctypes.CDLL(str(library))
        self._library.make_buffer.restype = ctypes.c_void_p
        self._library.make_buffer.argtypes = [ctypes.c_size_t]
        self._library.read_buffer.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._library.multiply_bytes.restype = ctypes.c_int64
        self._library.multiply_bytes.argtypes = [ctypes.c_int64]
        self._buffer = self._library.make_buffer(_BUFFER)
        if not self._buffer:
            raise SystemExit(f"no memory for a buffer of {_BUFFER} bytes")
        self._pool = ThreadPoolExecutor(threads)
        self._threads = threads

    def bandwidth(self) -> float:
        """Bytes per second of reading a large buffer once."""
        part = _BUFFER // self._threads // 256 * 256
        starts = [self._buffer + i * part for i in range(self._threads)]
        begin = time.perf_counter()
        list(self._pool.map(lambda start: self._library.read_buffer(start, part), starts))
        return part * self._threads / (time.perf_counter() - begin)

    def byte_products(self) -> float:
        """Operations per second of dot products of bytes in registers; 0 without AVX-512 VNNI."""
        begin = time.perf_counter()
        done: int = sum(self._pool.map(self._library.multiply_bytes, [_TURNS] * self._threads))
        return done / (time.perf_counter() - begin)
