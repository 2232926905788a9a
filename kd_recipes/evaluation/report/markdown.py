"""The report as Markdown: for a terminal, a README, a pull request."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from kd_recipes.evaluation.report.formats import one_line
from kd_recipes.evaluation.report.runs import alerts_of
from kd_recipes.evaluation.report.samples import side_by_side
from kd_recipes.evaluation.report.tables import Cell, Table, diversity_table, model_tables, task_table
from kd_recipes.evaluation.report.training import training_table
from kd_recipes.evaluation.report.verdict import verdict
from kd_recipes.evaluation.results import Evaluation

# What Markdown gives a meaning to within a line, and only where it does, so that names stay legible in a terminal.
_SPECIAL = re.compile(r"[\\`*|\[\]~$]|(?<!\w)_|_(?!\w)|<(?=[A-Za-z/!?])|&(?=[A-Za-z#])")


def escape(text: str) -> str:
    """One line that Markdown shows as it is: no cell, emphasis, link, picture or HTML can come of it."""
    return _SPECIAL.sub(r"\\\g<0>", one_line(text))


def to_markdown(evaluation: Evaluation) -> str:
    """Verdict, tables, alerts and samples."""
    return "\n\n".join(_blocks(evaluation)) + "\n"


def _blocks(evaluation: Evaluation) -> Iterator[str]:
    first, *remarks = (escape(sentence) for sentence in verdict(evaluation))
    yield f"**{first}**"
    if remarks:
        yield " ".join(remarks)
    described, *tables = model_tables(evaluation)
    # What the models are is said once.
    tables = [replace(it, rows=[[replace(row[0], note=""), *row[1:]] for row in it.rows]) for it in tables]
    for table in (described, *tables, *(find(evaluation) for find in (task_table, diversity_table, training_table))):
        if table is not None:
            yield f"### {escape(table.title)}"
            yield _set(table)
            if table.notes:
                yield escape(table.notes)
    if alerts := alerts_of(evaluation):
        yield "### Alerts"
        yield "\n".join(
            _item(f"{it.run}, step {it.step}, {it.signal}", f"{it.message}. To do: {it.remedy}") for it in alerts
        )
    if prompts := side_by_side(evaluation):
        yield "### Samples"
        yield "Greedy continuations."
        for it in prompts:
            yield f"Prompt: {escape(it.prompt)}"
            yield "\n".join(_item(name, sample.text) for name, sample in it.samples)


def _set(table: Table) -> str:
    """Padded, so that it can be read as it stands."""
    rows = [[escape(heading) for heading in table.headings], *([_text(cell) for cell in row] for row in table.rows)]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    is_label = [index < table.num_labels for index in range(len(widths))]
    rule = ["-" * width if label else "-" * (width - 1) + ":" for width, label in zip(widths, is_label, strict=True)]
    lines = (
        " | ".join(
            text.ljust(width) if label else text.rjust(width)
            for text, width, label in zip(row, widths, is_label, strict=True)
        )
        for row in (rows[0], rule, *rows[1:])
    )
    return "\n".join(f"| {line} |" for line in lines)


def _text(cell: Cell) -> str:
    note = f"({cell.note})" if cell.note else ""
    return escape(" ".join(part for part in (cell.text, cell.spread, note) if part))


def _item(name: str, text: str) -> str:
    return f"- **{escape(name)}**: {escape(text)}"
