"""A model on tasks: lm-evaluation-harness's own, whose data it downloads, and a user's files, which need no network."""

from __future__ import annotations

import importlib.util
import math
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from kd_recipes.errors import ConfigError, Problem, gather, one_line
from kd_recipes.evaluation.results import TaskFigures
from kd_recipes.evaluation.task_files import TaskFile, is_file, read_task_files
from kd_recipes.evaluation.uncertainty import Estimate, flips, ratio_with_interval

_SEED = 1234  # of few-shot examples and of what tasks shuffle; the harness's default
_RESAMPLES = 1000  # for the standard error of metrics that are no means
_Z = 1.96  # standard errors to either end of a 95% interval
_OF_TEXT = ("bits_per_byte", "byte_perplexity", "word_perplexity")
# what a choice's log-likelihood is divided by
_LENGTHS: dict[str, Callable[[str], int]] = {
    "acc": lambda _: 1,
    "acc_norm": len,
    "acc_bytes": lambda choice: len(choice.encode()),
}
# in the name of a metric that is 1 for a right answer and 0 for a wrong one
_SAYS_RIGHT = ("acc", "exact_match", "pass@1")


def check_tasks(tasks: Sequence[str], num_fewshot: int | None = None) -> list[TaskFile]:
    """Find every mistake in a list of tasks before a model is loaded; returns those that are files.

    Raises:
        ConfigError: as :func:`run_tasks`.
    """
    if importlib.util.find_spec("lm_eval") is None:
        remedy = "pip install 'kd-recipes[eval]'"
        raise ConfigError(Problem("tasks", list(tasks), "no tasks where lm-eval is not installed", remedy))
    files, *_ = gather(partial(read_task_files, tasks), *(partial(_check_name, task) for task in tasks))
    few = [file for file in files if file.output_type == "multiple_choice" and len(file.rows) <= (num_fewshot or 0)]
    if few:
        wanted = f"more rows than num_fewshot={num_fewshot}"
        raise ConfigError(*(Problem(f"tasks.{file.name}", f"{len(file.rows)} rows", wanted) for file in few))
    return files  # type: ignore[no-any-return]


def _check_name(task: str) -> None:
    if is_file(task) or task in _manager().all_tasks:
        return
    close = get_close_matches(task, _manager().all_tasks, n=3)
    remedy = f"Did you mean {' or '.join(close)}?" if close else "lm-eval ls tasks prints them"
    raise ConfigError(Problem(f"tasks.{task}", task, "a task of lm-evaluation-harness, or a .jsonl file", remedy))


@cache
def _manager() -> Any:
    """The harness's own tasks; half a minute, since it reads 14,000 files."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def run_tasks(
    lm: Any, tasks: Sequence[str], limit: int | None = None, num_fewshot: int | None = None
) -> dict[str, TaskFigures]:
    """Ask a model, through lm-evaluation-harness.

    Args:
        lm: any of the harness's models; see :class:`~kd_recipes.evaluation.language_model.DecoderLM`.
        tasks: names of the harness's tasks, groups and tags, and JSONL files
            (:mod:`~kd_recipes.evaluation.task_files`).
        limit: items of each task, from its beginning; None for all.
        num_fewshot: examples before each question, drawn with a fixed seed; None for what each task says.

    Returns:
        By name: of each file without its suffix, of each task, of a tag's or an unaggregated group's tasks, and one of
        a group that says how to aggregate.

    Raises:
        ConfigError: a file is missing, or a row of another form; a task is not known, or its data cannot be loaded.
    """
    from lm_eval.evaluator import evaluate

    files = check_tasks(tasks, num_fewshot)
    random.seed(_SEED)  # some tasks shuffle their choices when they are loaded
    np.random.seed(_SEED)
    loaded = {task: _load(task, files) for task in tasks}
    leaves = {name: leaf for found in loaded.values() for name, leaf in found["tasks"].items()}
    for leaf in leaves.values():
        _set_fewshot(leaf, num_fewshot)
    groups = {name: group for found in loaded.values() for name, group in found["groups"].items()}
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # else it forks a process that may hold a GPU, to resample
    found = evaluate(lm, {"tasks": leaves, "groups": groups}, limit=limit, bootstrap_iters=_RESAMPLES)
    figures = {name: _figures(leaf, found["results"][name], found["samples"][name]) for name, leaf in leaves.items()}
    asked: dict[str, TaskFigures] = {}
    for task, of_task in loaded.items():
        parts = {name: figures[name] for name in of_task["tasks"]}
        is_whole = task in groups and groups[task].has_aggregation
        asked |= {task: _joined(list(parts.values()), found["results"][task])} if is_whole else parts
    return asked


def compare_tasks(result: TaskFigures, reference: TaskFigures) -> TaskFigures:
    """A model's figures with what changed against another's on the same items, where the task tells right from wrong.

    McNemar, "Note on the sampling error of the difference between correlated proportions", 1947.
    """
    if not result.correct:
        return result
    assert len(result.correct) == len(reference.correct), "the same items"
    changed, p_value = flips(reference.correct, result.correct)
    return replace(result, changed=changed, p_value=p_value)


def _load(task: str, files: Sequence[TaskFile]) -> Mapping[str, Any]:
    """``tasks`` and ``groups`` that a name stands for."""
    if is_file(task):
        from kd_recipes.evaluation.local_task import LocalTask

        file = next(file for file in files if file.path == task)
        return {"tasks": {file.name: LocalTask(file)}, "groups": {}}
    try:
        return _manager().load([task])  # type: ignore[no-any-return]
    except Exception as error:  # of the harness, of datasets, or of a network that is not there
        wanted, why = "a task whose data can be loaded", f"{one_line(error)}; files need no network"
        raise ConfigError(Problem(f"tasks.{task}", task, wanted, why)) from error


def _set_fewshot(task: Any, num_fewshot: int | None) -> None:
    """As the harness's own command does: a task that says 0 keeps it."""
    default = task.get_config("num_fewshot")
    if default != 0 and (num_fewshot is not None or default is None):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=_SEED)


