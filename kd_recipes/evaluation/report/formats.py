"""Numbers as people read them: the same in verdict, table, picture and Markdown."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kd_recipes.evaluation.uncertainty import Estimate

MISSING = "–"
_MINUS = "\N{MINUS SIGN}"
_NO_BREAK = "\N{NO-BREAK SPACE}"  # a figure and its unit stay on one line


def is_known(value: float | None) -> bool:
    """Whether it was measured: neither None nor nan nor infinite."""
    return value is not None and math.isfinite(value)


def number(value: float | None, digits: int = 3, *, signed: bool = False) -> str:
    """``1,234.500``; with a sign also where it is positive, if wanted."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:{'+' if signed else ''},.{digits}f}".replace("-", _MINUS)


def percent(value: float | None, digits: int = 1) -> str:
    """A share: ``43.6%``."""
    return number(None if value is None else 100 * value, digits) + ("%" if is_known(value) else "")


def half_width(estimate: Estimate) -> float:
    """Of its interval."""
    return (estimate.high - estimate.low) / 2


def interval(estimate: Estimate | None, digits: int = 3, *, signed: bool = False) -> str:
    """``0.879 ± 0.012``: the mean and half of its interval."""
    if estimate is None or not is_known(estimate.mean):
        return MISSING
    return f"{number(estimate.mean, digits, signed=signed)}{_NO_BREAK}{spread(estimate, digits)}".rstrip()


def spread(estimate: Estimate | None, digits: int = 3, scale: float = 1.0) -> str:
    """``± 0.012``: half of the interval, of the mean times ``scale``."""
    half = math.nan if estimate is None else scale * half_width(estimate)
    return f"±{_NO_BREAK}{number(half, digits)}" if is_known(half) else ""


def share_interval(estimate: Estimate) -> str:
    """``43.6 ± 1.2%``."""
    mean = percent(estimate.mean)
    half = spread(estimate, 1, 100)
    return f"{mean.removesuffix('%')}{_NO_BREAK}{half}%" if half and mean.endswith("%") else mean


def count(value: float | None, *, unit: str = "") -> str:
    """With three to four digits and a decimal prefix: ``134.5 M``, ``269 MB``."""
    if value is None or not math.isfinite(value):
        return MISSING
    exponent = 0
    while value >= 1000 and exponent < 4:
        value /= 1000
        exponent += 1
    prefix = ("", "k", "M", "G", "T")[exponent]
    if not unit:
        prefix = prefix.replace("G", "B")  # a billion parameters
    digits = 0 if value == int(value) else 2 if value < 10 else 1 if value < 100 or (exponent and not unit) else 0
    return f"{value:.{digits}f}{_NO_BREAK}{prefix}{unit}".rstrip()


def num_bytes(value: float | None) -> str:
    """``269 MB``; a megabyte is 10^6 bytes."""
    return count(value, unit="B")


def ratio(value: float | None, of: float | None) -> float | None:
    """``value / of``, where both are known."""
    if value is None or of is None or not math.isfinite(value) or not math.isfinite(of) or of == 0:
        return None
    return value / of


def times(value: float | None) -> str:
    """A ratio: ``1.3×``, two digits below one."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:.{2 if value < 0.95 else 1 if value < 9.95 else 0}f}×"


def p_value(value: float | None) -> str:
    """``0.012``, ``< 0.001``."""
    if value is None or not math.isfinite(value):
        return MISSING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def one_line(text: str, limit: int | None = None) -> str:
    """With single spaces for all white space and nothing that cannot be printed, cut at ``limit`` characters."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))
    return text if limit is None or len(text) <= limit else text[: limit - 1].rstrip() + "…"
