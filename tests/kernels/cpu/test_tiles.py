"""The kernel for matrix units, on a model of their registers: any machine can run it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from tests.kernels.cpu.conftest import REPOSITORY

SOURCES = REPOSITORY / "kernels" / "cpu"
CHECK = Path(__file__).with_name("check_tiles.cc")


def run_check(folder: Path, *flags: str) -> str:
    """Builds and runs `check_tiles.cc`; what it complains about."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = str(folder / "check_tiles")
    includes = [f"-I{SOURCES / 'include'}", f"-I{SOURCES / 'src'}"]
    sources = [str(CHECK), str(SOURCES / "src" / "panel_test.cc")]
    command = [compiler, "-std=c++17", *flags, *includes, *sources, "-o", program]
    subprocess.run(command, check=True)
    return subprocess.run([program], capture_output=True, text=True, check=False).stderr


def test_tiles_multiply_as_rows_do_and_defects_are_found(tmp_path: Path) -> None:
    assert run_check(tmp_path, "-O1") == ""


@pytest.mark.slow
def test_tiles_touch_no_memory_but_their_own(tmp_path: Path) -> None:
    assert run_check(tmp_path, "-O1", "-fsanitize=address,undefined") == ""
