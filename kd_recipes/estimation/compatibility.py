"""Whether student and teacher speak of the same tokens, and mark the ends of texts and turns alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from kd_recipes._torchtune import ModelSize
from kd_recipes.errors import ConfigError
from kd_recipes.parts import CHECKPOINTERS
from kd_recipes.tokenizers import HFTokenizer, hf_tokenizer, token_ids


@dataclass(frozen=True)
class Comparison:
    """One thing about both.

    Args:
        what: it is.
        student: what it is of the student.
        teacher: of the teacher; None where there is none.
        verdict: what follows.
    """

    what: str
    student: str
    teacher: str | None
    verdict: str = ""


@dataclass(frozen=True)
class _Side:
    size: ModelSize
    ids: Mapping[str, int] | None
    tokenizer: HFTokenizer | None

    def named(self, name: str) -> str:
        """A special token, with its id."""
        if self.tokenizer is None:
            return "?"
        index = getattr(self.tokenizer, name)
        return "none" if index is None else f"{self.tokenizer.backend.id_to_token(index)!r} ({index})"

    @property
    def stops(self) -> str:
        """The tokens that end a reply."""
        if self.tokenizer is None:
            return "?"
        return ", ".join(str(self.tokenizer.backend.id_to_token(index)) for index in self.tokenizer.stop_tokens)

    @property
    def template(self) -> str:
        """Its chat template."""
        if self.tokenizer is None:
            return "?"
        found = self.tokenizer.chat_template
        return "none" if found is None else found.source.strip()


def compare(cfg: DictConfig, sizes: Mapping[str, ModelSize]) -> list[Comparison]:
    """Compare what the files beside both checkpoints say.

    Args:
        cfg: of a distillation.
        sizes: ``model`` -> its size, and ``teacher_model`` where there is one.
    """
    sides = [_read(cfg, key, sizes[key]) for key in ("model", "teacher_model") if key in sizes]
    student, teacher = sides[0], sides[1] if len(sides) > 1 else None
    return [*_vocabularies(student, teacher), *_special_tokens(student, teacher)]


def _read(cfg: DictConfig, key: str, size: ModelSize) -> _Side:
    section = cfg[CHECKPOINTERS[key]]
    directory = Path(section.checkpoint_dir) if section is not None and "checkpoint_dir" in section else None
    if directory is None or not directory.is_dir():
        return _Side(size, None, None)
    try:
        tokenizer = hf_tokenizer(str(directory)) if (directory / "tokenizer.json").is_file() else None
        return _Side(size, token_ids(directory), tokenizer)
    except ConfigError:  # preflight says what is wrong with it
        return _Side(size, None, None)


def _vocabularies(student: _Side, teacher: _Side | None) -> Iterator[Comparison]:
    verdict = ""
    if teacher is not None and student.ids is not None and teacher.ids is not None:
        others = sorted((index, token) for token, index in student.ids.items() if teacher.ids.get(token) != index)
        verdict = "the same map" if not others else f"differ, first at {others[0][0]}: {others[0][1]!r}"
    yield Comparison("tokens", _count(student.ids), _count(teacher.ids) if teacher else None, verdict)
    rows = [side.size.num_rows for side in (student, teacher) if side is not None]
    verdict = f"compared over the first {min(rows):,}" if len(set(rows)) > 1 else ""
    yield Comparison("rows of the head", f"{rows[0]:,}", f"{rows[-1]:,}" if teacher else None, verdict)
    lengths = [side.size.max_seq_len for side in (student, teacher) if side is not None]
    yield Comparison("positions", f"{lengths[0]:,}", f"{lengths[-1]:,}" if teacher else None)


def _special_tokens(student: _Side, teacher: _Side | None) -> Iterator[Comparison]:
    names = {"beginning of text": "bos_id", "end of text": "eos_id", "padding": "pad_id"}
    for what, name in names.items():
        mine, other = student.named(name), teacher.named(name) if teacher else None
        is_other = name != "pad_id" and _differ(mine, other)  # padding never enters the loss
        yield Comparison(what, mine, other, _OTHER_ENDS if is_other else "")
    stops = student.stops, teacher.stops if teacher else None
    yield Comparison("ends a reply", *stops, _OTHER_ENDS if _differ(*stops) else "")
    mine, other = student.template, teacher.template if teacher else None
    verdict = _OTHER_TEMPLATE if _differ(mine, other) else "the same" if mine == other and mine != "?" else ""
    yield Comparison("chat template", _size(mine), _size(other) if other else None, verdict)


_OTHER_ENDS = "differ: the student learns the teacher's habit with tokens that mean something else to it"


_OTHER_TEMPLATE = "differ: data is written in the tokenizer's, and the teacher knows its own"


def _size(template: str) -> str:
    return template if template in ("?", "none") else f"{len(template):,} characters"


def _differ(mine: str, other: str | None) -> bool:
    return other is not None and "?" not in (mine, other) and mine != other


def _count(ids: Mapping[str, int] | None) -> str:
    return "?" if ids is None else f"{len(ids):,}"
