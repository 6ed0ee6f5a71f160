"""YAML that remembers on which line each value stands, and that cannot be made to blow up.

A recipe may come from anywhere, so a document is small, plain and shallow: aliases (which can
multiply without bound), duplicate keys and deep nesting are refused rather than interpreted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import yaml

from qcompile.errors import RecipeError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 16

Path = tuple[str | int, ...]
"""Where a value stands: mapping keys and list positions from the top."""


@dataclass(frozen=True)
class LocatedYaml:
    """A parsed document.

    Attributes:
        data: Plain Python values (dict, list, str, int, float, bool, None, dates).
        lines: The 1-based line of every value by its path; a mapping's value has its key's line.
    """

    data: object
    lines: Mapping[Path, int]

    def line_of(self, path: Path) -> int | None:
        """The line of the value at ``path``, or of its closest enclosing value."""
        for length in range(len(path), -1, -1):
            line = self.lines.get(path[:length])
            if line is not None:
                return line
        return None


def parse_yaml(text: str, *, source: str) -> LocatedYaml:
    """Parses one YAML document.

    Args:
        text: The document.
        source: How errors name it, such as ``"recipe 'my.yaml'"``.

    Raises:
        RecipeError: The text is not YAML, or uses what a recipe never needs.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise RecipeError(f"{source} is larger than {MAX_BYTES // 1024} KiB: not a recipe")
    _refuse_unbounded(text, source)
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        lines: dict[Path, int] = {}
        if node is None:
            return LocatedYaml(None, lines)
        _record_lines(node, (), lines, source)
        return LocatedYaml(loader.construct_document(node), lines)
    except yaml.YAMLError as error:
        raise _yaml_error(error, source) from error
    except ValueError as error:  # an impossible date, a number of ten thousand digits
        raise RecipeError(f"{source} holds a value that cannot be read: {error}") from error
    finally:
        loader.dispose()


def _refuse_unbounded(text: str, source: str) -> None:
    """Walks the events, which needs no recursion, so that composing the nodes cannot run away."""
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            line = 0 if event.start_mark is None else event.start_mark.line + 1
            if isinstance(event, yaml.AliasEvent):
                raise RecipeError(
                    f"{source}, line {line}: YAML aliases are not used here",
                    remedy="write the value out",
                )
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            if depth > MAX_DEPTH:
                raise RecipeError(
                    f"{source}, line {line}: values are nested more than {MAX_DEPTH} deep"
                )
    except yaml.YAMLError as error:
        raise _yaml_error(error, source) from error


def _record_lines(node: yaml.Node, path: Path, lines: dict[Path, int], source: str) -> None:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _record_lines(item, (*path, index), lines, source)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*path, str(key.value))
            line = key.start_mark.line + 1
            if inner in lines:
                raise RecipeError(
                    f"{source}, line {line}: key '{key.value}' stands twice, "
                    f"first on line {lines[inner]}",
                    remedy="keep one of them",
                )
            lines[inner] = line
            _record_lines(value, inner, lines, source)


def _yaml_error(error: yaml.YAMLError, source: str) -> RecipeError:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        place = source if mark is None else f"{source}, line {mark.line + 1}"
        return RecipeError(f"{place}: not valid YAML: {error.problem or error.context}")
    return RecipeError(f"{source} is not valid YAML: {str(error).splitlines()[0]}")
