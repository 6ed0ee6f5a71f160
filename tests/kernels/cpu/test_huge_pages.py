"""Large weights ask the system for huge pages, which only makes them faster."""

from __future__ import annotations

import mmap
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from qcompile.kernels.cpu.layout import pack_linear

SMAPS = Path("/proc/self/smaps")
HUGE = 2 * 2**20


def flags_at(address: int) -> list[str]:
    """What the kernel knows of the mapping that an address stands in."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(bound, 16) for bound in bounds.groups())
            inside = begin <= address < end
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("no mapping there")


@pytest.mark.skipif(sys.platform != "linux", reason="how pages are mapped is read from /proc")
@pytest.mark.parametrize(("k", "asks"), [(2048, True), (256, False)])
def test_weights_of_many_pages_ask_for_huge_ones(
    make_session: Callable[..., ort.InferenceSession], k: int, asks: bool
) -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has no huge pages")
    n = 4096
    codes = np.random.default_rng(0).integers(0, 16, (n, k), dtype=np.uint8)
    packed = pack_linear(codes, np.ones((n, 1), np.float16), bits=4, group_size=0)
    assert (packed.nbytes > HUGE) == asks
    # The weight stands in a mapping that nobody else advises on.
    pages = mmap.mmap(-1, packed.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapped = np.frombuffer(pages, np.uint8)
    mapped[:] = packed
    inputs = [np.ones((1, k), np.float32), mapped]
    attributes = {"N": n, "K": k, "bits": 4, "group_size": 0, "scale_dtype": 1}
    session = make_session("QLinear", inputs, act="int8_token", **attributes)
    feeds = {f"x{i}": ort.OrtValue.ortvalue_from_numpy(value) for i, value in enumerate(inputs)}
    (y,) = session.run_with_ort_values(None, feeds)
    assert ("hg" in flags_at(mapped.ctypes.data + packed.nbytes // 2)) == asks
    np.testing.assert_allclose(y.numpy()[0], (codes.astype(np.float32) - 8).sum(1), rtol=1e-5)
