"""A small real model on the CPU, beside other engines: prefill and decode, in turns.

Every engine runs in a process of its own, which loads its model once and then waits; a round asks
each of them for one prefill of 512 tokens and 64 greedy tokens after a prompt of 64. Medians and
best times are over the rounds, and ratios are of one run. CPU time counts all threads of a process
and is what stays meaningful on a machine that others use; with one thread it is the time that a
quiet machine would take.

    python benchmarks/cpu_decode.py ARTIFACT --threads 1 2
    python benchmarks/cpu_decode.py ARTIFACT --gguf MODEL.gguf --peer-python PEERS/bin/python

Peers run in the interpreter `--peer-python`, which needs their package and numpy only:

- `--gguf FILE`: llama.cpp (llama-cpp-python) over the same model in Q4_0, which llama.cpp itself
  makes from the file.
- `--genai FOLDER`: onnxruntime-genai over what its own builder made of the model (``builder.py -i
  MODEL -o FOLDER -p int4 -e cpu`` among its ``models``).
- `--onnx FOLDER`: OpenVINO over an artifact of the `onnx` target, whose caches become its states.

`smollm2.py` has transformers, and ONNX Runtime's `MatMulNBits` in the artifact's own graph.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from line_process import LineProcess

PROMPT_TOKENS = 64
NEW_TOKENS = 64
PREFILL_TOKENS = 512
CONTEXT = 1024


class Engine(ABC):
    """A loaded model."""

    @abstractmethod
    def restart(self) -> None:
        """Forgets all tokens."""

    @abstractmethod
    def feed(self, tokens: list[int]) -> int:
        """Appends tokens; the most probable one that follows."""


class QCompile(Engine):
    def __init__(self, model: Path, threads: int) -> None:
        import qcompile

        session: Any = qcompile.load(model, verify=False, threads=threads)._session
        from qcompile.backends.cpu.decoding import CachedDecoder

        self._decoder: Callable[[], Any] = lambda: CachedDecoder(
            session._runtime, session._signature, 1, CONTEXT
        )

    def restart(self) -> None:
        self._text = self._decoder()

    def feed(self, tokens: list[int]) -> int:
        return int(self._text.advance(np.array([tokens]))[0].argmax())


class LlamaCpp(Engine):
    def __init__(self, model: Path, threads: int) -> None:
        import llama_cpp  # a peer, not a dependency

        self._api: Any = llama_cpp
        self._llama = llama_cpp.Llama(
            str(model),
            n_ctx=CONTEXT,
            n_batch=PREFILL_TOKENS,
            n_ubatch=PREFILL_TOKENS,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        self._context: Any = self._llama.ctx
        self._vocabulary = self._llama.n_vocab()

    def restart(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def feed(self, tokens: list[int]) -> int:
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        batch = self._api.llama_batch_get_one(array, len(tokens))
        if self._api.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        logits = self._api.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())


class OnnxRuntimeGenai(Engine):
    def __init__(self, model: Path, threads: int) -> None:
        import onnxruntime_genai  # a peer, not a dependency

        self._api: Any = onnxruntime_genai
        config = onnxruntime_genai.Config(str(model))
        sessions = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": sessions}}))
        self._model = onnxruntime_genai.Model(config)

    def restart(self) -> None:
        options = self._api.GeneratorParams(self._model)
        options.set_search_options(max_length=CONTEXT)
        self._generator: Any = self._api.Generator(self._model, options)

    def feed(self, tokens: list[int]) -> int:
        self._generator.append_tokens(np.array(tokens, np.int32))
        logits = self._generator.get_logits()
        return int(logits.reshape(-1, logits.shape[-1])[-1].argmax())


class OpenVino(Engine):
    def __init__(self, model: Path, threads: int) -> None:
        import openvino  # a peer, not a dependency
        from openvino._offline_transformations import apply_make_stateful_transformation

        core = openvino.Core()
        graph = core.read_model(model / "model.onnx")
        shapes, states = {}, {}
        for port in graph.inputs:
            name = port.any_name
            shapes[name] = [1, *list(port.partial_shape)[1:]]
            if name.startswith("past_key_values."):
                states[name] = name.replace("past_key_values", "present")
        graph.reshape(shapes)  # a state of any batch size would begin with none
        apply_make_stateful_transformation(graph, states)
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        self._request = core.compile_model(graph, "CPU", settings).create_infer_request()

    def restart(self) -> None:
        self._request.reset_state()
        self._past = 0

    def feed(self, tokens: list[int]) -> int:
        begin, end = self._past, self._past + len(tokens)
        inputs = {
            "input_ids": np.array([tokens]),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(begin, end)[None],
        }
        self._request.infer(inputs)
        self._past = end
        return int(self._request.get_tensor("logits").data[0, -1].argmax())


ENGINES: dict[str, Callable[[Path, int], Engine]] = {
    "qcompile": QCompile,
    "llama.cpp Q4_0": LlamaCpp,
    "onnxruntime-genai": OnnxRuntimeGenai,
    "OpenVINO": OpenVino,
}


@dataclass(frozen=True)
class Round:
    """Seconds of one round: wall clock, and CPU time of all threads.

    Attributes:
        prefill: For `PREFILL_TOKENS` at once.
        prefill_cpu: The same in CPU time.
        token: Per new token, the median.
        token_cpu: Per new token, the mean.
    """

    prefill: float
    prefill_cpu: float
    token: float
    token_cpu: float


def measure(engine: Engine) -> Round:
    prompt = [100 + i for i in range(PREFILL_TOKENS)]
    engine.restart()
    started, cpu = time.perf_counter(), time.process_time()
    engine.feed(prompt)
    prefill, prefill_cpu = time.perf_counter() - started, time.process_time() - cpu
    engine.restart()
    token = engine.feed(prompt[:PROMPT_TOKENS])
    seconds, cpu = [], time.process_time()
    for _ in range(NEW_TOKENS):
        started = time.perf_counter()
        token = engine.feed([token])
        seconds.append(time.perf_counter() - started)
    token_cpu = (time.process_time() - cpu) / NEW_TOKENS
    return Round(prefill, prefill_cpu, statistics.median(seconds), token_cpu)


def serve(name: str, model: Path, threads: int) -> None:
    """What the process of an engine does: a round for every line that it reads."""
    engine = ENGINES[name](model, threads)
    measure(engine)  # warms up
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(asdict(measure(engine))), flush=True)


def start(python: str, name: str, model: Path, threads: int) -> LineProcess:
    """An engine in a process of its own."""
    command = [python, __file__, str(model), "--serve", name, "--threads", str(threads)]
    return LineProcess(command)


def make_q4_0(source: Path, target: Path, python: str) -> Path:
    """Lets llama.cpp quantize a model as it does by default for Q4_0."""
    program = (
        "import sys, llama_cpp as l; p = l.llama_model_quantize_default_params();"
        "p.ftype = l.LLAMA_FTYPE_MOSTLY_Q4_0; p.allow_requantize = True;"
        "sys.exit(l.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), p))"
    )
    subprocess.run(
        [python, "-c", program, str(source), str(target)],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return target


def compare(processes: dict[str, LineProcess], rounds: int) -> dict[str, list[Round]]:
    results: dict[str, list[Round]] = {name: [] for name in processes}
    names = list(processes)
    for turn in range(rounds):
        first = turn % len(names)  # so that no engine always follows the same other
        for name in names[first:] + names[:first]:
            results[name].append(Round(**json.loads(processes[name].ask("round"))))
    return results


def print_table(threads: int, results: dict[str, list[Round]]) -> None:
    print(f"threads: {threads}; milliseconds, best round (median round)")
    columns = ("token", "token cpu", "prefill 512", "prefill cpu")
    print(f"{'engine':18}" + "".join(f"{column:>20}" for column in columns))
    for name, rounds in results.items():
        cells = []
        for field in ("token", "token_cpu", "prefill", "prefill_cpu"):
            times = sorted(1e3 * getattr(r, field) for r in rounds)
            cells.append(f"{times[0]:.2f} ({statistics.median(times):.2f})")
        print(f"{name:18}" + "".join(f"{cell:>20}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path, help="a compiled language model")
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp, at any precision")
    parser.add_argument("--genai", type=Path, help="the same model for onnxruntime-genai")
    parser.add_argument("--onnx", type=Path, help="the same model for OpenVINO")
    parser.add_argument("--peer-python", default=sys.executable, help="has the peers' packages")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print every round as JSON")
    parser.add_argument("--serve", choices=list(ENGINES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        serve(arguments.serve, arguments.artifact, arguments.threads[0])
        return
    with tempfile.TemporaryDirectory() as scratch:
        models = {"qcompile": (sys.executable, arguments.artifact)}
        if arguments.gguf is not None:
            q4_0 = make_q4_0(arguments.gguf, Path(scratch) / "q4_0.gguf", arguments.peer_python)
            models["llama.cpp Q4_0"] = (arguments.peer_python, q4_0)
        if arguments.genai is not None:
            models["onnxruntime-genai"] = (arguments.peer_python, arguments.genai)
        if arguments.onnx is not None:
            models["OpenVINO"] = (arguments.peer_python, arguments.onnx)
        everything = {}
        for threads in arguments.threads:
            processes = {
                name: start(python, name, model, threads)
                for name, (python, model) in models.items()
            }
            results = compare(processes, arguments.rounds)
            for process in processes.values():
                process.close()
            everything[threads] = {
                name: [asdict(r) for r in rounds] for name, rounds in results.items()
            }
            if not arguments.json:
                print_table(threads, results)
        if arguments.json:
            print(json.dumps(everything))


if __name__ == "__main__":
    main()
