"""The commands ``qcompile inspect`` and ``qcompile check``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcompile.cli_options import (
    DequantizeFlag,
    JsonFlag,
    ModelArgument,
    RecipeOption,
    SettingsOption,
    TargetOption,
)
from qcompile.errors import DataError, RecipeError, TargetError
from qcompile.manifest import is_artifact
from qcompile.recipe import DEFAULT_RECIPE, parse_setting

if TYPE_CHECKING:
    from qcompile.analysis.cost import Sizes
    from qcompile.inspection_records import Inspection


def register(app: typer.Typer) -> None:
    """Adds the commands to a command line."""
    app.command(
        "inspect",
        epilog="Example: qcompile inspect SmolLM2-135M-Instruct.Q4_1.gguf --recipe w4a8-rtn --ops",
    )(inspect_command)
    app.command(
        "check", epilog="Example: qcompile check HuggingFaceTB/SmolLM2-135M-Instruct -r w8-rtn"
    )(check_command)


def inspect_command(
    model: Annotated[
        str, typer.Argument(help="A model as for compile, or the directory of an artifact.")
    ],
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "-r", help="Follow the model through this recipe as well."),
    ] = None,
    target: TargetOption = "cpu",
    settings: SettingsOption = None,
    phase: Annotated[
        str | None,
        typer.Option(help="Show this phase only; 'all' with --text or -o: every phase."),
    ] = None,
    ops: Annotated[bool, typer.Option("--ops", help="Show operators by phase.")] = False,
    text: Annotated[
        bool, typer.Option("--text", help="Show the program after --phase; default: the last.")
    ] = False,
    stages: Annotated[
        bool, typer.Option("--stages", help="Show memory and operations by stage.")
    ] = False,
    barriers: Annotated[
        bool, typer.Option("--barriers", help="Show what was not recognized, and why.")
    ] = False,
    sites: Annotated[
        bool,
        typer.Option("--sites", help="Show where transforms can go, and why not elsewhere."),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the program's text to <phase>.txt in here."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences side by side.")] = 1,
    query: Annotated[
        int | None, typer.Option(min=1, help="New positions; default: 512, and 1 after 512.")
    ] = None,
    past: Annotated[int | None, typer.Option(min=0, help="Positions in the cache.")] = None,
    dequantize: DequantizeFlag = False,
    json_: JsonFlag = False,
) -> None:
    """Show what stands in MODEL, phase by phase; weights are not read."""
    asked = {"ops": ops, "stages": stages, "barriers": barriers, "sites": sites}
    sections = [name for name, wanted in asked.items() if wanted]
    if is_artifact(Path(model)):
        if sections or text or phase or recipe or output:
            raise DataError(
                f"'{model}' is an artifact: it has no phases and no stages any more",
                remedy="inspect the model that it was compiled from",
            )
        _print_artifact(Path(model), as_json=json_)
        return
    overrides = _overrides(settings, recipe)
    from qcompile.inspection import inspect, phase_names
    from qcompile.inspection_records import Inspection
    from qcompile.recipe import load_recipe

    resolved = None if recipe is None else load_recipe(recipe, overrides)
    wants_text = text or output is not None
    last = phase_names(resolved)[-1]
    inspection = inspect(
        model,
        resolved,
        target,
        workloads=_workloads(batch, query, past),
        texts=(phase or last,) if wants_text or phase else (),
        dequantize=dequantize,
        sites=sites,
    )
    assert isinstance(inspection, Inspection)
    if output is not None:
        _write_texts(inspection, output)
    _show(inspection, sections, phase, text=text, as_json=json_, written=output is not None)


def check_command(
    model: ModelArgument,
    recipe: RecipeOption = DEFAULT_RECIPE,
    target: TargetOption = "cpu",
    settings: SettingsOption = None,
    dequantize: DequantizeFlag = False,
    json_: JsonFlag = False,
) -> None:
    """Tell whether TARGET can run what RECIPE makes of MODEL, and what compiling it will take.

    Exit code 0 if it can, 4 if not. Nothing is computed.
    """
    overrides = _overrides(settings, recipe)
    from qcompile import compiler
    from qcompile.backends.registry import get_target
    from qcompile.legality import preflight
    from qcompile.recipe import load_recipe

    resolved, backend = load_recipe(recipe, overrides), get_target(target)
    verdict = preflight(compiler.capture(model, dequantize=dequantize), resolved, backend)
    if json_:
        from qcompile import console

        console.print_json(verdict.to_dict())
    else:
        from qcompile.inspection_tables import preflight_tables
        from qcompile.tables import print_tables

        print_tables(preflight_tables(verdict))
    if not verdict.legal:
        raise typer.Exit(TargetError.exit_code)


def _overrides(settings: list[str] | None, recipe: str | None) -> dict[str, object]:
    if settings and recipe is None:
        raise RecipeError("--set needs a recipe to set options of", remedy="pass --recipe as well")
    return dict(parse_setting(setting) for setting in settings or [])


def _workloads(batch: int, query: int | None, past: int | None) -> dict[str, Sizes] | None:
    """The sizes that were asked for; None leaves the choice to the model."""
    from qcompile.analysis.cost import Sizes

    if query is None and past is None and batch == 1:
        return None
    if query is None and past is None:
        return {"prefill": Sizes(batch, 512, 0), "decode": Sizes(batch, 1, 512)}
    return {"run": Sizes(batch, 1 if query is None else query, past or 0)}


def _show(
    inspection: Inspection,
    sections: list[str],
    phase: str | None,
    *,
    text: bool,
    as_json: bool,
    written: bool,
) -> None:
    from qcompile import console
    from qcompile.inspection_tables import SECTIONS, inspection_tables
    from qcompile.tables import print_tables

    if as_json:
        console.print_json(inspection.to_dict())
        return
    if text:
        shown = [item for item in inspection.phases if item.text is not None]
        for item in shown:
            print(f"# after {item.name}\n{item.text}" if len(shown) > 1 else item.text, end="")
    if sections or not (text or written):
        phases = () if phase in (None, "all") else (str(phase),)
        print_tables(inspection_tables(inspection, sections or SECTIONS, phases))


def _write_texts(inspection: Inspection, directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for phase in inspection.phases:
            if phase.text is not None:
                (directory / f"{phase.name}.txt").write_text(phase.text, encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"cannot write to '{directory}': {error.strerror or error}",
            remedy="choose another directory with --output",
        ) from error


def _print_artifact(path: Path, *, as_json: bool) -> None:
    from qcompile import console
    from qcompile.artifact_inspection import ArtifactInspection
    from qcompile.inspection_tables import artifact_tables
    from qcompile.tables import print_tables

    inspection = ArtifactInspection.read(path)
    if as_json:
        console.print_json(inspection.to_dict())
    else:
        print_tables(artifact_tables(inspection))
