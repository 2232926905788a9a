"""What a page of Markdown, or a config's header, tells its reader to type, to read, and to click."""

from __future__ import annotations

import importlib.util
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SITE = DOCS / "mkdocs" / "mkdocs.yml"
_ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")


def hooks() -> Any:
    """The module that makes the site's generated pages; mkdocs is not needed for that."""
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "mkdocs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(markdown: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", markdown, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The words of every command: what stands after ``$ ``, and indented code that starts a recipe or ``kd-recipes``.

    A block of ``text`` shows what was seen, and is not to be typed.
    """
    typed = re.sub(r"^```text\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    joined = typed.replace("\\\n", " ")
    lines = re.findall(r"^(?:\$ | {2,}(?=tune run |kd-recipes ))(.+)$", joined, flags=re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


@dataclass(frozen=True)
class Run:
    """A recipe that is started by ``tune run``.

    Args:
        recipe: its name.
        config: what ``--config`` names.
        overrides: ``key=value`` words, and options of the recipe's own.
    """

    recipe: str
    config: str
    overrides: list[str]


def tune_run(words: list[str]) -> Run | None:
    """A command, if it is ``tune run`` with a recipe of the package; torchrun's options are left out."""
    words = words[1:] if words and _ASSIGNMENT.fullmatch(words[0]) else words
    if words[:2] != ["tune", "run"]:
        return None
    names = (re.match(r"kd_recipes[./](\w+)", word) for word in words)
    start, name = next((index, match[1]) for index, match in enumerate(names) if match)
    option, config, *overrides = words[start + 1 :]
    assert option == "--config"
    return Run(name, config, overrides)


def links(markdown: str) -> list[tuple[str, str]]:
    """Path and anchor of every link that stays within the project; within its own page the path is empty."""
    prose = re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]*))?\)", prose)


def anchors(markdown: str) -> set[str]:
    """What a heading is called in a link, on the site as on GitHub."""
    prose = re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}
