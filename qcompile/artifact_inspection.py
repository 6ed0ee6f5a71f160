"""What an artifact's manifest says, for people and machines; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompile.manifest import Manifest, read_manifest

SCHEMA_VERSION = 1
"""Of the documents that `inspect` makes, of models and of artifacts."""


@dataclass(frozen=True)
class ArtifactInspection:
    """An artifact, by what its manifest says of it.

    Attributes:
        path: Its directory.
        manifest: Its manifest; the files were not compared with it.
    """

    path: Path
    manifest: Manifest

    @staticmethod
    def read(path: Path) -> ArtifactInspection:
        """Reads the manifest of an artifact.

        Raises:
            ArtifactError: It is damaged, or newer than this version of qcompile.
        """
        return ArtifactInspection(path, read_manifest(path))

    @property
    def bytes(self) -> int:
        """Size of all files that the manifest names."""
        return sum(file.bytes for file in self.manifest.files.values())

    def to_dict(self) -> dict[str, Any]:
        """A JSON document; its keys stay as they are within a `SCHEMA_VERSION`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "artifact",
            "artifact": str(self.path),
            "bytes": self.bytes,
            "manifest": self.manifest.model_dump(mode="json"),
        }
