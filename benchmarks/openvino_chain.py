"""Runs an ONNX model in OpenVINO and says how long that takes: see `cpu_linear.py`.

Needs OpenVINO and numpy and nothing of qcompile. Reads numbers of rows, one a line, and answers
each with the seconds of one run on as many rows, as wall-clock time and as CPU time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import numpy as np
import openvino


def main() -> None:
    """Serves one model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="an .onnx file with one input of [rows, columns]")
    parser.add_argument("--columns", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--group", type=int, required=True, help="of activations, rounded to int8")
    options = parser.parse_args()
    settings = {
        "INFERENCE_NUM_THREADS": options.threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": options.group,
    }
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(options.model), "CPU", settings)
    request = compiled.create_infer_request()
    print("ready", flush=True)
    for line in sys.stdin:
        shape = (int(line), options.columns)
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        started, cpu = time.perf_counter(), time.process_time()
        request.infer({0: x})
        seconds = {"wall": time.perf_counter() - started, "cpu": time.process_time() - cpu}
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
