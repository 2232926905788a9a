"""What a user is told when the input is wrong: key, value, what was wanted, remedy; all problems at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing wrong with the input.

    Args:
        key: dotted path of the setting, as the user writes it (``optimizer.lr``).
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
