"""One-node ONNX models on the CPU kernels, once per instruction set."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from qcompile.backends.onnx.run_errors import ORT_ERRORS
from qcompile.errors import TargetError
from qcompile.kernels.cpu import OPERATOR_DOMAIN, library_path

ISAS = ("scalar", "avx2", "avxvnni", "avx512", "amx")
ISA_VARIABLE = "QCOMPILE_CPU_ISA"
OTHER_LIBRARY = "QCOMPILE_TEST_CPU_LIBRARY"
REPOSITORY = Path(__file__).resolve().parents[3]

NodeRunner = Callable[..., list[np.ndarray]]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed library, or one built from the tree; `OTHER_LIBRARY` names another one."""
    if OTHER_LIBRARY in os.environ:
        return Path(os.environ[OTHER_LIBRARY])
    try:
        return library_path()
    except TargetError:
        if shutil.which("cmake") is None:
            pytest.skip("the CPU kernels are not built, and there is no cmake to build them with")
    build = tmp_path_factory.mktemp("kernels")
    source = REPOSITORY / "kernels" / "cpu"
    subprocess.run(["cmake", "-S", str(source), "-B", str(build)], check=True)
    subprocess.run(["cmake", "--build", str(build), "--parallel", "2"], check=True)
    return build / "libqcompile_cpu.so"


def make_model(
    op_type: str,
    inputs: Sequence[np.ndarray | None],
    attributes: Mapping[str, Any],
    outputs: int,
    initializers: Mapping[int, np.ndarray],
) -> bytes:
    """A model of one node; missing inputs are None, the outputs are named y0, y1, ..."""
    names = ["" if value is None else f"x{i}" for i, value in enumerate(inputs)]
    node = helper.make_node(
        op_type,
        names,
        [f"y{i}" for i in range(outputs)],
        name="the_node",
        domain=OPERATOR_DOMAIN,
        **attributes,
    )
    graph = helper.make_graph(
        [node],
        "one_node",
        [
            helper.make_tensor_value_info(
                f"x{i}", helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim
            )
            for i, value in enumerate(inputs)
            if value is not None and i not in initializers
        ],
        [helper.make_empty_tensor_value_info(f"y{i}") for i in range(outputs)],
        [onnx.numpy_helper.from_array(value, f"x{i}") for i, value in initializers.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(OPERATOR_DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return model.SerializeToString()


def drawn(*shape: int) -> np.ndarray:
    """Floats of size 1, the same for the same last axis."""
    return np.random.default_rng(shape[-1]).standard_normal(shape).astype(np.float32)


def product_tolerance(isa: str, act: str, rows: int) -> float:
    """How far a product may be off, relative to its largest output.

    Both sides add the same products in float32, in different orders: the error is a few roundings
    of the partial sums (2^-24 each). Tiles of bfloat16 lose up to 2^-16 of each product of floats.
    """
    by_tiles = isa == "amx" and act == "float" and rows >= 16
    return 1e-5 if by_tiles else 2e-6


def runnable_isas(library: Path) -> tuple[str, ...]:
    """The instruction sets that a library can run with here, which it lists when asked for none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ISA_VARIABLE, "none")
        try:
            ort.SessionOptions().register_custom_ops_library(str(library))
        except ORT_ERRORS as error:
            listed = re.search(r"this machine runs only: ([\w, ]+)", str(error))
            if listed is None:
                raise
            return tuple(name for name in ISAS if name in listed[1].split(", "))
    raise AssertionError("the library takes any name of an instruction set")


@pytest.fixture(scope="session")
def isas(library: Path) -> tuple[str, ...]:
    return runnable_isas(library)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per instruction set of this machine; of all where there is no library to ask yet."""
    if "isa" not in metafunc.fixturenames:
        return
    try:
        names = runnable_isas(Path(os.environ.get(OTHER_LIBRARY) or library_path()))
    except TargetError:
        names = ISAS
    metafunc.parametrize("isa", names, indirect=True)


@pytest.fixture
def isa(
    request: pytest.FixtureRequest, isas: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> str:
    """Forces an instruction set for the sessions that the test makes."""
    name: str = request.param
    if name not in isas:
        pytest.skip(f"no {name} on this machine")
    monkeypatch.setenv(ISA_VARIABLE, name)
    return name


@pytest.fixture
def make_session(library: Path) -> Callable[..., ort.InferenceSession]:
    """Makes a session of one node; see `make_model`."""

    def make(
        op_type: str,
        inputs: Sequence[np.ndarray | None],
        *,
        outputs: int = 1,
        threads: int = 1,
        initializers: Mapping[int, np.ndarray] | None = None,
        **attributes: Any,
    ) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.register_custom_ops_library(str(library))
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # errors are asserted on, not printed
        model = make_model(op_type, inputs, attributes, outputs, initializers or {})
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    return make


@pytest.fixture
def run_node(make_session: Callable[..., ort.InferenceSession]) -> NodeRunner:
    """Runs one node and returns its outputs."""

    def run(op_type: str, inputs: Sequence[np.ndarray | None], **options: Any) -> list[np.ndarray]:
        session = make_session(op_type, inputs, **options)
        initializers = options.get("initializers") or {}
        feeds = {
            f"x{i}": value
            for i, value in enumerate(inputs)
            if value is not None and i not in initializers
        }
        results: list[np.ndarray] = session.run(None, feeds)
        return results

    return run


@pytest.fixture
def assert_same_on_two_threads(run_node: NodeRunner) -> Callable[..., None]:
    """Asserts that a node gives the same bits on one thread and on two."""

    def check(op_type: str, inputs: Sequence[np.ndarray | None], **attributes: Any) -> None:
        one = run_node(op_type, inputs, threads=1, **attributes)
        two = run_node(op_type, inputs, threads=2, **attributes)
        for found, expected in zip(two, one, strict=True):
            np.testing.assert_array_equal(found, expected)

    return check
