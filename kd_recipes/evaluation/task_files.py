"""A user's own tasks: JSONL files of questions with choices, or of texts whose likelihood is wanted.

    {"question": "Where do fish live?", "choices": ["in water", "in trees"], "answer": 0}
    {"context": "The cat sat on the", "choices": ["mat", "moon"], "answer": "mat"}
    {"text": "A document, of which bits per byte are wanted."}

A question is asked as ``Question: …\\nAnswer:``; a context is continued as it stands. A space comes before each choice.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from kd_recipes.errors import ConfigError, Problem, gather, one_line

_PROMPTS = {"question": "Question: {}\nAnswer:", "context": "{}"}
_QUESTION = '{"question" or "context": text, "choices": [texts], "answer": index or text}'
_TEXT = '{"text": text}'
_MOST_PROBLEMS = 5  # that are told of one file


@dataclass(frozen=True)
class TaskFile:
    """A task of the user's.

    Args:
        path: as the user named it.
        name: the file's, without its suffix.
        output_type: what lm-evaluation-harness calls this kind of task.
        rows: ``prompt``, ``choices`` and ``answer``, an index; or ``text``.
    """

    path: str
    name: str
    output_type: Literal["multiple_choice", "loglikelihood_rolling"]
    rows: Sequence[dict[str, Any]]


def is_file(task: str) -> bool:
    """Whether a task is named by its file, rather than one of the harness's own."""
    return task.endswith((".json", ".jsonl")) or "/" in task


def read_task_files(tasks: Sequence[str]) -> list[TaskFile]:
    """The tasks that are files, in their order.

    Raises:
        ConfigError: a file that cannot be read or has a row of another form, with its line; two tasks of one name.
    """
    counts = Counter(_name(task) for task in tasks)
    twice = [task for task in tasks if is_file(task) and counts[_name(task)] > 1]
    if twice:
        wanted = "a file whose name no other task has"
        raise ConfigError(*(Problem(f"tasks.{_name(task)}", task, wanted) for task in twice))
    return gather(*(partial(_read, task) for task in tasks if is_file(task)))


def _name(task: str) -> str:
    return Path(task).stem if is_file(task) else task


class _WrongRow(ValueError):
    """A row that is no question and no text."""

    def __init__(self, got: object, wanted: str) -> None:
        super().__init__(wanted)
        self.got, self.wanted = got, wanted


def _read(file: str) -> TaskFile:
    key = f"tasks.{_name(file)}"
    try:
        lines = Path(file).read_text(encoding="utf-8").split("\n")  # not splitlines(): a text may hold U+2028
    except (OSError, ValueError) as error:
        raise ConfigError(Problem(key, file, f"a file that can be read ({one_line(error)})")) from error
    rows: list[dict[str, Any]] = []
    problems = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(_row(line, rows))
        except _WrongRow as error:
            problems.append(Problem(key, f"{error.got} in {file}, line {number}", error.wanted))
    if not rows and not problems:
        problems.append(Problem(key, file, "a row at least"))
    if problems:
        raise ConfigError(*problems[:_MOST_PROBLEMS])
    return TaskFile(file, _name(file), "loglikelihood_rolling" if "text" in rows[0] else "multiple_choice", rows)


def _row(line: str, before: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row as the harness wants it."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise _WrongRow(line[:40], f"JSON ({one_line(error)})") from error
    if not isinstance(row, dict):
        raise _WrongRow(row, f"{_QUESTION} or {_TEXT}")
    found = {"text": _text(row, "text")} if "text" in row else _question(row)
    if before and found.keys() != before[0].keys():
        raise _WrongRow(sorted(row), "questions alone or texts alone in a file")
    return found


def _text(row: dict[str, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise _WrongRow(f"{name}: {value!r}", f"a text as `{name}`")
    return value


def _question(row: dict[str, Any]) -> dict[str, Any]:
    names = [name for name in _PROMPTS if name in row]
    if len(names) != 1 or not {"choices", "answer"} <= row.keys():
        raise _WrongRow(sorted(row), f"{_QUESTION} or {_TEXT}")
    choices, answer = row["choices"], row["answer"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(_is_choice(choice) for choice in choices):
        raise _WrongRow(f"choices: {choices!r}", "two texts at least, without space around them")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise _WrongRow(f"answer: {answer!r}", f"one of the choices, or its index from 0 to {len(choices) - 1}")
    return {"prompt": _PROMPTS[names[0]].format(_text(row, names[0])), "choices": choices, "answer": answer}


def _is_choice(value: object) -> bool:
    return isinstance(value, str) and bool(value) and value == value.strip()
