"""Charts as inline SVG. They hold geometry and classes only: the page's style sheet gives the colours."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup

_CHARACTER = 6.5  # pixels, about
_LINE_HEIGHT = 15  # pixels between two labels at the lines' ends, at least
_MOST_CHOICES = 6  # so many values of a parameter are marked one by one
_WIDE = 8  # from this ratio of the largest to the smallest value on, the axis is logarithmic


@dataclass(frozen=True)
class Line:
    """One curve."""

    points: Sequence[tuple[float, float]]
    kind: str  # the CSS class
    title: str  # the tooltip
    label: str = ""  # written at the line's end


@dataclass(frozen=True)
class Dot:
    """One point of a scatter plot; ``x`` is a number or the name of a choice."""

    x: float | str
    y: float
    kind: str  # the CSS class
    title: str  # the tooltip


@dataclass(frozen=True)
class Bar:
    """The rows of one stretch of lengths."""

    low: float  # least length; 0 has a bar of its own
    high: float  # greater than every length here
    rows: int
    title: str  # the tooltip


@dataclass(frozen=True)
class Scale:
    """Places values between two pixel positions, evenly or by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def around(cls, values: Iterable[float], start: float, end: float, pad: float = 0.06) -> Scale:
        """The scale that shows all the values with some air around them."""
        low, high = min(known := list(values)), max(known)
        if low > 0 and low * _WIDE <= high:
            air = (high / low) ** pad
            return cls(low / air, high * air, start, end, log=True)
        air = (high - low) * pad or abs(low) * 0.1 or 1
        return cls(max(low - air, 0) if low >= 0 else low - air, high + air, start, end)

    def __call__(self, value: float) -> float:
        bend: Callable[[float], float] = math.log if self.log else float
        share = (bend(value) - bend(self.low)) / (bend(self.high) - bend(self.low))
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        """Round values on the scale, about as many as asked for at the most."""
        return self._log_ticks(most) if self.log else self._even_ticks(most)

    def _even_ticks(self, most: int) -> list[float]:
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(i * step, 12) for i in range(first, last + 1)]

    def _log_ticks(self, most: int) -> list[float]:
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for factors in ((1, 2, 5), (1, 3), (1,)):
            ticks = [float(f"{m}e{p}") for p in powers for m in factors]
            ticks = [t for t in ticks if self.low <= t <= self.high]
            if len(ticks) <= most:
                return ticks if len(ticks) > 2 else self._even_ticks(most)  # of a short stretch, logarithms say little
        return ticks[:: math.ceil(len(ticks) / most)]


@dataclass(frozen=True)
class _Axis:
    scale: Callable[[Any], float]
    ticks: list[tuple[float, str]] = field(default_factory=list)  # pixel position and label
    title: str = ""


def number(value: float) -> str:
    """A number as a person writes it, to three digits: ``0.05``, ``32``, ``12,000``, ``1.2e-3``."""
    if value == 0:
        return "0"
    if not 1e-2 <= abs(value) < 1e6:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 or float(value).is_integer() else f"{value:.3g}"


