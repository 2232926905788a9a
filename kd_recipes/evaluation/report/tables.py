"""The figures as tables of text, which page and Markdown then only set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kd_recipes.evaluation.cost import Cost
from kd_recipes.evaluation.diversity import Diversity
from kd_recipes.evaluation.report.comparison import Tone, change_tone, reference_of, task_tone
from kd_recipes.evaluation.report.formats import (
    MISSING,
    count,
    is_known,
    num_bytes,
    number,
    one_line,
    p_value,
    percent,
    ratio,
    spread,
    times,
)
from kd_recipes.evaluation.results import Evaluation, ModelResult, TaskFigures
from kd_recipes.evaluation.uncertainty import Estimate


@dataclass(frozen=True)
class Cell:
    """A figure.

    Args:
        text: itself.
        spread: ``± 0.012``, where it is an estimate.
        note: what it is beside the reference's, or what else has to be said; smaller, or in brackets.
        tone: whether a difference shows, and which.
    """

    text: str
    spread: str = ""
    note: str = ""
    tone: Tone = ""


@dataclass(frozen=True)
class Table:
    """Rows of figures.

    Args:
        title: of the group of columns.
        headings: of the columns; the first ``num_labels`` of a row say what it is about.
        rows: as long as ``headings``.
        notes: what has to be known to read it.
        num_labels: columns that are names.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: str = ""
    num_labels: int = 1


_SAID: dict[Tone, str] = {"": "", "better": "better", "worse": "worse", "same": "no difference"}

Column = tuple[str, Callable[[ModelResult, ModelResult], Cell]]

_QUALITY: tuple[Column, ...] = (
    ("bits per byte", lambda model, _: _estimate(model.text.bits_per_byte)),
    ("change", lambda model, _: _change(model.text.change)),
    ("perplexity", lambda model, _: Cell(number(_exp(model.text.cross_entropy.mean), 2))),
    ("accuracy", lambda model, _: _share_estimate(model.text.accuracy)),
    ("calibration error", lambda model, _: Cell(number(model.text.calibration_error))),
)
_DISTANCE: tuple[Column, ...] = (
    ("KL, mean", lambda model, _: _estimate(model.text.kl)),
    ("median", lambda model, _: Cell(number(model.text.kl_median))),
    ("99th percentile", lambda model, _: Cell(number(model.text.kl_p99, 2))),
    ("agreement", lambda model, _: _share_estimate(model.text.agreement)),
)


def _cost(
    of: Callable[[Cost], float | None], form: Callable[[float | None], str], relation: Callable[[float | None], str]
) -> Callable[[ModelResult, ModelResult], Cell]:
    """A column: a figure, and its ratio to the reference's."""

    def cell(model: ModelResult, reference: ModelResult) -> Cell:
        value = of(model.cost)
        to_reference = None if model is reference else ratio(value, of(reference.cost))
        return Cell(form(value), note="" if to_reference is None else relation(to_reference))

    return cell


def _share(of: float | None) -> str:
    return percent(of, 0)


_COST: tuple[Column, ...] = (
    ("parameters", _cost(lambda cost: cost.num_parameters, count, _share)),
    ("on disk", _cost(lambda cost: cost.num_bytes, num_bytes, _share)),
    ("peak memory", _cost(lambda cost: cost.peak_memory_bytes, num_bytes, _share)),
    ("prefill, tokens/s", _cost(lambda cost: cost.prefill_tokens_per_second, count, times)),
    ("decode, tokens/s", _cost(lambda cost: cost.decode_tokens_per_second, count, times)),
)


_OPENING = "commonest opening"
_DIVERSITY: dict[str, tuple[Callable[[Diversity], float], Callable[[float], str]]] = {
    "distinct-2": (lambda said: said.distinct_2, number),
    "rep-4": (lambda said: said.repetition_4, number),
    "self-BLEU": (lambda said: said.self_bleu, lambda value: number(value, 1)),
    _OPENING: (lambda said: said.commonest_opening, percent),
    "length": (lambda said: said.mean_length, lambda value: number(value, 1)),
    "ended": (lambda said: said.ended_share, percent),
}


def model_tables(evaluation: Evaluation) -> list[Table]:
    """All that is known of every model, in three groups of columns; what was measured of none is left out."""
    reference = reference_of(evaluation)
    at = reference.text
    text = f"{at.num_tokens:,} tokens, {at.num_bytes:,} bytes of held-out text; ± is half of a 95% interval"
    beside = f"against {reference.name}" if len(evaluation.models) > 1 else ""
    groups = (
        (
            "Quality",
            _QUALITY,
            f"{text}; change is bits per byte {beside} on the same text, paired." if beside else f"{text}.",
        ),
        (
            f"Distance from {reference.name}",
            _DISTANCE if beside else (),  # of a model from itself there is none
            f"KL({reference.name}, model) in nats a token.",
        ),
        ("Cost", _COST, f"Second figure: beside {reference.name}." if beside else ""),
    )
    tables = [_table(title, columns, evaluation.models, reference, notes) for title, columns, notes in groups]
    return [table for table in tables if len(table.headings) > 1]


