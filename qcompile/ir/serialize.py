"""Saved programs: ``program.json`` and ``weights.safetensors``.

The JSON document is our own, versioned, and holds data only: operators are named from an allow
list (`qcompile.ir.operators`), symbolic sizes are expressions over declared symbols
(`qcompile.ir.size_text`), nodes are as `qcompile.ir.graph_json` says. Reading never trusts it.
Weights are stored materialized, a float possibly narrower than the program sees it.

The containers of a plain module's arguments are kept as tuples, lists and dicts; other kinds become
the one of these that they resemble.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch.utils._pytree as pytree
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from qcompile.errors import ArtifactError, TargetError
from qcompile.ir.graph_json import DTYPES, GraphReader, GraphWriter, JsonNode
from qcompile.ir.program import Program
from qcompile.ir.tensor_file import TensorFile, is_stored_as, predict_size, write_tensors
from qcompile.ir.types import Fact, Port, Provenance, Role, Signature
from qcompile.ir.verify import MalformedProgramError
from qcompile.ir.weights import Source, TensorSpec, WeightStore
from qcompile.progress import NullProgress, Progress

SCHEMA_VERSION = 1
"""Raised by every change that an older reader would misunderstand."""

PROGRAM_NAME = "program.json"
WEIGHTS_NAME = "weights.safetensors"
ASSETS_NAME = "assets"

_MAX_PROGRAM_BYTES = 256 << 20
_DAMAGED = "copy or compile the artifact again"


def save_program(
    program: Program, directory: Path, *, progress: Progress | None = None
) -> dict[str, int]:
    """Writes a program with its weights.

    Args:
        program: What to write.
        directory: Exists.
        progress: Told of the weights written.

    Returns:
        Bytes stored for each weight.

    Raises:
        TargetError: Names a node that has no saved form.
    """
    progress = progress or NullProgress()
    text = _document(program)
    (directory / PROGRAM_NAME).write_text(text, encoding="utf-8")
    for name, content in program.provenance.assets.items():
        path = directory / ASSETS_NAME / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    progress.stage("write weights", len(program.weights))
    return write_tensors(
        program.weights,
        directory / WEIGHTS_NAME,
        advance=lambda name: progress.advance(1, name),
    )


def predict_program_files(program: Program) -> dict[str, int]:
    """Bytes of the files that `save_program` would write, assets aside; no weight is read."""
    return {
        PROGRAM_NAME: len(_document(program).encode()),
        WEIGHTS_NAME: predict_size(program.weights),
    }


def load_program(directory: Path) -> Program:
    """Reads a program that `save_program` wrote; weights are read when they are needed.

    Operators of a backend must be registered, by importing the backend, before.

    Args:
        directory: Where it is.

    Raises:
        ArtifactError: If a file is missing or damaged, or holds what no saved program may hold.
    """
    path = directory / PROGRAM_NAME
    document = _read_document(path)
    weights = _open_weights(directory / WEIGHTS_NAME, document.weights)
    reader = GraphReader(document.symbols, weights)
    try:
        for node in document.nodes:
            reader.read(node)
        program = Program(
            graph=reader.finish(document.results),
            weights=weights,
            signature=document.signature.restore(),
            facts=frozenset(document.facts),
            provenance=document.provenance.restore(directory / ASSETS_NAME),
            notes=tuple(document.notes),
        )
        program.verify()
    except RecursionError as error:
        raise ArtifactError(f"{path} is nested too deeply", remedy=_DAMAGED) from error
    except MalformedProgramError as error:
        raise ArtifactError(f"{path} is damaged: {error.message}", remedy=_DAMAGED) from error
    return program


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _PortDocument(_Strict):
    name: str
    role: Role
    layer: int | None = Field(default=None, ge=0)


class _SignatureDocument(_Strict):
    inputs: list[_PortDocument]
    outputs: list[_PortDocument]
    input_tree: JsonValue = None
    output_tree: JsonValue = None

    @staticmethod
    def of(signature: Signature) -> _SignatureDocument:
        inputs, outputs = (
            [_PortDocument(name=p.name, role=p.role, layer=p.layer) for p in ports]
            for ports in (signature.inputs, signature.outputs)
        )
        trees = (signature.input_tree, signature.output_tree)
        input_tree, output_tree = (None if t is None else _write_tree(t) for t in trees)
        return _SignatureDocument(
            inputs=inputs, outputs=outputs, input_tree=input_tree, output_tree=output_tree
        )

    def restore(self) -> Signature:
        inputs, outputs = (
            tuple(Port(p.name, p.role, p.layer) for p in ports)
            for ports in (self.inputs, self.outputs)
        )
        trees = (self.input_tree, self.output_tree)
        input_tree, output_tree = (
            None if t is None else pytree.tree_structure(_read_tree(t)) for t in trees
        )
        return Signature(inputs, outputs, input_tree, output_tree)


class _ProvenanceDocument(_Strict):
    name: str
    source: str
    architecture: str
    fingerprint: str
    stored_bytes: int = Field(ge=0)
    config: dict[str, JsonValue]
    assets: list[str]

    @staticmethod
    def of(provenance: Provenance) -> _ProvenanceDocument:
        # What JSON cannot hold (dtypes, infinity) is of no use to a tokenizer.
        text = json.dumps(dict(provenance.config), default=str)
        config = json.loads(text, parse_constant=str)
        return _ProvenanceDocument(
            name=provenance.name,
            source=provenance.source,
            architecture=provenance.architecture,
            fingerprint=provenance.fingerprint,
            stored_bytes=provenance.stored_bytes,
            config=config,
            assets=list(provenance.assets),
        )

    def restore(self, folder: Path) -> Provenance:
        return Provenance(
            name=self.name,
            source=self.source,
            architecture=self.architecture,
            fingerprint=self.fingerprint,
            stored_bytes=self.stored_bytes,
            config=self.config,
            assets={name: _read_asset(folder, name) for name in self.assets},
        )


class _WeightDocument(_Strict):
    dtype: str
    shape: list[int]


class _Document(_Strict):
    format: Literal["qcompile-program"]
    schema_version: int
    facts: list[Fact]
    notes: list[str]
    provenance: _ProvenanceDocument
    signature: _SignatureDocument
    symbols: dict[str, int | None]
    weights: dict[str, _WeightDocument]
    nodes: list[JsonNode]
    results: list[int]


def _document(program: Program) -> str:
    """The text of ``program.json``: one line per node and weight."""
    writer = GraphWriter(program.graph)
    nodes = [writer.write(node) for node in program.graph.nodes if node.op != "output"]
    head = {
        "format": "qcompile-program",
        "schema_version": SCHEMA_VERSION,
        "facts": sorted(fact.value for fact in program.facts),
        "notes": list(program.notes),
        "provenance": _ProvenanceDocument.of(program.provenance).model_dump(mode="json"),
        "signature": _SignatureDocument.of(program.signature).model_dump(mode="json"),
        "symbols": writer.sizes.hints,
    }
    lines = [f'"{key}": {_json(value)}' for key, value in head.items()]
    weights = [f"{_json(name)}: {_json(_weight(program, name))}" for name in program.weights]
    lines.append('"weights": {\n  ' + ",\n  ".join(weights) + "\n }")
    lines.append('"nodes": [\n  ' + ",\n  ".join(map(_json, nodes)) + "\n ]")
    lines.append(f'"results": {_json([writer.reference(node) for node in program.results])}')
    return "{\n " + ",\n ".join(lines) + "\n}\n"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _weight(program: Program, name: str) -> dict[str, Any]:
    spec = program.weights.spec(name)
    return {"dtype": str(spec.dtype).removeprefix("torch."), "shape": list(spec.shape)}


def _read_document(path: Path) -> _Document:
    try:
        if path.stat().st_size > _MAX_PROGRAM_BYTES:
            raise ArtifactError(f"{path} is too large for a program")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}", remedy=_DAMAGED) from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise ArtifactError(
            f"{path} was made by a newer qcompile: its schema is version {version}, this one "
            f"reads {SCHEMA_VERSION}",
            remedy="upgrade qcompile",
        )
    try:
        return _Document.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the top level"
        raise ArtifactError(
            f"{path} is no program: {where}: {first['msg']}", remedy=_DAMAGED
        ) from error


def _open_weights(path: Path, declared: Mapping[str, _WeightDocument]) -> WeightStore:
    store = WeightStore()
    file = TensorFile(path)
    stored = file.specs()
    if stored.keys() != declared.keys():
        name = sorted(stored.keys() ^ declared.keys())[0]
        raise ArtifactError(f"the weight '{name}' is not both in {path} and in {PROGRAM_NAME}")
    for name, weight in declared.items():
        if weight.dtype not in DTYPES:
            raise ArtifactError(f"the weight '{name}' has the unknown dtype '{weight.dtype}'")
        spec = TensorSpec(tuple(weight.shape), DTYPES[weight.dtype])
        if not is_stored_as(stored[name], spec):
            raise ArtifactError(
                f"the weight '{name}' is {stored[name].dtype}{list(stored[name].shape)} in {path} "
                f"and {spec.dtype}{list(spec.shape)} in {PROGRAM_NAME}",
                remedy=_DAMAGED,
            )
        store.define(name, Source(file, name), spec)
    return store


def _read_asset(folder: Path, name: str) -> bytes:
    if PurePosixPath(name).name != name or name in ("", ".", ".."):
        raise ArtifactError(f"the program names the file '{name}', which leaves its folder")
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise ArtifactError(f"{folder / name} cannot be read: {error.strerror}") from error


def _write_tree(tree: pytree.TreeSpec) -> Any:
    """A structure of containers: ``0`` is a leaf, null is None."""
    if tree.is_leaf():
        return 0
    children = [_write_tree(child) for child in tree.children()]
    keys = tree.context
    if tree.type is type(None):
        return None
    if tree.type is list:
        return {"list": children}
    if isinstance(keys, (list, tuple)) and len(keys) == len(children) and _are_names(keys):
        return {"dict": dict(zip(keys, children, strict=True))}
    if issubclass(tree.type, tuple):
        return {"tuple": children}
    raise TargetError(
        f"the model's arguments or results hold a {tree.type.__name__}, which cannot be saved",
        remedy="let the model take and return tensors, tuples, lists and dicts",
    )


def _are_names(keys: Any) -> bool:
    return all(isinstance(key, str) for key in keys)


def _read_tree(written: Any) -> Any:
    if written is None or written == 0:
        return written
    match written:
        case {"list": list(items)}:
            return [_read_tree(item) for item in items]
        case {"tuple": list(items)}:
            return tuple(_read_tree(item) for item in items)
        case {"dict": dict(items)}:
            return {key: _read_tree(item) for key, item in items.items()}
    raise ArtifactError(f"the program is damaged: {written!r} is no structure of arguments")