def _figures(task: Any, result: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> TaskFigures:
    """What the harness found of one task; of several ways to read an answer, items are judged by the first."""
    items = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    names = [name for name in task.aggregation() if any(part in name for part in _SAYS_RIGHT)]
    judge = next((name for name in names if all(item.get(name) in (0, 1) for item in items)), None)
    is_choice = task.OUTPUT_TYPE == "multiple_choice" and judge in _LENGTHS
    return TaskFigures(
        num_items=len(items),
        metrics=_metrics(result, items),
        correct=[bool(item[judge]) for item in items] if judge else [],
        choices=[_choice(task.doc_to_choice(item["doc"]), item, str(judge)) for item in items] if is_choice else [],
    )


def _choice(choices: Sequence[str], item: Mapping[str, Any], judge: str) -> int:
    """The index of the likeliest; some metrics ask for choices without their question, after those with it."""
    log_likelihoods = [log_likelihood for log_likelihood, _ in item["filtered_resps"]]
    scores = [value / _LENGTHS[judge](choice) for value, choice in zip(log_likelihoods, choices, strict=False)]
    return scores.index(max(scores))


def _joined(parts: Sequence[TaskFigures], result: Mapping[str, Any]) -> TaskFigures:
    """A group's figures."""
    correct = [is_right for part in parts for is_right in part.correct]
    choices = [choice for part in parts for choice in part.choices]
    return TaskFigures(sum(part.num_items for part in parts), _metrics(result, []), correct, choices)


def _metrics(result: Mapping[str, Any], items: Sequence[Mapping[str, Any]]) -> dict[str, Estimate]:
    metrics = {}
    for key, value in result.items():
        name, _, reading = key.partition(",")
        if not reading or name.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        # a text's log-likelihood, and its words or bytes
        pairs = [item[name] for item in items if isinstance(item.get(name), tuple)]
        error = result.get(f"{name}_stderr,{reading}")
        label = name if reading == "none" else f"{name} ({reading})"
        if name in _OF_TEXT and len(pairs) == len(items) > 0:
            metrics[label] = _of_texts(name, pairs)
        else:
            metrics[label] = _with_error(float(value), float(error) if isinstance(error, (int, float)) else math.nan)
    return metrics


def _of_texts(name: str, pairs: Sequence[tuple[float, int]]) -> Estimate:
    """What the harness gives without a standard error, as all of them depend on the same ratio."""
    log_likelihoods, counts = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    nats = ratio_with_interval(-log_likelihoods, counts)
    if name == "bits_per_byte":
        return Estimate(*(value / math.log(2) for value in (nats.mean, nats.standard_error, nats.low, nats.high)))
    mean, low, high = torch.tensor([nats.mean, nats.low, nats.high], dtype=torch.float64).exp().tolist()
    return Estimate(mean, mean * nats.standard_error, low, high)


def _with_error(mean: float, error: float) -> Estimate:
    return Estimate(mean, error, mean - _Z * error, mean + _Z * error)
