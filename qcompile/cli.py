"""The command line: ``qcompile compile``, ``run``, ``inspect``, ``check``, ``parity``, ``eval`` and
``recipes``.

Commands parse their arguments, call the public function of the same name and print what it
returns. torch is imported inside commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcompile import cli_inspect, cli_parity
from qcompile.cli_options import (
    CalibrationOption,
    CheckOption,
    DequantizeFlag,
    JsonFlag,
    LengthOption,
    ModelArgument,
    QuietFlag,
    RecipeOption,
    SamplesOption,
    SettingsOption,
    TargetBitsOption,
    TargetOption,
    TargetSizeOption,
    ThreadsOption,
)
from qcompile.errors import QCompileError, RecipeError
from qcompile.recipe import (
    DEFAULT_RECIPE,
    load_recipe,
    parse_setting,
    recipe_descriptions,
    recipe_names,
)

if TYPE_CHECKING:
    from qcompile.artifact import Artifact
    from qcompile.generation import GenerationKwargs

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 + SIGINT."""

BROKEN_PIPE = 141
"""Exit code when the reader of stdout has gone: 128 + SIGPIPE."""

app = typer.Typer(
    name="qcompile",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; default: those of this process.

    Returns:
        The exit code: 0, that of the `QCompileError`, 2 for wrong usage, 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        from qcompile import console

        console.prepare_streams()
        code = app(args=arguments, prog_name="qcompile", standalone_mode=False)
        sys.stdout.flush()
    except QCompileError as error:
        if os.environ.get("QCOMPILE_TRACEBACK") == "1":
            raise
        return _fail(arguments, type(error).__name__, error.message, error.remedy, error.exit_code)
    except typer.TyperException as error:
        return _fail(arguments, "UsageError", *_usage_message(error), exit_code=2)
    except BrokenPipeError:
        console.discard_stdout()
        return BROKEN_PIPE
    except SystemExit as stop:
        if not isinstance(stop.__context__, BrokenPipeError):  # typer exits on one by itself
            raise
        console.discard_stdout()
        return BROKEN_PIPE
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except (OSError, MemoryError) as error:  # of the machine, not of qcompile
        return _fail(arguments, type(error).__name__, str(error) or "out of memory", None, 1)
    if code == INTERRUPTED:
        return _fail(arguments, "Interrupted", "interrupted", None, INTERRUPTED)
    return int(code or 0)


def _print_version(wanted: bool) -> None:
    if wanted:
        import qcompile

        print(f"qcompile {qcompile.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Print and exit."),
    ] = False,
) -> None:
    """Compile a float model into a deployable low-bit one."""


@app.command(
    "compile",
    epilog="Example: qcompile compile HuggingFaceTB/SmolLM2-135M-Instruct -o smollm2/ "
    "--set quantize_weights.format=int4-g64",
)
def compile_command(
    model: ModelArgument,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Directory to write; default: MODEL-RECIPE-TARGET here."
        ),
    ] = None,
    recipe: RecipeOption = DEFAULT_RECIPE,
    target: TargetOption = "cpu",
    settings: SettingsOption = None,
    target_bits: TargetBitsOption = None,
    target_size: TargetSizeOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an artifact that stands there.")
    ] = False,
    dequantize: DequantizeFlag = False,
    calibration: CalibrationOption = None,
    samples: SamplesOption = 128,
    length: LengthOption = 512,
    memory_limit: Annotated[
        str | None,
        typer.Option(help="Memory, such as 2GiB, past which activations go to files."),
    ] = None,
    work_dir: Annotated[
        Path | None,
        typer.Option(help="Where finished calibration work is kept; default: the user's cache."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="For everything random.")] = 0,
    check: CheckOption = "full",
    threads: ThreadsOption = None,
    json_: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Compile MODEL into an artifact: quantized, lowered to a target, ready to run."""
    overrides = dict(parse_setting(setting) for setting in settings or [])
    budget = {"target_bits": target_bits, "target_size": target_size}
    given = {key: value for key, value in budget.items() if value is not None}
    overrides |= {f"quantize_weights.{key}": value for key, value in given.items()}
    from qcompile import compiler, console

    with console.show_progress(quiet=quiet) as progress:
        artifact = compiler.compile(
            model,
            recipe=recipe,
            target=target,
            output=output,
            overrides=overrides,
            overwrite=overwrite,
            threads=threads,
            dequantize=dequantize,
            calibration=calibration,
            calibration_samples=samples,
            calibration_length=length,
            memory_limit=memory_limit,
            work_dir=work_dir,
            seed=seed,
            check=check,
            progress=progress,
        )
    if json_:
        console.print_json(_compile_document(artifact))
    else:
        for note in [] if quiet else artifact.report.get("notes", []):
            console.print_note(str(note))
        console.print_pairs(list(_compile_rows(artifact)), title=f"compiled to {artifact.path}")


@app.command(epilog="Example: qcompile run smollm2/ 'The capital of France is' --raw")
def run(
    artifact: Annotated[Path, typer.Argument(help="Directory that 'qcompile compile' wrote.")],
    prompt: Annotated[
        str | None,
        typer.Argument(help="Text to answer. None: read stdin, or chat on a terminal."),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Treat the prompt as a chat message, or continue it as it is. "
            "Default: chat where the model has a template.",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="The most tokens to add.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token; above, sampled.")
    ] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Sample among this many tokens only.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample among tokens that hold this probability.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes sampling repeatable.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; repeatable.")
    ] = None,
    threads: ThreadsOption = None,
    json_: JsonFlag = False,
) -> None:
    """Generate text with an artifact, printed as it comes."""
    from qcompile import console, conversation
    from qcompile.artifact import load

    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().rstrip("\n")
    if prompt is None and json_:
        raise RecipeError("--json needs a prompt", remedy="pass PROMPT, or pipe it in")
    if prompt == "":
        raise RecipeError("the prompt is empty", remedy="pass PROMPT, or pipe some text in")

    loaded = load(artifact, threads=threads)
    options: GenerationKwargs = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "stop": stop or (),
    }
    as_chat = loaded.tokenizer.has_chat_template if chat is None else chat
    if prompt is None:
        conversation.converse(loaded, options, as_chat=as_chat)
        return
    request: str | list[dict[str, str]] = prompt
    if as_chat:
        request = [{"role": "user", "content": prompt}]
    if json_:
        console.print_json(conversation.completion_document(loaded, request, options))
    else:
        conversation.print_stream(loaded.stream(request, **options))


cli_inspect.register(app)
cli_parity.register(app)


@app.command(
    "eval", epilog="Example: qcompile eval smollm2/ --reference SmolLM2-135M-Instruct.Q4_1.gguf"
)
def eval_command(
    model: Annotated[str, typer.Argument(help="A model or an artifact.")],
    text: Annotated[
        Path | None, typer.Option("--text", help="Text file; default: English that Python has.")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option("--reference", help="Model or artifact to measure divergence from."),
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    max_tokens: Annotated[int, typer.Option(min=2, help="The most tokens to score.")] = 16384,
    dequantize: DequantizeFlag = False,
    json_: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Measure perplexity on a text and, given a reference, KL divergence and top-1 agreement."""
    from qcompile import compiler, console

    with console.show_progress(quiet=quiet) as progress:
        evaluation = compiler.evaluate(
            model,
            text,
            reference=reference,
            window=window,
            max_tokens=max_tokens,
            dequantize=dequantize,
            progress=progress,
        )
    document = evaluation.to_dict()
    if json_:
        console.print_json(document)
    else:
        console.print_pairs(
            [(_label(k), _value(k, v)) for k, v in document.items() if v is not None]
        )


