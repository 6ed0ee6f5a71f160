"""One quantized program on every target: how far is each from the program itself?"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qcompile import compiler
from qcompile.artifact import RUNNABLE_TARGETS, Artifact, load
from qcompile.backends.base import Target
from qcompile.backends.registry import get_target, target_names
from qcompile.calibration.data import load_text, windows
from qcompile.calibration.journal import Journal, default_directory
from qcompile.calibration.settings import Calibration
from qcompile.calibration.sources import DataSource
from qcompile.errors import DataError, MissingExtraError, QCompileError
from qcompile.evaluation.divergence import Divergence
from qcompile.evaluation.models import tokenize
from qcompile.ir import dialect
from qcompile.ir.interpreter import Interpreter
from qcompile.ir.program import Program
from qcompile.ir.types import Role
from qcompile.legality import preflight
from qcompile.passes.infra import Context, PassManager
from qcompile.pipeline import front_phases, recipe_phases
from qcompile.progress import NullProgress, Progress
from qcompile.recipe import DEFAULT_RECIPE, Recipe, load_recipe
from qcompile.report import CompileReport
from qcompile.text import Tokenizer

SCHEMA_VERSION = 1
"""Of `Parity.to_dict`."""


@dataclass(frozen=True)
class TargetParity:
    """What one target makes of the program.

    Attributes:
        target: Its name, with the options that were asked for.
        reason: Why there are no figures: what pre-flight refuses, or what is missing here; empty
            if it ran.
        run_by: What ran the artifact here.
        max_error: Largest |difference| of an output.
        mean_error: Mean |difference|.
        relative_error: `max_error` over the largest |output| of the program.
        kl: Mean KL(program || target) per position, in nats; None without logits.
        top1_agreement: Fraction of positions where both rank the same token first; None without
            logits.
        bytes: Size of the artifact on disk.
        seconds: Wall-clock time to run all samples, without loading.
    """

    target: str
    reason: str = ""
    run_by: str | None = None
    max_error: float | None = None
    mean_error: float | None = None
    relative_error: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    bytes: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Parity:
    """The targets side by side.

    Attributes:
        model: Name of the model.
        recipe: Name of the recipe.
        positions: How many positions (or, without logits, samples) were compared.
        targets: One entry per target, in the order that was asked for.
        noise: Where activations are rounded, how far the same program is from itself when it is
            computed in float64. A value on the edge between two codes falls to either side, and
            every step moves what follows: differences of this size say nothing of a target.
    """

    model: str
    recipe: str
    positions: int
    targets: tuple[TargetParity, ...]
    noise: TargetParity | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON document; its keys stay as they are within a `SCHEMA_VERSION`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "recipe": self.recipe,
            "positions": self.positions,
            "targets": [asdict(target) for target in self.targets],
            "noise": None if self.noise is None else asdict(self.noise),
        }


def parity(
    model: compiler.Model,
    recipe: str | Path | Mapping[str, object] | Recipe = DEFAULT_RECIPE,
    targets: Sequence[str | Target] = target_names(),
    *,
    example_inputs: Any = None,
    overrides: Mapping[str, object] | None = None,
    text: str | os.PathLike[str] | None = None,
    window: int = 64,
    max_tokens: int = 256,
    dequantize: bool = False,
    calibration: Any = None,
    calibration_samples: int = 128,
    calibration_length: int = 512,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Parity:
    """Compares what targets compute with the program that they were all lowered from.

    The recipe runs once. The program that it makes is interpreted, which is the reference; and it
    is lowered to every target, written to a temporary directory, loaded and run on the same
    inputs.

    Args:
        model: As for `qcompile.compile`.
        recipe: As for `qcompile.compile`.
        targets: Targets, or their names and options.
        example_inputs: For a plain module, inputs to trace it with and to compare on.
        overrides: Options to set on top of the recipe.
        text: For language models, a UTF-8 file to compare on; the standard library's help text by
            default. Without a tokenizer the tokens are drawn at random.
        window: Tokens per window; windows are run independently.
        max_tokens: Use no more of the text than this.
        dequantize: Whether an already quantized checkpoint may be read as floats.
        calibration: As for `qcompile.compile`.
        calibration_samples: As for `qcompile.compile`.
        calibration_length: As for `qcompile.compile`.
        threads: Threads to run artifacts with.
        progress: Told what is going on.

    Raises:
        QCompileError: If the model, the recipe or the text cannot be used. What a *target* cannot
            do is part of the result.
    """
    resolved = load_recipe(recipe, overrides)
    backends = [(str(t), get_target(t)) if isinstance(t, str) else (t.name, t) for t in targets]
    progress = progress or NullProgress()
    source = DataSource(
        calibration,
        samples=calibration_samples,
        length=calibration_length,
        examples=example_inputs,
    )
    source.check()
    journal = Journal(default_directory())
    context = Context(progress, calibration=Calibration(source, journal=journal))
    progress.stage("capture")
    program = compiler.open_model(model, example_inputs, dequantize)
    tokenizer = compiler.tokenizer_of(program)
    if tokenizer is not None:
        source.tokenize = partial(tokenizer.encode, add_special_tokens=False)
    program, _ = PassManager(front_phases()).run(program, context)
    samples = _samples(program, tokenizer, example_inputs, text, window, max_tokens)
    refusals = [_refusal(program, resolved, backend) for _, backend in backends]
    program, _ = PassManager(recipe_phases(resolved)).run(program, context)
    progress.stage("interpret")
    reference = _Reference(program, samples)
    noise = None
    if any(program.calls(dialect.quantize, dialect.quantize_float)):
        noise = _measure("program in float64", _interpret(program, torch.float64), reference)
        noise = replace(noise, run_by="interpreter")
    rows = []
    for (label, backend), refusal in zip(backends, refusals, strict=True):
        if refusal:
            rows.append(TargetParity(label, refusal))
        else:
            row = _compare(program, resolved, backend, reference, context, threads)
            rows.append(replace(row, target=label))
    progress.done()
    name = program.provenance.name
    return Parity(name, resolved.name, reference.positions, tuple(rows), noise)


Sample = dict[str, npt.NDArray[Any]]
"""What `Artifact.forward` or `Artifact.run` takes, by name."""


class _Reference:
    """What the interpreted program computes on some samples."""

    def __init__(self, program: Program, samples: Sequence[Sample]) -> None:
        self.has_logits = program.signature.has(Role.LOGITS)
        self.samples = samples
        self.outputs = list(map(_interpret(program, torch.float32), samples))

    @property
    def positions(self) -> int:
        """Rows of the logits, or of the first output."""
        return sum(len(_rows(output)) for output in self.outputs)


def _interpret(program: Program, dtype: torch.dtype) -> Callable[[Sample], torch.Tensor]:
    """Maps a sample to the logits of a program, or to its first output, computed in a type."""
    interpreter = Interpreter(program, dtype=dtype, cache={})
    ports = [port.role for port in program.signature.outputs]

    def run(sample: Sample) -> torch.Tensor:
        tensors = {name: torch.from_numpy(value) for name, value in sample.items()}
        if Role.LOGITS in ports:
            found = interpreter.run(*program.bind(tensors["input_ids"]))
            return found[ports.index(Role.LOGITS)].float()
        return interpreter.run(*tensors.values())[0].float()

    return run


def _compare(
    program: Program,
    recipe: Recipe,
    target: Target,
    reference: _Reference,
    context: Context,
    threads: int | None,
) -> TargetParity:
    context.progress.stage(f"run on {target.name}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "artifact"
        try:
            compiler.write_artifact(program, recipe, target, path, context, CompileReport())
            if target.name not in RUNNABLE_TARGETS:
                return TargetParity(target.name, "its own runtime runs it", bytes=_size(path))
            artifact = load(path, verify=False, threads=threads)
            measured = _measure(target.name, partial(_run, artifact), reference)
            return replace(measured, run_by=_runner(target.name), bytes=_size(path))
        except MissingExtraError as missing:
            return TargetParity(target.name, f"{missing.message}: {missing.remedy}")
        except QCompileError as error:
            return TargetParity(target.name, error.message)


def _measure(
    name: str, run: Callable[[Sample], torch.Tensor], reference: _Reference
) -> TargetParity:
    """The figures of whatever maps samples to outputs."""
    divergence = Divergence()
    largest = total = scale = seconds = 0.0
    count = 0
    for sample, expected in zip(reference.samples, reference.outputs, strict=True):
        started = time.perf_counter()
        found = run(sample)
        seconds += time.perf_counter() - started
        difference = (found.double() - expected.double()).abs()
        largest = max(largest, float(difference.max()))
        scale = max(scale, float(expected.abs().max()))
        total += float(difference.sum())
        count += difference.numel()
        if reference.has_logits:
            wanted, given = (_log_probabilities(x) for x in (expected, found))
            divergence.add(wanted, given)
    return TargetParity(
        name,
        max_error=largest,
        mean_error=total / count,
        relative_error=largest / scale if scale else largest,
        kl=divergence.kl if reference.has_logits else None,
        top1_agreement=divergence.top1_agreement if reference.has_logits else None,
        seconds=seconds,
    )


def _run(artifact: Artifact, sample: Sample) -> torch.Tensor:
    has_logits = artifact.manifest.signature.output("logits") is not None
    made = (
        artifact.forward(sample["input_ids"])
        if has_logits
        else next(iter(artifact.run(sample).values()))
    )
    return torch.from_numpy(made)


def _runner(target: str) -> str:
    """What runs a target's artifacts on this machine."""
    if target != "cuda":
        return "ONNX Runtime"
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton's interpreter, no GPU here"
    return "reference operators on the CPU, no GPU here"