def curves(
    lines: Sequence[Line],
    reference: float | None,
    width: int,
    height: int,
    axis: str = "samples seen",
    dots: Sequence[Dot] = (),
) -> Markup:
    """A chart of losses over samples.

    Args:
        lines: the curves, the most important one last; each has at least one point.
        reference: a value shown as a dashed line across.
        width: of the drawing, in pixels.
        height: of the drawing, in pixels.
        axis: what samples they are.
        dots: single measures at a number of samples, drawn under the curves.
    """
    left, top, bottom = 48, 22, height - 40
    right = width - max(_CHARACTER * len(line.label) for line in lines) - 16
    places = [point for line in lines for point in line.points] + [(float(dot.x), dot.y) for dot in dots]
    losses = [y for _, y in places] + ([reference] if reference is not None else [])
    across = Scale(0, max(x for x, _ in places) or 1, left, right)
    up = Scale.around(losses, bottom, top)
    svg = _drawing(width, height, f"Loss over {axis}")
    _frame(
        svg,
        _Axis(across, _spaced((across(t), number(t)) for t in across.ticks(max(4, width // 90))), axis),
        _Axis(up, [(up(t), number(t)) for t in up.ticks(6)], "loss, log scale" if up.log else "loss"),
        (left, right, bottom),
    )
    if reference is not None:
        _add(svg, "line", cls="reference", x1=left, x2=right, y1=up(reference), y2=up(reference))
    for dot in dots:
        _draw_dot(svg, dot, across(float(dot.x)), up(dot.y))
    for line in lines:
        _draw_line(svg, line, across, up)
    _label_ends(svg, [line for line in lines if line.label], across, up)
    return _markup(svg)


def scatter(dots: Sequence[Dot], losses: Iterable[float], title: str, width: int = 240, height: int = 180) -> Markup:
    """A plot of one parameter's values against the final loss.

    Args:
        dots: the trials, the most important one last; at least one.
        losses: all the losses that plots beside this one show, so that they share a scale.
        title: the parameter's name.
        width: of the drawing, in pixels.
        height: of the drawing, in pixels.
    """
    left, top, right, bottom = 44, 10, width - 12, height - 24
    up = Scale.around(losses, bottom, top)
    across = _parameter_axis([dot.x for dot in dots], left, right)
    svg = _drawing(width, height, f"Final loss by {title}")
    _frame(svg, across, _Axis(up, [(up(t), number(t)) for t in up.ticks(5)]), (left, right, bottom))
    for dot in dots:
        _draw_dot(svg, dot, across.scale(dot.x), up(dot.y))
    return _markup(svg)


def histogram(
    bars: Sequence[Bar], title: str, most: float | None = None, width: int = 320, height: int = 190
) -> Markup:
    """Rows by length, on a logarithmic axis.

    Args:
        bars: in the order of their lengths; at least one that is not of length 0.
        title: what the lengths are of, and their unit.
        most: the longest length that is allowed, shown as a dashed line.
        width: of the drawing, in pixels.
        height: of the drawing, in pixels.
    """
    left, top, right, bottom = 46, 20, width - 6, height - 26
    long = [bar for bar in bars if bar.low > 0]
    low, high = long[0].low, max(long[-1].high, most or 0)
    span = max(high / low, 2.0)  # so that a single length is no wall
    air = math.sqrt(span * low / high)
    zero = low * span**-0.15  # the place of length 0, which has no logarithm
    start = low / air if len(long) == len(bars) else low * span**-0.22
    across = Scale(start, high * air * 1.02, left, right, log=True)
    up = Scale(0, max(bar.rows for bar in bars), bottom, top)
    ticks = [(across(t), number(t)) for t in across.ticks(6)]
    if len(long) < len(bars):
        ticks = [(across(zero), "0"), *(tick for tick in ticks if tick[0] >= across(low))]
    svg = _drawing(width, height, title)
    whole = [(up(t), number(t)) for t in up.ticks(4) if float(t).is_integer()]
    _frame(svg, _Axis(across, _spaced(ticks)), _Axis(up, whole, "rows"), (left, right, bottom))
    for bar in bars:
        x, end = (across(bar.low), across(bar.high)) if bar.low > 0 else (across(zero) - 4, across(zero) + 4)
        wide, y = max(end - x - 1, 1.5), up(bar.rows)
        drawn = _add(svg, "rect", cls="bar", x=x, width=wide, y=y, height=bottom - y)
        _add(drawn, "title", bar.title)
    if most is not None:
        _add(svg, "line", cls="reference", x1=across(most), x2=across(most), y1=top - 8, y2=bottom)
        _add(svg, "text", f"at most {number(most)}", cls="tick end", x=across(most) - 5, y=top - 5)
    return _markup(svg)


def _parameter_axis(values: list[float | str], start: float, end: float) -> _Axis:
    """An axis of numbers, or of choices side by side where a value is no number."""
    numbers = [v for v in values if not isinstance(v, str)]
    if len(numbers) < len(values):
        choices = sorted({str(v) for v in values})
        step = (end - start) / len(choices)
        places = {choice: start + (i + 0.5) * step for i, choice in enumerate(choices)}
        room = max(3, int(step / _CHARACTER) - 1)
        labels = [(x, c if len(c) <= room else c[: room - 1] + "…") for c, x in places.items()]
        return _Axis(lambda value: places[str(value)], _spaced(labels))
    scale, distinct = Scale.around(numbers, start, end), sorted(set(numbers))
    few = len(distinct) <= _MOST_CHOICES and (len(distinct) < len(numbers) or all(isinstance(v, int) for v in distinct))
    return _Axis(scale, _spaced((scale(t), number(t)) for t in (distinct if few else scale.ticks(4))))


def _spaced(ticks: Iterable[tuple[float, str]]) -> list[tuple[float, str]]:
    """The ticks without those whose label would touch the one before."""
    kept: list[tuple[float, str]] = []
    for x, label in ticks:
        if not kept or x - kept[-1][0] >= _CHARACTER * (len(kept[-1][1]) + len(label)) / 2 + 6:
            kept.append((x, label))
    return kept


def _frame(svg: ElementTree.Element, across: _Axis, up: _Axis, box: tuple[float, float, float]) -> None:
    left, right, bottom = box
    for y, label in up.ticks:
        _add(svg, "line", cls="grid", x1=left, x2=right, y1=y, y2=y)
        _add(svg, "text", label, cls="tick end", x=left - 8, y=y + 4)
    _add(svg, "line", cls="axis", x1=left, x2=right, y1=bottom, y2=bottom)
    for x, label in across.ticks:
        _add(svg, "line", cls="axis", x1=x, x2=x, y1=bottom, y2=bottom + 4)
        _add(svg, "text", label, cls="tick middle", x=x, y=bottom + 18)
    if across.title:
        _add(svg, "text", across.title, cls="tick middle", x=(left + right) / 2, y=bottom + 36)
    if up.title:
        _add(svg, "text", up.title, cls="tick", x=0, y=10)


def _draw_line(svg: ElementTree.Element, line: Line, across: Scale, up: Scale) -> None:
    group = _add(svg, "g", cls=f"curve {line.kind}")
    _add(group, "title", line.title)
    points = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in line.points)
    if len(line.points) > 1:
        _add(group, "polyline", cls="reach", points=points)
        _add(group, "polyline", points=points)
    x, y = line.points[-1]
    _add(group, "circle", cx=across(x), cy=up(y), r=4 if line.label else 2.5)


def _draw_dot(svg: ElementTree.Element, dot: Dot, x: float, y: float) -> None:
    mark = _add(svg, "circle", cls=f"dot {dot.kind}", cx=x, cy=y, r=5.5 if dot.kind == "best" else 4)
    _add(mark, "title", dot.title)


def _label_ends(svg: ElementTree.Element, lines: list[Line], across: Scale, up: Scale) -> None:
    """Write each line's label right of its end, and below the label above where they would touch."""
    above = -math.inf
    for line in sorted(lines, key=lambda line: up(line.points[-1][1])):
        x, y = line.points[-1]
        above = max(up(y), above + _LINE_HEIGHT)
        _add(svg, "text", line.label, cls=f"label {line.kind}", x=across(x) + 9, y=above + 4)


def _drawing(width: int, height: int, label: str) -> ElementTree.Element:
    box = {"viewBox": f"0 0 {width} {height}", "width": str(width), "height": str(height)}
    return ElementTree.Element("svg", {**box, "role": "img", "aria-label": label})


def _add(parent: ElementTree.Element, tag: str, text: str = "", cls: str = "", **attributes: object) -> Any:
    given = {k: f"{v:.1f}" if isinstance(v, float) else str(v) for k, v in attributes.items()}
    element = ElementTree.SubElement(parent, tag, {"class": cls} | given if cls else given)
    element.text = text or None
    return element


def _markup(svg: ElementTree.Element) -> Markup:
    return Markup(ElementTree.tostring(svg, encoding="unicode"))
