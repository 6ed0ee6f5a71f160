"""Recognizing activations that are rounded to integer codes and back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from qcompile.ir import dialect


@dataclass(frozen=True)
class RoundedInput:
    """The parts of ``dequantize(quantize(x, scale, zero_point), scale, zero_point)``.

    Attributes:
        source: ``x``, ``[..., K]``.
        codes: The `qc.quantize` call.
        scale: ``[..., G]``, computed from `source` or stored.
        zero_point: Code of the value 0, shaped as the scale; None for symmetric int8 codes.
        bits: Width of the codes.
        group_size: Elements per scale along K; 0 is one group.
    """

    source: fx.Node
    codes: fx.Node
    scale: fx.Node
    zero_point: fx.Node | None
    bits: int
    group_size: int

    @property
    def groups(self) -> int:
        """``G``."""
        return int(self.scale.meta["val"].shape[-1])

    @property
    def is_dynamic(self) -> bool:
        """Whether the scale is the symmetric one that `qc.dynamic_scale` measures on `source`."""
        measured = (self.source, self.bits, self.group_size)
        is_measured = self.scale.target is dialect.dynamic_scale and self.scale.args == measured
        return is_measured and self.zero_point is None

    @property
    def has_one_stored_scale(self) -> bool:
        """Whether all values become codes by one stored scale, and zero point if any."""
        are_stored = all(n is None or n.op == "get_attr" for n in (self.scale, self.zero_point))
        return are_stored and self.scale.meta["val"].numel() == 1


def rounded_input(node: object) -> RoundedInput | None:
    """The parts of a rounded activation.

    Args:
        node: What a layer reads.

    Returns:
        None if it is not rounded, or not with the same scale both ways.
    """
    if not isinstance(node, fx.Node) or node.target is not dialect.dequantize:
        return None
    codes, *how = node.args
    if not isinstance(codes, fx.Node) or codes.target is not dialect.quantize:
        return None
    source, *quantized = codes.args
    if quantized != how:
        return None
    scale, zero_point, bits, group_size = how
    assert isinstance(source, fx.Node)
    assert isinstance(scale, fx.Node)
    assert zero_point is None or isinstance(zero_point, fx.Node)
    assert isinstance(bits, int)
    assert isinstance(group_size, int)
    return RoundedInput(source, codes, scale, zero_point, bits, group_size)
