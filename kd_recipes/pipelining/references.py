"""``step:pruned|teacher/tokenizer.json``: how a step's settings name what another step leaves."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_recipes.errors import Problem

# steps, of which the first that is there counts; whether it may be none; what lies in it
_REFERENCE = re.compile(r"step:([\w-]+(?:\|[\w-]+)*)(\?)?(/.*)?")
_LEFT_OUT: Any = object()


@dataclass(frozen=True)
class Surroundings:
    """What a step can refer to.

    Args:
        places: what the step itself and those before it leave, by name; what is left out has none.
        left_out: names of steps that do not run.
        all_names: of the pipeline's steps.
    """

    places: Mapping[str, Path]
    left_out: Collection[str]
    all_names: Collection[str]

    def resolve(self, node: Any, problems: list[Problem], path: str = "") -> Any:
        """Settings with paths for references; those that may be missing and are, are left out of their section.

        Args:
            node: mappings, lists and values.
            problems: is added to.
            path: the dotted key of ``node``.
        """
        if isinstance(node, dict):
            found = {key: self.resolve(value, problems, f"{path}.{key}") for key, value in node.items()}
            return {key: value for key, value in found.items() if value is not _LEFT_OUT}
        if isinstance(node, list):
            values = [self.resolve(value, problems, f"{path}[{index}]") for index, value in enumerate(node)]
            return [value for value in values if value is not _LEFT_OUT]
        match = _REFERENCE.fullmatch(node) if isinstance(node, str) else None
        if match is None:
            return node
        names, is_optional, rest = match[1].split("|"), match[2], match[3] or ""
        found_problems = [problem for name in names if (problem := self._problem(name, node, path))]
        problems += found_problems
        there = next((self.places[name] for name in names if name in self.places), None)
        if there is not None or is_optional or found_problems:
            return _LEFT_OUT if there is None else f"{there}{rest}"
        remedy = f"Leave this step out as well, or name what takes its place: step:{match[1]}|other"
        problems.append(Problem(path, node, "a step that is not left out", remedy))
        return node

    def _problem(self, name: str, node: str, path: str) -> Problem | None:
        if name in self.places or name in self.left_out:
            return None
        if name in self.all_names:
            return Problem(path, node, f"a step that comes before: `{name}` comes after")
        near = difflib.get_close_matches(name, self.all_names, n=1)
        remedy = f"Did you mean `{near[0]}`?" if near else "`enabled: False` leaves one out; it stays in the config"
        return Problem(path, node, f"one of the steps {', '.join(self.all_names)}", remedy)


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings and lists, with their dotted keys."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from leaves(value, f"{path}[{index}]")
    else:
        yield path, node
