"""The way through the house: a model goes in, an artifact comes out."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

import qcompile
from qcompile.artifact import Artifact, load
from qcompile.atomic_directory import refuse_to_destroy, write_artifact_directory
from qcompile.backends.base import Target
from qcompile.backends.registry import get_target
from qcompile.calibration.journal import Journal, default_directory
from qcompile.calibration.settings import Calibration, parse_bytes
from qcompile.calibration.sources import DataSource
from qcompile.errors import ArtifactError, DataError, ModelError
from qcompile.frontends.huggingface import capture_model
from qcompile.frontends.open import capture_path
from qcompile.frontends.torch_export import capture_module
from qcompile.ir.program import Program
from qcompile.legality import preflight
from qcompile.manifest import is_artifact
from qcompile.packaging import generation_info, write_package
from qcompile.passes.equivalence import CheckLevel, checks_for
from qcompile.passes.infra import Context, PassManager, Phase
from qcompile.passes.quantize.bits import count_bits
from qcompile.pipeline import front_phases, recipe_phases
from qcompile.progress import NullProgress, Progress
from qcompile.recipe import DEFAULT_RECIPE, Recipe, load_recipe
from qcompile.report import CompileReport
from qcompile.text import TOKENIZER_NAME, Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qcompile.evaluation.evaluate import Evaluation

Model = str | os.PathLike[str] | torch.nn.Module | Program
"""A model directory, a hub id, a ``.gguf`` file, a module in memory, or a captured program."""


def compile(
    model: Model,
    recipe: str | Path | Mapping[str, object] | Recipe = DEFAULT_RECIPE,
    target: str | Target = "cpu",
    output: str | os.PathLike[str] | None = None,
    *,
    example_inputs: Any = None,
    overrides: Mapping[str, object] | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    dequantize: bool = False,
    calibration: Any = None,
    calibration_samples: int = 128,
    calibration_length: int = 512,
    memory_limit: int | str | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    check: CheckLevel = "full",
    progress: Progress | None = None,
) -> Artifact:
    """Compiles a model into an artifact that runs on a target.

    Args:
        model: What to compile.
        recipe: How: a name (`qcompile recipes` lists them), a YAML file, a mapping or a `Recipe`.
        target: What for: a target, or its name and options, such as ``"onnx:opset=23"``.
        output: Directory to write; by default ``<model>-<recipe>-<target>`` here.
        example_inputs: For a plain module, inputs to trace it with.
        overrides: Options to set on top of the recipe, ``{"quantize_weights.format": "int8"}``.
        overwrite: Whether an artifact that stands at `output` may be replaced.
        threads: Threads to compile and to run with; all physical cores by default.
        dequantize: Whether an already quantized checkpoint may be read as floats.
        calibration: What steps that look at activations run the model on: the path of a text
            file, texts, token ids, a dataset, ``"self"`` for text that the model writes, or for
            models that read no tokens a list of inputs. By default the text that every Python
            carries, or `example_inputs`.
        calibration_samples: Windows of text to use, at most.
        calibration_length: Tokens per window.
        memory_limit: Bytes of this process, or such as ``"2GiB"``, past which activations go to
            files; results are the same.
        work_dir: Where finished calibration work is kept and found again; by default in the
            user's cache directory.
        seed: For everything random.
        check: How the equivalence of passes is checked: ``"full"`` proves each pass where it
            changed something and compares whole programs before and after phases, in float64;
            ``"local"`` only proves passes; ``"off"`` checks structure only.
        progress: Told what is going on.

    Returns:
        The artifact, loaded.

    Raises:
        QCompileError: Anything that the user can mend; nothing is left at `output` then, and what
            stood there is still whole.
    """
    resolved = load_recipe(recipe, overrides)
    backend = get_target(target) if isinstance(target, str) else target
    if output is not None:
        refuse_to_destroy(Path(output), overwrite)
    progress = progress or NullProgress()
    source = DataSource(
        calibration,
        samples=calibration_samples,
        length=calibration_length,
        seed=seed,
        examples=example_inputs,
    )
    source.check()
    settings = Calibration(
        source,
        memory_limit=None if memory_limit is None else parse_bytes(memory_limit),
        journal=Journal(default_directory() if work_dir is None else Path(work_dir)),
    )
    context = Context(progress, seed, settings, checks=checks_for(check))
    report = CompileReport(phases=context.phases)
    with _threads(threads), contextlib.ExitStack() as stack:
        stack.callback(progress.done)
        with _phase(report, progress, "capture"):
            program = open_model(model, example_inputs, dequantize)
        generation_info(program.provenance)  # what is wrong with it is said before the work
        tokenizer = tokenizer_of(program)
        if tokenizer is not None:
            source.tokenize = partial(tokenizer.encode, add_special_tokens=False)
        destination = _destination(output, program, resolved, backend)
        refuse_to_destroy(destination, overwrite)
        program = _run(front_phases(), program, context, report)
        preflight(program, resolved, backend).refuse()
        program = _run(recipe_phases(resolved), program, context, report)
        write_artifact(program, resolved, backend, destination, context, report, overwrite)
    return load(destination, threads=threads)


def write_artifact(
    program: Program,
    recipe: Recipe,
    target: Target,
    destination: Path,
    context: Context,
    report: CompileReport,
    overwrite: bool = False,
) -> None:
    """Lowers a program that a recipe has gone through, and writes it as an artifact.

    Args:
        program: It is not changed.
        recipe: What it has gone through.
        target: What to lower it to.
        destination: Directory of the artifact.
        context: Progress, and the checks that passes undergo.
        report: Gets the times and what the target notes.
        overwrite: Whether an artifact that stands at `destination` may be replaced.

    Raises:
        QCompileError: It cannot be lowered or written; nothing is left at `destination` then.
    """
    bits = count_bits(program)
    with _phase(report, context.progress, "lower"):
        lowered = target.lower(program, context)
    needed = bits.bytes + sum(map(len, program.provenance.assets.values()))
    with write_artifact_directory(destination, overwrite, bytes_needed=needed) as directory:
        with _phase(report, context.progress, "pack"):
            packed = target.pack(lowered, directory, context.progress)
        report.notes = (*program.notes, *packed.notes)
        write_package(
            directory,
            program,
            target=target,
            recipe=recipe,
            packed=packed,
            bits=bits,
            report=report,
            version=qcompile.__version__,
        )


def capture(model: Model, example_inputs: Any = None, *, dequantize: bool = False) -> Program:
    """Captures a model as a program in canonical, raised form.

    Args:
        model: A model directory, a hub id, a ``.gguf`` file, or a module in memory.
        example_inputs: For a plain module, inputs to trace it with: a tensor, a tuple or a dict.
        dequantize: Whether an already quantized checkpoint may be read as floats.

    Returns:
        A program; calling it interprets it and returns what the model returns, logits first.

    Raises:
        ModelError: If the model cannot be read or traced.
    """
    program = open_model(model, example_inputs, dequantize)
    return PassManager(front_phases()).run(program)[0]


def evaluate(
    model: object,
    text: str | os.PathLike[str] | None = None,
    *,
    reference: object | None = None,
    tokenizer: object | None = None,
    window: int = 512,
    max_tokens: int = 16384,
    batch_size: int = 4,
    dequantize: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity of a model on a text, and its divergence from a reference.

    Args:
        model: An artifact or its directory, anything that `capture` takes, or a module.
        text: Path of a UTF-8 file; the standard library's help text by default.
        reference: The same kinds as `model`; usually the float model.
        tokenizer: By default that of `model`, or else of `reference`.
        window: Tokens per window; windows are predicted independently.
        max_tokens: Use no more of the text than this.
        batch_size: Windows per forward pass.
        dequantize: Whether an already quantized checkpoint may be read as floats.
        progress: Told of each window.

    Raises:
        QCompileError: If a model or the text cannot be used.
    """
    from qcompile.evaluation.evaluate import evaluate as measure

    loaded, own = _evaluable(model, dequantize)
    compared, other = (None, None) if reference is None else _evaluable(reference, dequantize)
    return measure(
        loaded,
        text,
        tokenizer=tokenizer or own or other,
        reference=compared,
        window=window,
        max_tokens=max_tokens,
        batch_size=batch_size,
        progress=progress,
    )


