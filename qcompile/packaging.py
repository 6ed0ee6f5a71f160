"""The files of an artifact beside its graph: tokenizer, generation settings, manifest, report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qcompile.backends.base import Packed, Target
from qcompile.errors import ModelError
from qcompile.ir.program import Program
from qcompile.ir.types import Provenance
from qcompile.manifest import (
    REPORT_NAME,
    GenerationInfo,
    Manifest,
    ModelInfo,
    describe_files,
    write_manifest,
)
from qcompile.passes.quantize.bits import BitsReport
from qcompile.recipe import Recipe
from qcompile.report import CompileReport


def write_package(
    directory: Path,
    program: Program,
    *,
    target: Target,
    recipe: Recipe,
    packed: Packed,
    bits: BitsReport,
    report: CompileReport,
    version: str,
) -> None:
    """Completes an artifact whose graph and weights are written.

    Args:
        directory: Where they are.
        program: The program before lowering.
        target: What it was compiled for.
        recipe: How.
        packed: What the target says of the files it wrote.
        bits: The accounting of the program.
        report: How the compilation went; goes into a file that is not hashed.
        version: Of qcompile.
    """
    provenance = program.provenance
    for name, content in provenance.assets.items():
        (directory / name).write_bytes(content)
    document = {
        **report.to_dict(),
        "source_bytes": provenance.stored_bytes,
        "tensors": bits.to_dict()["tensors"],
    }
    (directory / REPORT_NAME).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    manifest = Manifest(
        qcompile_version=version,
        target=target.name,
        kernel_layout_version=packed.kernel_layout_version,
        task="causal_lm" if program.signature.is_causal_lm else "module",
        model=ModelInfo(
            name=provenance.name,
            architecture=provenance.architecture,
            source=provenance.source,
            fingerprint=provenance.fingerprint,
        ),
        recipe=recipe.model_dump(mode="json"),
        signature=packed.signature,
        generation=generation_info(provenance),
        bits=_bits(bits, packed),
        files=describe_files(directory),
    )
    write_manifest(directory, manifest)


def generation_info(provenance: Provenance) -> GenerationInfo:
    """Special tokens and the longest context, from the model's generation settings or its config.

    Raises:
        ModelError: If the settings are not valid JSON, or hold something else than token ids.
    """
    settings = _generation_settings(provenance)
    config = provenance.config

    def setting(name: str) -> Any:
        value = settings.get(name)
        return config.get(name) if value is None else value

    pad = setting("pad_token_id")
    try:
        return GenerationInfo(
            eos_token_ids=_ids(setting("eos_token_id")),
            bos_token_id=setting("bos_token_id"),
            pad_token_id=None if isinstance(pad, int) and pad < 0 else pad,
            max_context=config.get("max_position_embeddings"),
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ModelError(
            f"the generation settings of '{provenance.source}' cannot be used: "
            f"{first['loc'][0]}: {first['msg']}",
            remedy="mend generation_config.json or config.json, or fetch the model again",
        ) from error


def _ids(value: Any) -> tuple[Any, ...]:
    """One token id or several, as either file may have them."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, Sequence) else (value,)


def _generation_settings(provenance: Provenance) -> Mapping[str, Any]:
    content = provenance.assets.get("generation_config.json")
    if content is None:
        return {}
    try:
        settings = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"generation_config.json of '{provenance.source}' is not valid JSON: {error}"
        ) from error
    return settings if isinstance(settings, dict) else {}


def _bits(bits: BitsReport, packed: Packed) -> dict[str, Any]:
    """The accounting of the program, and what the target's files really take."""
    figures = {key: value for key, value in bits.to_dict().items() if key != "tensors"}
    packed_bytes = sum(packed.tensor_bytes.values())
    figures["packed_bytes"] = packed_bytes
    figures["packed_bits_per_weight"] = 8 * packed_bytes / max(figures["weights"], 1)
    return figures
