"""What pictures in a page share: the frame of an SVG, a line through points, and round numbers for an axis.

Pictures take their colours from the classes of the page that they stand in. Knows nothing of what is drawn.
"""

import math
from collections.abc import Iterable, Sequence
from html import escape


def svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    """A picture as wide as its place allows, at most `width`; the title is for those who cannot see it."""
    size = f'viewBox="0 0 {width:g} {height:g}" style="max-width:{width:g}px"'
    return f'<svg {size} role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def path(points: Iterable[tuple[float, float]]) -> str:
    """Of a polyline, in places on the page."""
    return " ".join(f"{across:.1f},{up:.1f}" for across, up in points)


def spacing(span: float) -> float:
    """Between marks of an axis: 1, 2 or 5 of some power of ten, so that there are 4 to 10 of them."""
    rough = span / 5
    power = 10 ** math.floor(math.log10(rough))
    return float(next(power * unit for unit in (1, 2, 5, 10) if power * unit >= rough * 0.999))