def open_model(model: Model, example_inputs: Any, dequantize: bool) -> Program:
    """A program as captured, before any pass.

    Args:
        model: As for `capture`; a program is returned as it is.
        example_inputs: For a plain module, inputs to trace it with.
        dequantize: Whether an already quantized checkpoint may be read as floats.

    Raises:
        ModelError: If the model cannot be read or traced.
    """
    if isinstance(model, Program):
        return model
    if isinstance(model, (str, os.PathLike)):
        if is_artifact(Path(model)):
            raise ModelError(
                f"'{os.fspath(model)}' is an artifact: it is compiled already",
                remedy="pass the model that it was compiled from",
            )
        return capture_path(model, dequantize=dequantize)
    if not isinstance(model, torch.nn.Module):
        raise ModelError(
            f"a {type(model).__name__} is not a model",
            remedy="pass a directory, a hub id, a .gguf file or a torch.nn.Module",
        )
    if example_inputs is not None:
        return capture_module(model, example_inputs)
    if _is_transformers_model(model):
        return capture_model(cast("PreTrainedModel", model))
    raise ModelError(
        f"{type(model).__name__} is a plain module: it takes example inputs to trace it",
        remedy="pass example_inputs=(tensor, ...)",
    )


def _is_transformers_model(model: object) -> bool:
    return any(c.__name__ == "PreTrainedModel" for c in type(model).__mro__)