def _rows(output: torch.Tensor) -> torch.Tensor:
    return output.reshape(-1, output.shape[-1]) if output.dim() > 1 else output.reshape(-1, 1)


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(_rows(logits).float(), dim=-1)


def _refusal(program: Program, recipe: Recipe, target: Target) -> str:
    """What pre-flight has against a target, in one line; empty if nothing."""
    findings = preflight(program, recipe, target).findings
    if not findings:
        return ""
    more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
    return f"{findings[0]}{more}"


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


# --- What is compared on ---------------------------------------------------------------------


def _samples(
    program: Program,
    tokenizer: Tokenizer | None,
    example_inputs: Any,
    text: str | os.PathLike[str] | None,
    window: int,
    max_tokens: int,
) -> list[Sample]:
    if program.signature.has(Role.INPUT_IDS) and program.signature.has(Role.LOGITS):
        tokens = _tokens(program, tokenizer, text, max_tokens)
        return [{"input_ids": row[None]} for row in windows(tokens, window, max_tokens)]
    if example_inputs is None:
        raise DataError(
            f"'{program.provenance.name}' is no language model: nothing to compare it on",
            remedy="pass example_inputs",
        )
    names = [port.name for port in program.signature.inputs]
    bound = _bind(program, example_inputs)
    return [{name: value.numpy() for name, value in zip(names, bound, strict=True)}]


def _tokens(
    program: Program,
    tokenizer: Tokenizer | None,
    text: str | os.PathLike[str] | None,
    max_tokens: int,
) -> Sequence[int] | npt.NDArray[np.int64]:
    if tokenizer is not None:
        return tokenize(tokenizer, load_text(text))
    if text is not None:
        raise DataError(
            f"'{program.provenance.name}' has no tokenizer to read '{text}' with",
            remedy="leave the text out: tokens are drawn at random then",
        )
    logits = next(
        node
        for node, port in zip(program.results, program.signature.outputs, strict=True)
        if port.role is Role.LOGITS
    )
    vocabulary = int(logits.meta["val"].shape[-1])
    return np.random.default_rng(0).integers(0, vocabulary, max_tokens)


def _bind(program: Program, example_inputs: Any) -> list[torch.Tensor]:
    """One tensor per input, from what a module was traced with."""
    if isinstance(example_inputs, Mapping):
        return program.bind(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return program.bind(*example_inputs)
    return program.bind(example_inputs)
