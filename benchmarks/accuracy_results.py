"""Finished rows of the accuracy table: a JSON file that grows row by row, and how it is shown."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qcompile.tables import Table


@dataclass(frozen=True)
class Measured:
    """One line of the table.

    Attributes:
        method: The row.
        setting: The part of the table.
        format: Of the weights of linears; embedding and lm_head stay float.
        bits: Stored per quantized weight, with everything beside the codes.
        perplexity: On the second half of the text.
        kl: Mean KL(float || quantized) per token, in nats.
        top1: Fraction of tokens that both rank first.
        float_perplexity: Of the float model, on the same windows.
        minutes: Wall clock of quantizing, capture not included.
        cpu_minutes: CPU time of the same.
        peak_gib: Largest resident set when quantizing was done, capture included.
        made_by: Hash of what the row was when it was measured.
    """

    method: str
    setting: str
    format: str
    bits: float
    perplexity: float
    kl: float
    top1: float
    float_perplexity: float
    minutes: float
    cpu_minutes: float
    peak_gib: float
    made_by: str


class Results:
    """A file of measured rows, written whole after each one.

    Args:
        path: JSON file; made with the first row.
        protocol: What the figures were measured with.

    Raises:
        SystemExit: The file holds figures of another protocol.
    """

    def __init__(self, path: Path, protocol: dict[str, str | int]) -> None:
        self._path = path
        self._protocol = protocol
        self._read()

    def find(self, method: str, setting: str, made_by: str) -> Measured | None:
        """A finished row, if it was made in the same way."""
        return next(
            (
                row
                for row in self._read()
                if (row.method, row.setting, row.made_by) == (method, setting, made_by)
            ),
            None,
        )

    def add(self, row: Measured) -> None:
        """Adds a row in place of an older one of its name; other writers' rows stay."""
        rows = [r for r in self._read() if (r.method, r.setting) != (row.method, row.setting)]
        document = {"protocol": self._protocol, "rows": [asdict(r) for r in (*rows, row)]}
        aside = self._path.with_suffix(".new")
        aside.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        aside.replace(self._path)

    def rows(self) -> list[Measured]:
        """All finished rows."""
        return self._read()

    def _read(self) -> list[Measured]:
        if not self._path.exists():
            return []
        document = json.loads(self._path.read_text(encoding="utf-8"))
        if document["protocol"] != self._protocol:
            raise SystemExit(f"{self._path} was measured differently: {document['protocol']}")
        return [Measured(**row) for row in document["rows"]]


def digest(description: Any) -> str:
    """Of a JSON value."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


HEADER = ("method", "format", "bits", "perplexity", "KL", "top-1", "minutes", "cpu min", "GiB")


def tables(rows: Sequence[Measured], settings: dict[str, str]) -> Iterator[Table]:
    """One table per setting, the best perplexity first."""
    for setting, meaning in settings.items():
        chosen = sorted((r for r in rows if r.setting == setting), key=lambda r: r.perplexity)
        if chosen:
            title = f"{setting}: {meaning}; float perplexity {chosen[0].float_perplexity:.3f}"
            yield Table(title, HEADER, tuple(map(cells, chosen)), frozenset(range(2, len(HEADER))))


def cells(row: Measured) -> tuple[str, ...]:
    """A row as text."""
    return (
        row.method,
        row.format,
        f"{row.bits:.3f}",
        f"{row.perplexity:.3f}",
        f"{row.kl:.4f}",
        f"{row.top1:.3f}",
        f"{row.minutes:.2f}",
        f"{row.cpu_minutes:.2f}",
        f"{row.peak_gib:.2f}",
    )
