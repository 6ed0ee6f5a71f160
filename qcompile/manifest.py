"""The manifest of an artifact: what it holds, what it computes, what it needs to run.

`manifest.json` is the one file of an artifact that qcompile reads first. It names every other
file with its size and sha256, describes the inputs and outputs of the model, and says which
version of the schema and of the kernels' weight layout it was written for. Reading it never
trusts it: every field is validated, and a damaged or foreign manifest is one `ArtifactError`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator

from qcompile.errors import ArtifactError

SCHEMA_VERSION = 1
"""Raised by every change that an older reader would misunderstand."""

MANIFEST_NAME = "manifest.json"
REPORT_NAME = "report.json"
"""Timings and other facts that differ between two equal compilations; not hashed."""

_MAX_MANIFEST_BYTES = 64 << 20
_MAX_DIMENSION = 2**31 - 1
_MAX_FILE_BYTES = 2**50
_HASH_BLOCK = 1 << 20

Role = Literal[
    "input_ids",
    "attention_mask",
    "position_ids",
    "token_type_ids",
    "logit_positions",
    "past_key",
    "past_value",
    "past_state",
    "logits",
    "present_key",
    "present_value",
    "present_state",
    "tensor",
]
Task = Literal["causal_lm", "module"]
Dimension = Annotated[int, Field(ge=0, le=_MAX_DIMENSION)] | str
TokenId = Annotated[int, Field(ge=0, le=_MAX_DIMENSION)]
DType = Literal[
    "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64",
    "float16", "float32", "float64",
]  # fmt: skip


class _Frozen(BaseModel):
    # "model" fields are ours, not pydantic's protected names.
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ValueInfo(_Frozen):
    """One input or output of the compiled model.

    Attributes:
        name: Its name in the model file.
        dtype: A NumPy dtype name.
        shape: Sizes; a string is a symbol that each call binds (``"batch"``).
        role: What the runtime feeds it with; ``"tensor"`` is the caller's own.
        layer: The decoder layer, for cache values.
    """

    name: str = Field(min_length=1)
    dtype: DType
    shape: tuple[Dimension, ...]
    role: Role = "tensor"
    layer: Annotated[int, Field(ge=0, le=_MAX_DIMENSION)] | None = None

    @property
    def is_state(self) -> bool:
        """Whether it is a part of a cache that does not grow with the text."""
        return self.role in ("past_state", "present_state")


class Signature(_Frozen):
    """The inputs and outputs of the compiled model, in the order of the model file."""

    inputs: tuple[ValueInfo, ...]
    outputs: tuple[ValueInfo, ...]

    def input(self, role: Role) -> ValueInfo | None:
        """The first input of a role, or None."""
        return _first(self.inputs, role)

    def output(self, role: Role) -> ValueInfo | None:
        """The first output of a role, or None."""
        return _first(self.outputs, role)

    def cache_pairs(self) -> list[tuple[ValueInfo, ValueInfo]]:
        """Each cache input with the output that replaces it, by layer.

        Raises:
            ArtifactError: If inputs and outputs do not pair up one to one.
        """
        past = {_place(value): value for value in self.inputs if value.role.startswith("past_")}
        present = {
            _place(value): value for value in self.outputs if value.role.startswith("present_")
        }
        if past.keys() != present.keys():
            layer, kind = sorted(past.keys() ^ present.keys(), key=str)[0]
            raise ArtifactError(
                f"the manifest's signature is inconsistent: the {kind} cache of layer {layer} "
                "is not both an input and an output",
                remedy="compile the model again",
            )
        return [(past[key], present[key]) for key in past]


class ModelInfo(_Frozen):
    """Where the compiled model came from."""

    name: str
    architecture: str
    source: str
    fingerprint: str


class GenerationInfo(_Frozen):
    """What generation needs to know of a causal language model.

    Attributes:
        eos_token_ids: Token ids that end a text.
        bos_token_id: Starts a text when the prompt is empty.
        pad_token_id: Fills shorter rows of a batch; masked, so any id would do.
        max_context: The most positions that the model was made for; None is unlimited.
    """

    eos_token_ids: tuple[TokenId, ...] = ()
    bos_token_id: TokenId | None = None
    pad_token_id: TokenId | None = None
    max_context: Annotated[int, Field(ge=1, le=_MAX_DIMENSION)] | None = None


class FileInfo(_Frozen):
    """The content of one file of the artifact."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0, le=_MAX_FILE_BYTES)


class Manifest(_Frozen):
    """Everything that `manifest.json` says.

    Attributes:
        schema_version: `SCHEMA_VERSION` of the writer.
        qcompile_version: The version of qcompile that wrote the artifact.
        target: The backend that runs it, such as ``"cpu"``.
        kernel_layout_version: Layout of weights packed for qcompile's own kernels; None when the
            model needs none of them.
        task: ``"causal_lm"`` can generate; ``"module"`` only maps inputs to outputs.
        model: The source model.
        recipe: The recipe, resolved.
        signature: Inputs and outputs.
        generation: Special tokens and limits of a causal language model.
        bits: Exact accounting of bits: advertised and stored bits per weight, bytes.
        metrics: Accuracy figures, when they were measured.
        files: Every file but the manifest and the report, by POSIX path inside the artifact.
    """

    schema_version: int = SCHEMA_VERSION
    qcompile_version: str
    target: str
    kernel_layout_version: int | None = None
    task: Task
    model: ModelInfo
    recipe: dict[str, JsonValue] = Field(default_factory=dict)
    signature: Signature
    generation: GenerationInfo = GenerationInfo()
    bits: dict[str, JsonValue] = Field(default_factory=dict)
    metrics: dict[str, JsonValue] = Field(default_factory=dict)
    files: dict[str, FileInfo] = Field(default_factory=dict)

    @field_validator("files")
    @classmethod
    def _names_stay_inside(cls, files: dict[str, FileInfo]) -> dict[str, FileInfo]:
        for name in files:
            if not _is_inside(name):
                raise ValueError(f"the file name {name!r} leaves the artifact's directory")
        return files


