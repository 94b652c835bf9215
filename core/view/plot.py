"""Curves as static SVG, for a report that needs no script and prints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 440, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 8, 24
_HUES = 6
_SMOOTHED_FROM = 60


@dataclass(frozen=True)
class Line:
    """`ys` over the steps `xs`, None where there is no value. `dots`: few points, each of them marked."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    dots: bool = False

    @property
    def known(self) -> list[tuple[float, float]]:
        return [(x, y) for x, y in zip(self.xs, self.ys, strict=True) if y is not None]


def plot(lines: Sequence[Line], from_zero: bool = False, smooth: bool = True) -> Markup:
    """One SVG; empty where no line has a value. `smooth`: long lines also as an average."""
    lines = [line for line in lines if line.known]
    if not lines:
        return Markup()
    x0, x1 = _extent([x for line in lines for x, _ in line.known])
    low, high = _extent([y for line in lines for _, y in line.known] + ([0.0] if from_zero else []))
    margin = (high - low) * 0.05
    scale = _Scale(x0, x1, 0.0 if from_zero and low == 0 else low - margin, high + margin)
    parts = [*_axes(scale)]
    for hue, line in enumerate(lines):
        parts += _drawn(line, hue % _HUES, scale, smooth and not line.dots and len(line.known) >= _SMOOTHED_FROM)
    body = Markup().join(parts)
    return Markup('<svg viewBox="0 0 {} {}" role="img">{}</svg>').format(WIDTH, HEIGHT, body)


def number(value: float | None) -> str:
    """Three digits."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def level(tick: float, decimals: int) -> str:
    """A tick's number, with the decimals that tell it from the next one."""
    return f"{float(f'{tick:.{decimals}f}'):g}" if 0 < decimals <= 4 and abs(tick) < 1000 else number(tick)


@dataclass(frozen=True)
class _Scale:
    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, step: float) -> float:
        return round(_LEFT + (step - self.x0) / (self.x1 - self.x0) * (WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        return round(_TOP + (1 - (value - self.y0) / (self.y1 - self.y0)) * (HEIGHT - _TOP - _BOTTOM), 1)


def _axes(scale: _Scale) -> Iterator[Markup]:
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    levels = ticks(scale.y0, scale.y1, 4)
    decimals = max(0, -math.floor(math.log10(levels[1] - levels[0]) + 1e-9)) if len(levels) > 1 else 0
    for tick in levels:
        y = scale.y(tick)
        yield Markup('<path class="grid" d="M{} {}H{}"/>').format(_LEFT, y, right)
        yield Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(_LEFT - 6, y + 4, level(tick, decimals))
    for tick in ticks(scale.x0, scale.x1, 5):
        if tick == int(tick) and scale.x(tick) < right - 30:
            yield Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(
                scale.x(tick), bottom + 16, int(tick)
            )
    yield Markup('<text x="{}" y="{}" text-anchor="end">step</text>').format(right, bottom + 16)


def _drawn(line: Line, hue: int, scale: _Scale, smooth: bool) -> Iterator[Markup]:
    yield Markup('<path class="curve k{}{}" d="{}"/>').format(hue, " raw" if smooth else "", _path(line.known, scale))
    if smooth:
        yield Markup('<path class="curve k{}" d="{}"/>').format(hue, _path(_smoothed(line.known), scale))
    if line.dots:
        for x, y in line.known:
            yield Markup('<circle class="f{}" cx="{}" cy="{}" r="3"/>').format(hue, scale.x(x), scale.y(y))


def legend(lines: Sequence[Line]) -> Markup:
    """Names with their last values."""
    shown = [line for line in lines if line.known]
    entry = Markup('<span><i class="b{}"></i>{} <b>{}</b></span>')
    return Markup().join(
        entry.format(hue % _HUES, escape(line.name), number(line.known[-1][1])) for hue, line in enumerate(shown)
    )


def _path(points: Sequence[tuple[float, float]], scale: _Scale) -> str:
    return "M" + "L".join(f"{scale.x(x)} {scale.y(y)}" for x, y in points)


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """An average that forgets, over about a thirtieth of the curve."""
    keep = 1 - 1 / max(4.0, len(points) / 30)
    mean, weight, smooth = 0.0, 0.0, []
    for x, y in points:
        mean, weight = keep * mean + (1 - keep) * y, keep * weight + (1 - keep)
        smooth.append((x, mean / weight))
    return smooth


def _extent(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if low < high else (low - (abs(low) * 0.1 or 1), high + (abs(high) * 0.1 or 1))


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers within, about `count`."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, math.floor(high / step + 1e-9) + 1)]
