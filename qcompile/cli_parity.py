"""The command ``qcompile parity``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcompile.cli_options import (
    CalibrationOption,
    DequantizeFlag,
    JsonFlag,
    LengthOption,
    ModelArgument,
    QuietFlag,
    RecipeOption,
    SamplesOption,
    SettingsOption,
    ThreadsOption,
)
from qcompile.recipe import DEFAULT_RECIPE, parse_setting

if TYPE_CHECKING:
    from qcompile.evaluation.parity import Parity, TargetParity
    from qcompile.tables import Table


def register(app: typer.Typer) -> None:
    """Adds the command to a command line."""
    app.command(
        "parity",
        epilog="Example: qcompile parity SmolLM2-135M-Instruct.Q4_1.gguf -r w4a8-rtn -t cpu,onnx",
    )(parity_command)


def parity_command(
    model: ModelArgument,
    recipe: RecipeOption = DEFAULT_RECIPE,
    targets: Annotated[
        str,
        typer.Option("--targets", "-t", help="Targets with their options, separated by commas."),
    ] = "cpu,onnx,cuda",
    settings: SettingsOption = None,
    text: Annotated[
        Path | None, typer.Option("--text", help="Text file; default: English that Python has.")
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=2, help="The most tokens to compare on.")] = 256,
    dequantize: DequantizeFlag = False,
    calibration: CalibrationOption = None,
    samples: SamplesOption = 128,
    length: LengthOption = 512,
    threads: ThreadsOption = None,
    json_: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Compare what each target computes with the one program that all are lowered from.

    A target that refuses the recipe, or cannot run here, says why in its row.
    """
    overrides = dict(parse_setting(setting) for setting in settings or [])
    from qcompile import console
    from qcompile.evaluation.parity import parity

    with console.show_progress(quiet=quiet) as progress:
        result = parity(
            model,
            recipe,
            [target.strip() for target in targets.split(",")],
            overrides=overrides,
            text=text,
            window=window,
            max_tokens=max_tokens,
            dequantize=dequantize,
            calibration=calibration,
            calibration_samples=samples,
            calibration_length=length,
            threads=threads,
            progress=progress,
        )
    if json_:
        console.print_json(result.to_dict())
        return
    from qcompile.tables import print_tables

    print_tables([parity_table(result)])


def parity_table(result: Parity) -> Table:
    """The targets side by side; those without figures say why below each other."""
    from qcompile.tables import Table

    rows = [*result.targets, *([] if result.noise is None else [result.noise])]
    return Table(
        f"{result.model}, {result.recipe}: {result.positions:,} positions against the program",
        ("target", "max error", "mean error", "KL, nats", "top-1", "size", "run by"),
        tuple(tuple(_cells(target)) for target in rows),
        right=frozenset({1, 2, 3, 4, 5}),
    )


def _cells(target: TargetParity) -> Iterator[str]:
    from qcompile.console import size_text

    yield target.target
    yield from (_figure(x) for x in (target.max_error, target.mean_error, target.kl))
    yield "-" if target.top1_agreement is None else f"{target.top1_agreement:.2%}"
    yield "-" if target.bytes is None else size_text(target.bytes)
    yield target.run_by or target.reason


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"
