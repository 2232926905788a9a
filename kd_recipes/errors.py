"""What a user is told when the input is wrong: key, value, what was wanted, remedy; all problems at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """One thing wrong with the input.

    Args:
        key: dotted path of the setting, as the user writes it (``optimizer.lr``); one that begins with a dot is of a
            section whose name :func:`within` knows, and an empty one is that section.
        got: the value found there.
        wanted: what would have been valid.
        remedy: what to do about it; empty where ``wanted`` says it all.
    """

    key: str
    got: object
    wanted: str
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.key}: got {self.got!r}, wanted {self.wanted}"
        return f"{text}. {self.remedy}" if self.remedy else text


class ConfigError(ValueError):
    """A user's mistake. Carries every :class:`Problem` that was found, not only the first."""

    def __init__(self, *problems: Problem) -> None:
        self.problems = problems
        super().__init__("\n".join(f"  - {problem}" for problem in problems))


class RunError(RuntimeError):
    """A run that has begun cannot go on, for a reason that its user can do something about; says which and what."""

    exit_status = 1


class TeacherAwayError(RunError):
    """A teacher on another machine gives no answers any more; what has been computed by then is good."""


def one_line(error: Exception) -> str:
    """What an exception says, with its type where that is needed to understand it (``KeyError('text')``)."""
    text = " ".join(str(error).split())
    return text if len(text.split()) > 1 else f"{type(error).__name__}: {text}"


def within(section: str, check: Callable[[], T]) -> T:
    """The result of a check that does not know which section its settings come from.

    Raises:
        ConfigError: the check's own, with whole keys.
    """
    try:
        return check()
    except ConfigError as error:
        whole = (replace(p, key=section + p.key) if p.key[:1] in ("", ".") else p for p in error.problems)
        raise ConfigError(*whole) from error


def renamed(key: str, check: Callable[[], T]) -> T:
    """The result of a check that speaks of a setting by another name than the config's.

    Raises:
        ConfigError: the check's own, about ``key``.
    """
    try:
        return check()
    except ConfigError as error:
        raise ConfigError(*(replace(problem, key=key) for problem in error.problems)) from error


def problems_of(check: Callable[[], object]) -> tuple[Problem, ...]:
    """What a check finds wrong; nothing where it passes."""
    try:
        check()
    except ConfigError as error:
        return error.problems
    return ()


def gather(*checks: Callable[[], Any]) -> list[Any]:
    """The results of all checks.

    Raises:
        ConfigError: with the problems of every check that fails.
    """
    results: list[Any] = []
    problems: list[Problem] = []
    for check in checks:
        try:
            results.append(check())
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems)
    return results
