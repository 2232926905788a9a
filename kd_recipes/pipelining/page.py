"""A pipeline's one report: its steps, and what each says of its result, as Markdown and as one HTML file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from markupsafe import Markup, escape

from kd_recipes.pipelining.summary import HEAD, Row

_TEMPLATE = "pipeline.html.j2"
_PIPE = re.compile(r"(?<!\\)\|")
_BOLD = re.compile(r"\*\*(.+?)\*\*")
_ESCAPED = re.compile(r"\\([\\`*|\[\]~$_<&])")


def write_page(directory: Path, rows: Sequence[Row], css: str) -> str:
    """Write report.md and report.html.

    Args:
        directory: of the pipeline.
        rows: of its steps.
        css: of the page.

    Returns:
        The table of the steps, for the screen.
    """
    from jinja2 import Environment, PackageLoader

    table = "\n".join([_line(HEAD), _line(["---"] * len(HEAD)), *(_line(row.cells) for row in rows)])
    texts = [f"## {row.name}\n\n{row.text}" for row in rows if row.text]
    (directory / "report.md").write_text("\n\n".join([table, *texts]) + "\n", encoding="utf-8")
    environment = Environment(loader=PackageLoader("kd_recipes.pipelining", "."), autoescape=True, trim_blocks=True)
    html = environment.get_template(_TEMPLATE).render(
        css=Markup(css), title=_title(rows), name=directory.name, head=HEAD, rows=rows, as_html=as_html
    )
    (directory / "report.html").write_text(html, encoding="utf-8", errors="replace")
    return f"\n{table}\n\nWrote {directory / 'report.html'}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _title(rows: Sequence[Row]) -> str:
    """What an evaluation has found, else how far the pipeline has come."""
    said = next((match[1] for row in rows if (match := _BOLD.match(row.text))), None)
    if said is not None:
        return _ESCAPED.sub(r"\1", said)
    running = [row for row in rows if row.recipe]
    num_done = sum(row.status in ("done", "unchanged") for row in running)
    return f"{num_done} of {len(running)} steps are done"


def as_html(text: str) -> Markup:
    """What the recipes' Markdown has in it: headings, paragraphs, lists and tables."""
    return Markup("\n").join(_blocks(text))


def _blocks(text: str) -> Iterator[Markup]:
    for block in re.split(r"\n{2,}", text.strip()):
        lines = block.splitlines()
        if lines[0].startswith("#"):
            yield Markup("<h3>{}</h3>").format(_inline(lines[0].lstrip("# ")))
        elif lines[0].startswith("|"):
            yield _table(lines)
        elif all(line.startswith("- ") for line in lines):
            items = Markup("").join(Markup("<li>{}</li>").format(_inline(line[2:])) for line in lines)
            yield Markup("<ul>{}</ul>").format(items)
        else:
            yield Markup("<p>{}</p>").format(_inline(" ".join(lines)))


def _table(lines: Sequence[str]) -> Markup:
    head, _, *body = ([cell.strip() for cell in _PIPE.split(line)[1:-1]] for line in lines)
    top = Markup('<th scope="col" class="label">{}</th>').format(_inline(head[0]))
    top += Markup("").join(Markup('<th scope="col">{}</th>').format(_inline(cell)) for cell in head[1:])
    rows = Markup("\n").join(Markup("<tr>{}</tr>").format(_cells(cells)) for cells in body)
    table = Markup("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(top, rows)
    return Markup('<div class="scroll" tabindex="0">{}</div>').format(table)


def _cells(cells: Sequence[str]) -> Markup:
    first, *others = cells
    label = Markup('<th scope="row" class="label">{}</th>').format(_inline(first))
    return label + Markup("").join(Markup("<td>{}</td>").format(_inline(cell)) for cell in others)


def _inline(text: str) -> Markup:
    """One line, escaped; bold text and what a backslash protects are as meant."""
    bold = _BOLD.sub(r"<b>\1</b>", str(escape(text)))
    return Markup(_ESCAPED.sub(r"\1", bold))
