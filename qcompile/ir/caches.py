"""What the caches of a program keep of each position."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from qcompile.kernels.kv_append.rows import FLOAT_CACHE, row_bytes


@dataclass(frozen=True)
class CacheFormat:
    """What a cache keeps of each head and position.

    Attributes:
        name: ``"float"`` (the numbers as they are), or one of `CACHE_FORMATS`.
        group_size: Numbers per scale; 0 is one scale per head and position.
    """

    name: str = FLOAT_CACHE
    group_size: int = 0

    @property
    def rounds(self) -> bool:
        """Whether it keeps less than the numbers themselves."""
        return self.name != FLOAT_CACHE

    def row_bytes(self, width: int) -> int:
        """Bytes of one head and position, of a format that rounds.

        Args:
            width: Numbers in it.
        """
        return row_bytes(width, self.name, self.group_size)


def cache_format(append: fx.Node) -> CacheFormat:
    """The format of the cache that a call of `qc.kv_append` grows."""
    given = append.args[2:]
    name = given[0] if given else FLOAT_CACHE
    group_size = given[1] if len(given) > 1 else 0
    assert isinstance(name, str)
    assert isinstance(group_size, int)
    return CacheFormat(name, group_size)
