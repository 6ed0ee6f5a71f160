"""A roofline picture as SVG: what was reached, below what memory and arithmetic allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import log10

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 900, 520, 70, 260, 20, 50
_COLORS = ("#1b6ca8", "#d1495b", "#66a182", "#edae49", "#7d5ba6", "#8d6a4f", "#2e4057", "#00798c")


@dataclass(frozen=True)
class Point:
    """What one variant reached.

    Attributes:
        series: The variant, one color each.
        intensity: Operations per byte of weights.
        rate: Operations per second.
    """

    series: str
    intensity: float
    rate: float


def roofline(points: Sequence[Point], bandwidth: float, peak: float) -> str:
    """The picture.

    Args:
        points: At least one.
        bandwidth: Bytes per second.
        peak: Operations per second; 0 where it is not known.
    """
    axes = _Axes.around(points, peak)
    series = list(dict.fromkeys(point.series for point in points))
    colors = {name: _COLORS[i % len(_COLORS)] for i, name in enumerate(series)}
    parts = [*_grid(axes), _roof(axes, bandwidth, peak)]
    for point in points:
        x, y = axes.place(point.intensity, point.rate)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colors[point.series]}"/>')
    for i, name in enumerate(series):
        y, x = _TOP + 18 * (i + 1), _WIDTH - _RIGHT + 16
        parts.append(f'<circle cx="{x}" cy="{y - 4}" r="4" fill="{colors[name]}"/>')
        parts.append(f'<text x="{x + 10}" y="{y}">{escape(name)}</text>')
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" '
        f'fill="white"/>\n{body}\n</svg>\n'
    )


@dataclass(frozen=True)
class _Axes:
    """Decades of both axes."""

    left: float
    right: float
    bottom: float
    top: float

    @staticmethod
    def around(points: Sequence[Point], peak: float) -> _Axes:
        across = [log10(point.intensity) for point in points]
        up = [log10(rate) for rate in (*(point.rate for point in points), peak) if rate > 0]
        return _Axes(min(across) - 0.3, max(across) + 0.3, min(up) - 0.3, max(up) + 0.3)

    def place(self, intensity: float, rate: float) -> tuple[float, float]:
        x = (log10(intensity) - self.left) / (self.right - self.left)
        y = (log10(rate) - self.bottom) / (self.top - self.bottom)
        return _LEFT + x * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - y * (
            _HEIGHT - _TOP - _BOTTOM
        )


def _roof(axes: _Axes, bandwidth: float, peak: float) -> str:
    steps = 60
    across = [axes.left + (axes.right - axes.left) * i / steps for i in range(steps + 1)]
    path = []
    for decade in across:
        rate = bandwidth * 10**decade
        rate = min(rate, peak) if peak > 0 else rate
        if log10(rate) <= axes.top:
            x, y = axes.place(10**decade, rate)
            path.append(f"{x:.1f},{y:.1f}")
    return f'<polyline points="{" ".join(path)}" fill="none" stroke="black" stroke-width="2"/>'


def _grid(axes: _Axes) -> list[str]:
    parts = []
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    for decade in range(int(axes.left) - 1, int(axes.right) + 2):
        if axes.left <= decade <= axes.right:
            x, _ = axes.place(10.0**decade, 10.0**axes.bottom)
            parts.append(_line(x, _TOP, x, bottom))
            parts.append(
                f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{10**decade:g}</text>'
            )
    for decade in range(int(axes.bottom) - 1, int(axes.top) + 2):
        if axes.bottom <= decade <= axes.top:
            _, y = axes.place(10.0**axes.left, 10.0**decade)
            parts.append(_line(_LEFT, y, right, y))
            rate = f"{10.0 ** (decade - 9):g}"
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{rate}</text>')
    middle = (_LEFT + right) / 2
    label = "operations per byte of weights (down: Gop/s)"
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 14}" text-anchor="middle">{label}</text>')
    return parts


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#ddd"/>'
