"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
DequantizeFlag = Annotated[
    bool, typer.Option("--dequantize", help="Accept a quantized checkpoint: decode it first.")
]
ModelArgument = Annotated[
    str, typer.Argument(help="Hugging Face directory or hub id, or a .gguf file.")
]
RecipeOption = Annotated[
    str, typer.Option("--recipe", "-r", help="Name of a recipe, or a YAML file.")
]
TargetOption = Annotated[
    str,
    typer.Option("--target", "-t", help="What will run it; options as in onnx:opset=23:batch=1."),
]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="STEP.OPTION=VALUE", help="Set an option; repeatable."),
]
TargetBitsOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Stored bits per weight, such as 3.25: the format of each layer is chosen by how much "
        "it matters. Sets quantize_weights.target_bits.",
    ),
]
TargetSizeOption = Annotated[
    str | None,
    typer.Option(
        help="The same for the bytes of all weights, such as 80MiB. Sets "
        "quantize_weights.target_size.",
    ),
]
CheckOption = Annotated[
    Literal["full", "local", "off"],  # CHECK_LEVELS, without importing torch
    typer.Option(
        "--check",
        help="How passes are held to what they promise: each change and whole programs, each "
        "change only, or structure only.",
    ),
]
QuietFlag = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads to use; default: one per core.")
]
CalibrationOption = Annotated[
    str | None,
    typer.Option(
        help="Text file to calibrate on, or 'self': text that the model writes. "
        "Default: text that every Python carries."
    ),
]
SamplesOption = Annotated[int, typer.Option(min=1, help="Windows of calibration text.")]
LengthOption = Annotated[int, typer.Option(min=2, help="Tokens per window of calibration text.")]
