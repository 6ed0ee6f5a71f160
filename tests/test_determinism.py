"""Same inputs, same bytes: twice, with one thread or two, whatever the order of hashes.

Only the report may differ: it holds timings, and is not hashed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import TinyCheckpoint

CASES = (
    ("cpu", "w4a8-rtn"),
    ("cpu", "float"),
    ("cuda", "w4-rtn"),
    ("onnx", "w8a8-rtn"),
    ("cpu", "w4-gptq"),
)
"""Targets and recipes."""

_COMPILE_ALL = """
import sys
from pathlib import Path
import qcompile as qc
from qcompile.ir.serialize import save_program
from qcompile.pipeline import recipe_phases
from qcompile.passes.infra import PassManager

model, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
program = qc.capture(model)
for case in sys.argv[4:]:
    target, recipe = case.split()
    qc.compile(
        program,
        recipe,
        target,
        folder / target / recipe,
        threads=threads,
        check="off",
        calibration_samples=2,
        calibration_length=32,
        work_dir=folder / "work",
    )
quantized, _ = PassManager(recipe_phases(qc.load_recipe("w4a8-rtn"))).run(program)
(folder / "program").mkdir()
save_program(quantized, folder / "program")
"""


@pytest.fixture(scope="module")
def compiled(tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, compiled by two processes: ``one`` and ``two`` threads and orders of hashes.

    The layers are large enough that torch shares their work among threads.
    """
    model = tiny_checkpoint(
        "llama", hidden_size=256, intermediate_size=512, head_dim=64, num_hidden_layers=1
    )
    folder = tmp_path_factory.mktemp("deterministic")
    cases = [" ".join(case) for case in CASES]
    processes = []
    for name, threads in (("one", "1"), ("two", "2")):
        (folder / name).mkdir()
        arguments = [str(model), str(folder / name), threads, *cases]
        environment = {**os.environ, "PYTHONHASHSEED": threads, "OMP_NUM_THREADS": threads}
        command = [sys.executable, "-c", _COMPILE_ALL, *arguments]
        processes.append(subprocess.Popen(command, env=environment))
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    return folder


def files(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != "report.json"
    }


@pytest.mark.parametrize(("target", "recipe"), CASES, ids=[" ".join(case) for case in CASES])
def test_artifact_is_the_same_whatever_threads_and_hashes(
    target: str, recipe: str, compiled: Path
) -> None:
    one, two = (files(compiled / name / target / recipe) for name in ("one", "two"))
    assert len(one) > 3
    assert one == two


def test_quantized_program_is_the_same_whatever_threads_and_hashes(compiled: Path) -> None:
    one, two = (files(compiled / name / "program") for name in ("one", "two"))
    assert {"program.json", "weights.safetensors"} <= one.keys()
    assert one == two
