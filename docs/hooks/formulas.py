"""Typesets every ```math block as an inline SVG when the site is built: no script and no network is needed to read it.

Matplotlib's mathtext lays the formula out. The glyphs take the text colour of the page; screen readers get the TeX source.
"""

import html
import re

from matplotlib.font_manager import FontProperties
from matplotlib.path import Path
from matplotlib.textpath import TextPath

_LETTERS = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C", Path.CLOSEPOLY: "Z"}
_FONT = FontProperties(math_fontfamily="stix")
_EM = 500  # units of the SVG per font size


def on_page_markdown(markdown, page, config, files):
    """Replace the blocks."""
    return re.sub(r"^```math\n(.+?)^```$", lambda found: _typeset(found[1]), markdown, flags=re.M | re.S)


def _typeset(source):
    """One formula per line that ends with `\\\\`, below each other."""
    lines = [" ".join(line.split()) for line in re.split(r"\\\\\s*\n", source.strip())]
    return f'<div class="formula">{"".join(_svg(line) for line in lines)}</div>'


def _svg(tex):
    path = TextPath((0, 0), f"${tex}$", size=_EM, prop=_FONT)
    (left, bottom), (right, top) = path.get_extents().padded(20).get_points()
    d = "".join(
        _LETTERS[code] + ("" if code == Path.CLOSEPOLY else " ".join(f"{v:.0f}" for v in points))
        for points, code in path.iter_segments(curves=True, simplify=False)
    )
    box = f"{left:.0f} {-top:.0f} {right - left:.0f} {top - bottom:.0f}"
    size = f"width:{(right - left) / _EM:.2f}em;max-width:100%"
    label = html.escape(tex, quote=True)
    return (
        f'<svg role="img" aria-label="{label}" viewBox="{box}" style="{size};display:block;margin:.6em 0" '
        f'fill="currentColor"><path transform="scale(1,-1)" d="{d}"/></svg>'
    )
