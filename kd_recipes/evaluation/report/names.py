"""The names of points, where they cover nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from kd_recipes.evaluation.report.formats import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LIMIT = 24  # characters


def draw_names(axes: Axes, names: Mapping[tuple[float, float], str]) -> None:
    """Write each name beside its point; one for which there is no place is left out.

    Args:
        axes: with its limits set.
        names: of points, the most important first.
    """
    from matplotlib.transforms import Bbox

    labels = [
        axes.annotate(one_line(name, _LIMIT), point, (0, 0), textcoords="offset points", in_layout=False)
        for point, name in names.items()
    ]
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # it is laid out, and must not move under the names
    room = axes.get_window_extent()
    points = [axes.transData.transform(label.xy) for label in labels]
    taken = [Bbox.from_extents(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    for label, (x, y) in zip(labels, points, strict=True):
        extent = label.get_window_extent()
        for dx, dy in _offsets(extent.width, extent.height):
            box = Bbox.from_bounds(x + dx, y + dy, extent.width, extent.height)
            is_inside = room.x0 <= box.x0 and box.x1 <= room.x1 and room.y0 <= box.y0 and box.y1 <= room.y1
            if is_inside and not box.count_overlaps(taken):
                label.set_position((dx, dy))
                taken.append(box)
                break
        else:
            label.set_visible(False)


def _offsets(width: float, height: float) -> Iterator[tuple[float, float]]:
    """From a point to the lower left corner of its name: right, left, above, below, then the corners, then further."""
    level = 1 - height / 2
    for gap in (9.0, 18.0):
        left, below = -width - gap, -height - gap
        yield from ((gap, level), (left, level), (-width / 2, gap), (-width / 2, below))
        yield from ((gap, gap / 2), (left, gap / 2), (gap, below), (left, below))
