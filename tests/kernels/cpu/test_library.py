"""The library as a file: what it exports, which instruction set it picks, what ABI it speaks."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from tests.kernels.cpu.conftest import ISA_VARIABLE, ISAS

import qcompile.kernels.cpu as cpu_kernels
from qcompile.errors import TargetError
from qcompile.kernels.cpu import library_path
from qcompile.kernels.cpu.layout import pack_linear

HERE = Path(__file__).resolve().parent
INCLUDE = HERE.parents[2] / "kernels" / "cpu" / "include"


def header_folder() -> Path | None:
    """Where ONNX Runtime's C header is on this machine, if anywhere."""
    named = os.environ.get("ORT_INCLUDE_DIR")
    folders = [Path(named)] if named else [Path("/usr/include"), Path("/usr/local/include")]
    for folder in folders:
        for inside in (folder, folder / "onnxruntime", folder / "onnxruntime/core/session"):
            if (inside / "onnxruntime_c_api.h").is_file():
                return inside
    return None


def test_abi_agrees_with_the_headers() -> None:
    headers, compiler = header_folder(), shutil.which("c++")
    if headers is None or compiler is None:
        pytest.skip("no ONNX Runtime headers (set ORT_INCLUDE_DIR) or no C++ compiler")
    command = [compiler, "-std=c++17", "-fsyntax-only", f"-I{INCLUDE}", f"-I{headers}"]
    subprocess.run([*command, str(HERE / "check_ort_abi.cc")], check=True)


def test_only_the_entry_point_is_exported(library: Path) -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm")
    listing = subprocess.run(
        [nm, "-D", "--defined-only", str(library)], check=True, capture_output=True, text=True
    )
    assert [line.split()[-1] for line in listing.stdout.splitlines()] == ["RegisterCustomOps"]


def test_unknown_instruction_set_is_refused(library: Path, monkeypatch) -> None:
    monkeypatch.setenv(ISA_VARIABLE, "mmx")
    with pytest.raises(Exception, match=r"QCOMPILE_CPU_ISA is 'mmx'.*runs only: .*scalar"):
        ort.SessionOptions().register_custom_ops_library(str(library))


@pytest.mark.parametrize("name", ISAS)
def test_instruction_set_can_be_forced(
    library: Path, isas: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name not in isas:
        pytest.skip(f"no {name} on this machine: nothing was tested with it")
    monkeypatch.setenv(ISA_VARIABLE, name)
    ort.SessionOptions().register_custom_ops_library(str(library))


def test_old_runtime_is_refused_with_its_version(library: Path) -> None:
    # A runtime that knows only version 1 of the API, whose first slot makes a status.
    get_api_type = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    version_type = ctypes.CFUNCTYPE(ctypes.c_void_p)
    status_type = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    messages: list[bytes] = []

    def create_status(_code: int, message: bytes) -> int:
        messages.append(message)
        return 1

    api = (status_type * 1)(status_type(create_status))

    class ApiBase(ctypes.Structure):
        _fields_ = (("get_api", get_api_type), ("version", version_type))

    def get_api(version: int) -> int | None:
        return ctypes.addressof(api) if version == 1 else None

    version = ctypes.create_string_buffer(b"1.16.3")
    base = ApiBase(get_api_type(get_api), version_type(lambda: ctypes.addressof(version)))
    register = ctypes.CDLL(str(library)).RegisterCustomOps
    register.restype = ctypes.c_void_p
    assert register(None, ctypes.byref(base)) == 1
    assert messages == [b"qcompile's CPU kernels need ONNX Runtime 1.17 or newer; this is 1.16.3"]


def test_missing_library_names_the_remedy(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cpu_kernels, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(TargetError, match=r"are not built.*\n.*pip install"):
        library_path()


def test_memory_mapped_weights_need_no_alignment(library: Path, tmp_path: Path, isa) -> None:
    """External data at an odd offset gives the same rows as data in the model."""
    codes = np.random.default_rng(0).integers(0, 16, (32, 64), dtype=np.uint8)
    packed = pack_linear(codes, np.ones((32, 2), np.float32), bits=4, group_size=32)
    (tmp_path / "w.bin").write_bytes(b"\0" * 3 + packed.tobytes())
    tensor = onnx.TensorProto(
        name="w", data_type=onnx.TensorProto.UINT8, dims=packed.shape, data_location=1
    )
    for key, value in {"location": "w.bin", "offset": 3, "length": packed.nbytes}.items():
        tensor.external_data.add(key=key, value=str(value))
    attributes = {"N": 32, "K": 64, "bits": 4, "group_size": 32, "scale_dtype": 1}
    node = onnx.helper.make_node("QLinear", ["x", "w"], ["y"], domain="com.qcompile", **attributes)
    floats = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node],
        "external",
        [onnx.helper.make_tensor_value_info("x", floats, ["m", 64])],
        [onnx.helper.make_tensor_value_info("y", floats, ["m", 32])],
        [tensor],
    )
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("com.qcompile", 1)]
    path = tmp_path / "model.onnx"
    path.write_bytes(
        onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    )
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library))
    x = np.random.default_rng(1).standard_normal((2, 64)).astype(np.float32)
    (y,) = ort.InferenceSession(str(path), options).run(None, {"x": x})
    np.testing.assert_allclose(y, x @ (codes.astype(np.float32) - 8).T, rtol=0, atol=1e-4)