def read_manifest(directory: Path) -> Manifest:
    """Read and validate the manifest of an artifact; looks at no other file.

    Raises:
        ArtifactError: If there is no artifact in `directory`, or its manifest is damaged or was
            written by a newer qcompile.
    """
    path = _manifest_path(directory)
    text = _read_text(path)
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON, a number or a nesting without end
        raise ArtifactError(
            f"{path} is not valid JSON: {error}", remedy="copy or compile the artifact again"
        ) from error
    _check_schema_version(path, raw)
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the top level"
        raise ArtifactError(
            f"{path} is not a valid manifest: {where}: {first['msg']}",
            remedy="copy or compile the artifact again",
        ) from error


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into `directory`."""
    text = manifest.model_dump_json(indent=2)
    (directory / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")


def describe_files(directory: Path) -> dict[str, FileInfo]:
    """Size and sha256 of every file below `directory`, for `Manifest.files`.

    The manifest itself and the report, which holds timings, are left out.
    """
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    named = {path.relative_to(directory).as_posix(): path for path in files}
    return {
        name: FileInfo(sha256=_sha256(path), bytes=path.stat().st_size)
        for name, path in named.items()
        if name not in (MANIFEST_NAME, REPORT_NAME)
    }


def verify_files(directory: Path, manifest: Manifest, *, hashes: bool = True) -> None:
    """Compare the files of an artifact with its manifest.

    Args:
        directory: The artifact.
        manifest: Its manifest.
        hashes: Whether to read every file and compare its sha256; sizes are always compared.

    Raises:
        ArtifactError: Naming the first file that is missing or differs.
    """
    # All sizes before any hash: a truncated copy is found without reading gigabytes.
    for name, info in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise ArtifactError(
                f"the artifact {directory} lacks its file {name}",
                remedy="copy or compile the artifact again",
            )
        size = path.stat().st_size
        if size != info.bytes:
            raise ArtifactError(
                f"{path} has {size} bytes; the manifest says {info.bytes}",
                remedy="the file is cut off or was changed: copy or compile the artifact again",
            )
    for name, info in manifest.files.items() if hashes else ():
        if _sha256(directory / name) != info.sha256:
            raise ArtifactError(
                f"{directory / name} is damaged: its sha256 is not the manifest's",
                remedy="copy or compile the artifact again",
            )


def is_artifact(directory: Path) -> bool:
    """Whether `directory` looks like an artifact of any qcompile version, even a damaged one."""
    path = directory / MANIFEST_NAME
    try:
        raw = json.loads(_read_text(path))
    except (ArtifactError, ValueError, RecursionError):
        return False
    return isinstance(raw, dict) and {"schema_version", "qcompile_version"} <= raw.keys()


def _manifest_path(directory: Path) -> Path:
    if not directory.is_dir():
        state = "is not a directory" if directory.exists() else "does not exist"
        raise ArtifactError(
            f"there is no artifact at {directory}: it {state}",
            remedy="pass the output directory of `qcompile compile`",
        )
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise ArtifactError(
            f"{directory} is not a qcompile artifact: it has no {MANIFEST_NAME}",
            remedy="pass the output directory of `qcompile compile`",
        )
    return path


def _read_text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > _MAX_MANIFEST_BYTES:
            raise ArtifactError(f"{path} has {size} bytes, too many for a manifest")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}",
            remedy="copy or compile the artifact again",
        ) from error
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error


def _check_schema_version(path: Path, raw: object) -> None:
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ArtifactError(
            f"{path} is not a qcompile manifest: it has no schema_version",
            remedy="pass the output directory of `qcompile compile`",
        )
    if version > SCHEMA_VERSION:
        raise ArtifactError(
            f"{path} was made by a newer qcompile: its schema is version {version}, "
            f"this one reads up to {SCHEMA_VERSION}",
            remedy="upgrade qcompile",
        )


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    plain = not path.is_absolute() and str(path) == name and name not in ("", ".")
    return plain and ".." not in path.parts and not set(name) & {"\\", "\0", ":"}


def _place(value: ValueInfo) -> tuple[int | None, str]:
    """The layer that a cache value belongs to, and what it is of that layer."""
    kind = value.role.partition("_")[2]
    return value.layer, value.name.partition(".")[2] if kind == "state" else kind


def _first(values: Iterable[ValueInfo], role: Role) -> ValueInfo | None:
    return next((value for value in values if value.role == role), None)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    block = memoryview(bytearray(_HASH_BLOCK))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(block):
                digest.update(block[:count])
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()