def _evaluable(model: object, dequantize: bool) -> tuple[object, object | None]:
    """Something that evaluation can run, and its tokenizer if it comes with one."""
    if isinstance(model, (str, os.PathLike)):
        path = Path(model)
        if path.is_dir() and is_artifact(path):
            model = load(path)
        else:
            model = capture(os.fspath(model), dequantize=dequantize)
    if isinstance(model, Program):
        return model, tokenizer_of(model)
    return model, getattr(model, "tokenizer", None)


def tokenizer_of(program: Program) -> Tokenizer | None:
    """The tokenizer that came with a model, or None.

    Raises:
        ModelError: If it is damaged.
    """
    assets = program.provenance.assets
    if TOKENIZER_NAME not in assets:
        return None
    with _written_aside(assets) as folder:
        try:
            return Tokenizer.load(folder)
        except ArtifactError as error:
            reason = error.message.replace(f"{folder}{os.sep}", "")
            raise ModelError(
                f"the tokenizer of '{program.provenance.source}' cannot be used: {reason}",
                remedy="fetch the model again, or upgrade the package 'tokenizers'",
            ) from error


@contextlib.contextmanager
def _written_aside(files: Mapping[str, bytes]) -> Iterator[Path]:
    """A directory of some files, for a while.

    Raises:
        ArtifactError: The system's temporary directory cannot hold them.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            for name, content in files.items():
                (folder / name).write_bytes(content)
        except OSError as error:
            place, reason = error.filename or "the temporary directory", error.strerror or error
            raise ArtifactError(
                f"'{place}' cannot be written: {reason}",
                remedy="free space in the system's temporary directory, or set TMPDIR to another "
                "one",
            ) from error
        yield folder


def _destination(
    output: str | os.PathLike[str] | None, program: Program, recipe: Recipe, target: Target
) -> Path:
    if output is not None:
        return Path(output)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", program.provenance.name).strip("-") or "model"
    return Path(f"{stem}-{recipe.name}-{target.name}")


def _run(
    phases: tuple[Phase, ...], program: Program, context: Context, report: CompileReport
) -> Program:
    done = len(context.phases)
    program, _ = PassManager(phases).run(program, context)
    for phase in context.phases[done:]:
        report.seconds[phase.name] = report.seconds.get(phase.name, 0.0) + phase.seconds
    return program


@contextlib.contextmanager
def _phase(report: CompileReport, progress: Progress, name: str) -> Iterator[None]:
    progress.stage(name)
    started = time.perf_counter()
    yield
    report.seconds[name] = report.seconds.get(name, 0.0) + time.perf_counter() - started


@contextlib.contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    if threads is not None and threads < 1:
        raise DataError(f"threads is {threads}", remedy="use 1 or more")
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
