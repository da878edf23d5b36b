"""Drawing SVG: scales, axes and marks. Colours are classes that the page's style sheet fills, so charts are readable on
light and on dark, and sharp in print."""

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape
from matplotlib.ticker import LogLocator, MaxNLocator

COLOURS = 8


@dataclass(frozen=True)
class Scale:
    """Values to pixels.

    Attributes:
        low: value at `start`.
        high: value at `end`; above `low`.
        start: pixels; for a vertical axis the lower end.
        end: pixels.
        log: logarithmic; `low` is positive then.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Place of a value, that of the nearer end if it is beyond."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, max(value, self._least)))
        share = (min(max(value, low), high) - low) / (high - low)
        return self.start + share * (self.end - self.start)

    @property
    def _least(self) -> float:
        return self.low if self.log else -math.inf

    def ticks(self, count: int = 5) -> list[float]:
        """Round values inside, about so many."""
        if self.log and self.high / self.low >= 30:
            found = LogLocator(base=10, numticks=count + 2).tick_values(self.low, self.high)
        else:
            found = MaxNLocator(count, steps=[1, 2, 5, 10]).tick_values(self.low, self.high)
        slack = 1e-9 * (self.high - self.low)
        return [float(tick) for tick in found if self.low - slack <= tick <= self.high + slack]


def scale_of(
    values: Iterable[float], start: float, end: float, log: bool = False, include: Sequence[float] = ()
) -> Scale:
    """A scale that shows all values, with some room around them.

    Args:
        values: what is drawn; what is not finite, or not positive on a logarithmic scale, does not count.
        start: pixels of the lower end.
        end: pixels of the upper end.
        log: logarithmic.
        include: values that it shows as well, without room beyond them.
    """
    known = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    low, high = min([*known, *include], default=1.0), max([*known, *include], default=1.0)
    if log:
        room = max((high / low) ** 0.06, 1.05)
        # the room below the smallest of all floats would be zero, which has no logarithm
        low, high = (low if low in include else max(low / room, sys.float_info.min)), high * room
    else:
        room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        low, high = (low if low in include else low - room), (high if high in include else high + room)
    # all that is drawn has one value, which is an end
    return Scale(low, high if high > low else low + 1.0, start, end, log)


@dataclass
class Drawing:
    """An SVG that is being drawn, in pixels of its own.

    Attributes:
        width: of the whole.
        height: of the whole.
        title: for those who cannot see it.
    """

    width: float
    height: float
    title: str
    parts: list[Markup] = field(default_factory=list)

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
        """A straight line."""
        self._add('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>', style, *map(_px, (x1, y1, x2, y2)))

    def rect(self, x: float, y: float, width: float, height: float, style: str, tip: str = '') -> None:
        """A rectangle; `tip` shows on hovering."""
        sides = map(_px, (x, y, max(width, 0.5), max(height, 0.5)))
        self._add('<rect class="{}" x="{}" y="{}" width="{}" height="{}"{}', style, *sides, _end('rect', tip))

    def dot(self, x: float, y: float, radius: float, style: str, tip: str = '') -> None:
        """A circle; `tip` shows on hovering."""
        self._add('<circle class="{}" cx="{}" cy="{}" r="{}"{}', style, *map(_px, (x, y, radius)), _end('circle', tip))

    def polyline(self, points: Iterable[tuple[float, float]], style: str) -> None:
        """A line through points."""
        self._add('<polyline class="{}" points="{}"/>', style, ' '.join(f'{_px(x)},{_px(y)}' for x, y in points))

    def polygon(self, points: Iterable[tuple[float, float]], style: str) -> None:
        """A filled area."""
        self._add('<polygon class="{}" points="{}"/>', style, ' '.join(f'{_px(x)},{_px(y)}' for x, y in points))

    def text(self, x: float, y: float, text: str, style: str = '') -> None:
        """Text; of the styles, `end` and `mid` say which point of it lies at (x, y)."""
        self._add('<text class="{}" x="{}" y="{}">{}</text>', style, _px(x), _px(y), text)

    def y_axis(self, scale: Scale, left: float, right: float, count: int = 5) -> None:
        """Horizontal lines at round values, which stand left of them."""
        for tick in scale.ticks(count):
            self.line(left, scale(tick), right, scale(tick), 'grid')
            self.text(left - 6, scale(tick) + 4, short(tick), 'tick end')

    def x_axis(self, scale: Scale, top: float, bottom: float, count: int = 6) -> None:
        """Round values below, with small marks; `top` < `bottom` draws lines between them."""
        for tick in scale.ticks(count):
            self.line(scale(tick), top, scale(tick), bottom + 4, 'grid')
            self.text(scale(tick), bottom + 17, short(tick), 'tick mid')

    def svg(self) -> Markup:
        """The drawing."""
        head = Markup('<svg viewBox="0 0 {0} {1}" width="{0}" height="{1}" role="img" aria-label="{2}">').format(
            _px(self.width), _px(self.height), self.title
        )
        return head + Markup('').join(self.parts) + Markup('</svg>')

    def _add(self, template: str, *values: object) -> None:
        self.parts.append(Markup(template).format(*values))


def short(value: float) -> str:
    """A number with three or four digits, as people write it."""
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f'{value:.3g}'.partition('e')[::2]
        return f'{mantissa}e{int(exponent)}' if exponent else mantissa
    return f'{value:.0f}' if abs(value) >= 1000 else f'{value:.4g}'


def _px(value: float) -> str:
    return f'{value:.1f}'.removesuffix('.0')


def _end(tag: str, tip: str) -> Markup:
    return Markup('><title>{}</title></{}>').format(escape(tip), Markup(tag)) if tip else Markup('/>')
