"""The files of a report."""

from __future__ import annotations

import json
from pathlib import Path

from kd_recipes.evaluation.report.markdown import to_markdown
from kd_recipes.evaluation.report.page import to_html
from kd_recipes.evaluation.results import Evaluation


def write_report(evaluation: Evaluation, directory: Path) -> list[Path]:
    """Write what an evaluation found as ``evaluation.json``, ``evaluation.md`` and ``report.html``.

    Nothing but the evaluation enters, so that the same one gives the same bytes. Numbers that are not finite are null
    in JSON. What was not measured has no section.

    Args:
        evaluation: what was found.
        directory: is made where there is none; reports in it are replaced.

    Returns:
        The files.
    """
    contents = {
        "evaluation.json": to_json(evaluation),
        "evaluation.md": to_markdown(evaluation),
        "report.html": to_html(evaluation),
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        # Half of a surrogate pair, as a model may leave it, is no UTF-8: it is replaced.
        (directory / name).write_text(content, encoding="utf-8", errors="replace", newline="\n")
    return [directory / name for name in contents]


def to_json(evaluation: Evaluation) -> str:
    """JSON as its standard has it: what is not finite is null."""
    plain = json.loads(json.dumps(evaluation.to_json(), default=str), parse_constant=lambda name: None)
    return json.dumps(plain, indent=2, ensure_ascii=False) + "\n"
