"""The products of matrices under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.kernels.cpu.conftest import OTHER_LIBRARY, REPOSITORY

FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
HERE = Path(__file__).parent
# Most of them force one instruction set after the other.
INSTRUMENTED = (
    "test_lookup_codes.py",
    "test_qembedding.py",
    "test_vector_linear.py",
    "test_sparse_linear.py",
    "test_qlinears.py",
    "test_linear_panels.py",
    "test_hadamard.py",
    "test_qlinear.py::test_wide_and_partial_blocks_match_oracle",
    "test_attention.py::test_grouped_heads_match_oracle",
    "test_cached_attention.py::test_head_sizes_match_oracle",
    "test_cached_attention.py::test_groups_match_oracle",
)


def runtime_library(compiler: str, name: str) -> Path | None:
    """A library that the compiler comes with."""
    command = [compiler, f"-print-file-name={name}"]
    path = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    return path if path.is_absolute() else None


@pytest.mark.slow
def test_products_touch_no_memory_but_their_own(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None or shutil.which("cmake") is None:
        pytest.skip("no g++ and cmake to build the instrumented kernels with")
    # AddressSanitizer must find the C++ runtime when it starts, to follow exceptions.
    preloaded = [runtime_library(compiler, name) for name in ("libasan.so", "libstdc++.so")]
    if None in preloaded:
        pytest.skip("the compiler has no AddressSanitizer")
    options = [f"-DCMAKE_CXX_COMPILER={compiler}", f"-DCMAKE_CXX_FLAGS={FLAGS} -O0"]
    options += ["-DCMAKE_BUILD_TYPE=None", f"-DCMAKE_SHARED_LINKER_FLAGS={FLAGS}"]
    source = REPOSITORY / "kernels" / "cpu"
    subprocess.run(["cmake", "-S", str(source), "-B", str(tmp_path), *options], check=True)
    subprocess.run(["cmake", "--build", str(tmp_path), "--parallel", "2"], check=True)
    environment = {
        **os.environ,
        OTHER_LIBRARY: str(tmp_path / "libqcompile_cpu.so"),
        "LD_PRELOAD": " ".join(map(str, preloaded)),
        # Python and ONNX Runtime leave memory to the system.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
    }
    tests = [str(HERE / name) for name in INSTRUMENTED]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
