"""Draws bar charts as SVG that are readable in light and dark.

A charting library would draw no more than these rectangles and texts. It would be larger than all
other code here, and does not support `prefers-color-scheme`.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, LABELS, NUMBERS = 760, 190, 90
ROW, TOP = 26, 58
BREAK = 4  # a bar that is longer than this many medians of all bars is cut off

_STYLE = """
  .panel { fill: #ffffff; stroke: #d0d7de }
  text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1f2328 }
  .title { font-weight: 600; font-size: 15px }
  .note { fill: #59636e; font-size: 12px }
  .ours { fill: #0969da }
  .theirs { fill: #9aa4af }
  .span { stroke: #1f2328; stroke-width: 1.5 }
  .gap { stroke: #ffffff; stroke-width: 4 }
  @media (prefers-color-scheme: dark) {
    .panel { fill: #151b23; stroke: #3d444d }
    text { fill: #f0f6fc }
    .note { fill: #9198a1 }
    .ours { fill: #4493f8 }
    .theirs { fill: #656c76 }
    .span { stroke: #f0f6fc }
    .gap { stroke: #151b23 }
  }
"""


@dataclass(frozen=True)
class Bar:
    """One contender's samples."""

    name: str
    samples: Sequence[float]

    @property
    def middle(self) -> float:
        return statistics.median(self.samples)

    @property
    def ours(self) -> bool:
        return self.name.startswith("aiotun")


def chart(title: str, note: str, bars: Sequence[Bar]) -> str:
    """Draw a horizontal bar to each median, with a line from the smallest to the largest sample."""
    full = WIDTH - LABELS - NUMBERS - 20
    scale = full / _longest([bar.middle for bar in bars])
    height = TOP + ROW * len(bars) + 14
    title, note = escape(title), escape(note)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" role="img" aria-label="{title}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="panel" x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1}" rx="6"/>',
        f'<text class="title" x="16" y="26">{title}</text>',
        f'<text class="note" x="16" y="45">{note}</text>',
    ]
    for number, bar in enumerate(bars):
        lines += _bar(bar, TOP + ROW * number, scale, full)
    return "\n".join([*lines, "</svg>"]) + "\n"


def _longest(values: Sequence[float]) -> float:
    """Return the end of the scale. It is limited, so that one bar does not make the others tiny."""
    limit = BREAK * statistics.median(values)
    return max((v for v in values if v <= limit), default=0) or 1


def _bar(bar: Bar, y: float, scale: float, full: float) -> list[str]:
    length = min(bar.middle * scale, full)
    middle = y + ROW / 2
    kind = "ours" if bar.ours else "theirs"
    lines = [
        f'<text x="{LABELS - 8}" y="{middle + 4:g}" text-anchor="end">{escape(bar.name)}</text>',
        f'<rect class="{kind}" x="{LABELS}" y="{y + 5:g}" width="{max(length, 1):.1f}" '
        f'height="{ROW - 10}" rx="2"/>',
    ]
    end = length
    if bar.middle * scale > full + 0.5:
        x = LABELS + length - 24
        lines.append(
            f'<line class="gap" x1="{x:.1f}" y1="{y + ROW - 3:g}" x2="{x + 8:.1f}" y2="{y + 3:g}"/>'
        )
    else:
        low, high = (min(each * scale, full + 6) for each in (min(bar.samples), max(bar.samples)))
        lines.append(
            f'<line class="span" x1="{LABELS + low:.1f}" y1="{middle:g}" '
            f'x2="{LABELS + high:.1f}" y2="{middle:g}"/>'
        )
        end = max(length, high)
    number = _number(bar.middle)
    lines.append(f'<text x="{LABELS + end + 8:.1f}" y="{middle + 4:g}">{number}</text>')
    return lines


def _number(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
