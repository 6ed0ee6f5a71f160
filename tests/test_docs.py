"""The index of the documentation names every page and every example, and its links lead there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INDEX = ROOT / "docs" / "README.md"
PAGES = [INDEX, *sorted(path for path in INDEX.parent.glob("*.md") if path != INDEX)]


def links(page: Path) -> set[Path]:
    """Files that a page links to."""
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    return {(page.parent / target).resolve() for target in targets}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    assert [str(target) for target in links(page) if not target.exists()] == []


@pytest.mark.parametrize("pattern", ["docs/*.md", "examples/*.py"])
def test_index_names_every_page_and_example(pattern: str) -> None:
    assert {path.resolve() for path in ROOT.glob(pattern)} - {INDEX} <= links(INDEX)