def task_table(evaluation: Evaluation) -> Table | None:
    """A row for each task and model; None without tasks."""
    names = list(dict.fromkeys(name for model in evaluation.models for name in model.tasks))
    metrics = list(
        dict.fromkeys(metric for model in evaluation.models for task in model.tasks.values() for metric in task.metrics)
    )
    rows = [
        [Cell(name), Cell(model.name), *_of_task(model.tasks[name], metrics)]
        for name in names
        for model in evaluation.models
        if name in model.tasks
    ]
    if not rows:
        return None
    headings = ["task", "model", "items", *metrics, "lost", "won", "p"]
    notes = (
        f"Second figure: standard error. Lost: items that only {evaluation.reference} has right; won: that only "
        "this model has; p: McNemar's exact test of the two."
    )
    return without_empty(Table("Tasks", headings, rows, notes, num_labels=2))


def diversity_table(evaluation: Evaluation) -> Table | None:
    """What the models say when they are free to; None without prompts."""
    reference = reference_of(evaluation).diversity
    rows = [
        [Cell(model.name), *_of_diversity(model.diversity, None if model.diversity is reference else reference)]
        for model in evaluation.models
        if model.diversity is not None
    ]
    notes = (
        "Drawn at temperature 1. distinct-2: share of pairs of tokens that differ; rep-4: of four that repeat "
        "earlier ones; self-BLEU: likeness of the texts to each other, of 100; commonest opening: share of the texts "
        "that begin with it; length in tokens; ended: share that came to an end."
    )
    if reference is not None and len(rows) > 1:
        notes += f" Second figure: {evaluation.reference}."
    return without_empty(Table("Diversity", ["model", *_DIVERSITY], rows, notes)) if rows else None


def _table(
    title: str, columns: Iterable[Column], models: Iterable[ModelResult], reference: ModelResult, notes: str
) -> Table:
    columns = list(columns)
    rows = [
        [Cell(model.name, note=model.description), *(cell(model, reference) for _, cell in columns)] for model in models
    ]
    return without_empty(Table(title, ["model", *(heading for heading, _ in columns)], rows, notes))


def without_empty(table: Table) -> Table:
    """The table without columns in which nothing is known."""
    kept = [
        index
        for index in range(len(table.headings))
        if index < table.num_labels or any(row[index].text != MISSING for row in table.rows)
    ]
    rows = [[row[index] for index in kept] for row in table.rows]
    return Table(table.title, [table.headings[index] for index in kept], rows, table.notes, table.num_labels)


def _change(change: Estimate | None) -> Cell:
    if change is None or not is_known(change.mean):
        return Cell(MISSING)
    tone = change_tone(change)
    return Cell(number(change.mean, signed=True), spread(change), _SAID[tone], tone)


def _estimate(found: Estimate) -> Cell:
    return Cell(number(found.mean), spread(found))


def _share_estimate(found: Estimate) -> Cell:
    return Cell(percent(found.mean), spread(found, 1, 100))


def _of_task(task: TaskFigures, metrics: Sequence[str]) -> list[Cell]:
    cells = [Cell(f"{task.num_items:,}")]
    for metric in metrics:
        estimate = task.metrics.get(metric)
        error = None if estimate is None else estimate.standard_error
        note = number(error) if is_known(error) else ""
        cells.append(Cell(MISSING if estimate is None else number(estimate.mean), note=note))
    if task.changed is None:
        return [*cells, *[Cell(MISSING)] * 3]
    _, lost, won, _ = task.changed
    tone = task_tone(task)
    return [*cells, Cell(f"{lost:,}"), Cell(f"{won:,}"), Cell(p_value(task.p_value), note=_SAID[tone], tone=tone)]


def _of_diversity(found: Diversity, reference: Diversity | None) -> list[Cell]:
    cells = []
    for heading, (value, form) in _DIVERSITY.items():
        said = f"“{one_line(found.opening, 24)}”" if heading == _OPENING and found.opening else ""
        cells.append(Cell(form(value(found)), said, "" if reference is None else form(value(reference))))
    return cells


def _exp(value: float) -> float:
    """Perplexity of a cross entropy; infinite where a float ends."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
