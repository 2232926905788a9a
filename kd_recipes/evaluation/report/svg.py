"""matplotlib's figures as inline SVG, in the page's own colours: one picture serves light, dark and print.

Text stays text, in the page's font. Nothing in it depends on time or on the user's matplotlibrc.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from io import StringIO
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_MODEL_COLOURS = 8
# What report.css gives a colour to, as `--ink` and so on.
_VARIABLES = (
    *("ink", "muted", "rule", "surface", "accent", "alert", "better", "worse"),
    *("speed-0", "speed-1", "speed-2", "speed-3", "speed-4", "speed-unknown"),
    *(f"model-{index}" for index in range(NUM_MODEL_COLOURS)),
)
_PREFIX = "#c01a"  # of the colours that stand for variables until the SVG is written: nothing else is drawn in them
_TIP = "tip:"


def colour(variable: str) -> str:
    """What matplotlib is to draw in, for it to have the colour of a variable of report.css."""
    return f"{_PREFIX}{_VARIABLES.index(variable):02x}"


def tip(text: str) -> str:
    """A ``gid``: what shows where the pointer rests on the artist."""
    return _TIP + text


def picture(name: str, label: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> Markup:
    """An inline ``<svg>``.

    Args:
        name: unlike that of any other picture of the page, on which its identifiers depend.
        label: what it shows, for those who cannot see it.
        size: width and height in CSS pixels, where it is shown at its own size.
        draw: draws on the figure, in :func:`colour`.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    file = StringIO()
    with style.context(["default", _style(name)]), warnings.catch_warnings():
        # A name in a script that matplotlib's own font lacks: the reader's browser draws it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72, layout="constrained")
        draw(figure)
        figure.savefig(
            file, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    return _inline(file.getvalue(), label)


def _style(name: str) -> dict[str, object]:
    ink, muted, rule = colour("ink"), colour("muted"), colour("rule")
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,  # `$` in a model's name is a dollar
        "font.size": 12,
        "text.color": ink,
        "axes.labelcolor": muted,
        "axes.titlecolor": ink,
        "axes.titlesize": 12.5,
        "axes.titlelocation": "left",
        "axes.edgecolor": muted,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.formatter.useoffset": False,
        "grid.color": rule,
        "grid.linewidth": 0.8,
        "xtick.color": muted,
        "ytick.color": muted,
        "xtick.labelcolor": muted,
        "ytick.labelcolor": muted,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
        "xtick.major.pad": 5,
        "ytick.major.pad": 5,
    }


def _inline(svg: str, label: str) -> Markup:
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        # Without namespaces: in HTML whatever stands within <svg> belongs to it.
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        for child in [child for child in element if child.tag.endswith(("metadata", "style"))]:
            element.remove(child)
        _tidy(element)
    _, _, width, height = root.attrib["viewBox"].split()
    root.attrib = {"viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": label}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _tidy(element: ElementTree.Element) -> None:
    """Variables for colours, tips, and no more digits than can be seen: half of the size."""
    element.tail = None
    if element.tag != "text":
        element.text = None
    if element.tag == "g":  # matplotlib numbers its groups from 1 in each picture
        gid = element.attrib.pop("id", "")
        if gid.startswith(_TIP):
            title = ElementTree.Element("title")
            element.insert(0, title)
            title.text = gid.removeprefix(_TIP)
    for name in element.attrib.keys() & {"d", "x", "y", "width", "height", "transform"}:
        value = " ".join(element.attrib[name].split())
        element.attrib[name] = re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", value)
    if "style" in element.attrib:
        styled = re.sub(r"font-family: [^;]*(; |$)", "", element.attrib["style"])
        found = re.compile(_PREFIX + "([0-9a-f]{2})")
        element.attrib["style"] = found.sub(lambda match: f"var(--{_VARIABLES[int(match[1], 16)]})", styled)