@app.command(epilog="Example: qcompile recipes w4a8-rtn > mine.yaml")
def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Recipe to print in full; a name or a YAML file.")
    ] = None,
    json_: JsonFlag = False,
) -> None:
    """List the recipes, or print one as YAML to start your own from."""
    from qcompile import console

    if name is not None:
        recipe = load_recipe(name)
        if json_:
            console.print_json(recipe.to_dict())
        else:
            sys.stdout.write(recipe.to_yaml())
        return
    if json_:
        console.print_json([load_recipe(known).to_dict() for known in recipe_names()])
    else:
        console.print_table(("recipe", "what it does"), list(recipe_descriptions().items()))


# --- What commands print ---------------------------------------------------------------------


def _compile_document(artifact: Artifact) -> dict[str, object]:
    manifest = artifact.manifest
    return {
        "artifact": str(artifact.path),
        "target": manifest.target,
        "model": manifest.model.model_dump(mode="json"),
        "recipe": manifest.recipe,
        "bits": manifest.bits,
        "bytes": sum(file.bytes for file in manifest.files.values()),
        "report": artifact.report,
    }


def _compile_rows(artifact: Artifact) -> Iterator[tuple[str, str]]:
    from qcompile.console import seconds_text, size_text

    manifest, report = artifact.manifest, artifact.report
    yield "model", manifest.model.name
    yield "recipe", str(manifest.recipe.get("name", "custom"))
    yield "target", manifest.target
    before = report.get("source_bytes")
    if isinstance(before, int):
        yield "size before", size_text(before)
    yield "size after", size_text(sum(file.bytes for file in manifest.files.values()))
    for key, label in _BITS.items():
        value = manifest.bits.get(key)
        if isinstance(value, (int, float)):
            yield label, f"{value:.3f}"
    seconds = report.get("seconds")
    for phase, duration in seconds.items() if isinstance(seconds, Mapping) else ():
        yield f"time: {_label(str(phase))}", seconds_text(float(duration))
    memory = report.get("peak_memory_bytes")
    if isinstance(memory, int):
        yield "peak memory", size_text(memory)
    yield "artifact", str(artifact.path)


_BITS = {
    "advertised_bits_per_weight": "bits per quantized weight, codes only",
    "stored_bits_per_quantized_weight": "bits per quantized weight, stored",
    "stored_bits_per_weight": "bits per weight of the model, stored",
}
"""The figures of the manifest's accounting that people compare, as they are printed."""


def _label(key: str) -> str:
    return key.replace("_", " ")


def _value(key: str, value: object) -> str:
    from qcompile import console

    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if key.endswith("seconds"):
        return console.seconds_text(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _fail(
    arguments: Sequence[str], kind: str, message: str, remedy: str | None, exit_code: int
) -> int:
    """Reports an error on stderr and, for commands with ``--json``, on stdout."""
    from qcompile import console

    # Not from the command's own parameters: wrong usage fails before they are known.
    end = arguments.index("--") if "--" in arguments else len(arguments)
    if "--json" in arguments[:end]:
        console.print_json(console.error_document(kind, message, remedy, exit_code))
    console.print_error(message, remedy)
    return exit_code


def _usage_message(error: typer.TyperException) -> tuple[str, str]:
    command = getattr(getattr(error, "ctx", None), "command_path", "qcompile")
    message = error.format_message().rstrip(".").replace("Value error, ", "")  # of pydantic
    return message, f"see '{command} --help'"
