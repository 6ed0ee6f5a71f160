"""The CPU kernels: an ONNX Runtime custom-op library and the format of its weights."""

from __future__ import annotations

from pathlib import Path

from qcompile.errors import TargetError

OPERATOR_DOMAIN = "com.qcompile"
"""The ONNX domain of the library's operators."""


def library_path() -> Path:
    """Returns the path of the custom-op library, for `SessionOptions.register_custom_ops_library`.

    Raises:
        TargetError: the library was not built.
    """
    path = Path(__file__).resolve().parent / "libqcompile_cpu.so"
    if not path.is_file():
        raise TargetError(
            f"the CPU kernels are not built: {path} does not exist",
            remedy="Install qcompile with `pip install .`, which builds them with CMake.",
        )
    return path
