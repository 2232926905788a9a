"""How a student talks, beside its teacher: both go on from the same prompts, drawn at temperature 1."""

# N texts, L new tokens, B texts in a batch, S positions

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder

from kd_recipes.batch import IGNORE_INDEX, Batch
from kd_recipes.evaluation.diversity import Diversity, Generated, measure_diversity
from kd_recipes.evaluation.exposure import measure_exposure
from kd_recipes.evaluation.generation import generate, text_of, with_texts
from kd_recipes.evaluation.tokens import token_values
from kd_recipes.signals import DenseSignal

Signal = Callable[[Batch], DenseSignal]
_BATCH = 8
_SHORT = 0.125  # of the new tokens: where errors have not added up yet


@dataclass(frozen=True)
class Speaker:
    """A model that makes texts, and what it says of others'.

    Args:
        model: with or without its head.
        signal: batch -> its distribution.
        device: of the batches that it takes.
    """

    model: TransformerDecoder
    signal: Signal
    device: torch.device


class Behaviour:
    """Measures students against a teacher, whose texts are made once.

    Args:
        teacher: the teacher.
        prompts: ids, at least one each.
        tokenizer: of torchtune's protocol.
        num_ids: ids that student and teacher share.
        max_new_tokens: of a text.
        seed: of what is drawn; the same for student and teacher, and at each evaluation.
    """

    def __init__(
        self,
        teacher: Speaker,
        prompts: Sequence[Sequence[int]],
        tokenizer: Any,
        *,
        num_ids: int,
        max_new_tokens: int,
        seed: int = 0,
    ) -> None:
        self._teacher, self._prompts, self._tokenizer = teacher, prompts, tokenizer
        self._num_ids, self._max_new_tokens, self._seed = num_ids, max_new_tokens, seed

    @cached_property
    def _theirs(self) -> tuple[list[Generated], dict[str, float]]:
        """The teacher's texts and their numbers, made at the first evaluation."""
        texts = self._texts(self._teacher)
        return texts, numbers(measure_diversity(texts))

    def measure(self, student: Speaker) -> tuple[dict[str, float], dict[str, float], list[dict[str, str]]]:
        """The student's numbers, the teacher's under the same names, and the texts side by side.

        Numbers are those of :class:`Diversity`, and of the student ``exposure_short`` and ``exposure_long``: ExAccErr
        (:mod:`kd_recipes.evaluation.exposure`) at an eighth of the texts' length and at its end.
        """
        teacher_texts, teacher_numbers = self._theirs
        said = self._texts(student)
        own_NL, others_NL = self._kl(student, said), self._kl(student, teacher_texts)
        exposure = measure_exposure(own_NL, others_NL, min_texts=max(1, len(said) // 2))
        lengths = {"exposure_short": max(1, int(_SHORT * self._max_new_tokens)), "exposure_long": self._max_new_tokens}
        grown = {name: exposure.at(length) for name, length in lengths.items()}
        samples = [
            {"prompt": text_of(self._tokenizer, prompt), "teacher": theirs.text, "student": ours.text}
            for prompt, theirs, ours in zip(self._prompts, teacher_texts, said, strict=True)
        ]
        return numbers(measure_diversity(said)) | grown, teacher_numbers, samples

    def _texts(self, speaker: Speaker) -> list[Generated]:
        found = generate(
            speaker.model,
            self._prompts,
            max_new_tokens=self._max_new_tokens,
            temperature=1.0,
            stop_ids=self._tokenizer.stop_tokens,
            seed=self._seed,
            num_ids=self._num_ids,
        )
        return with_texts(self._tokenizer, found)

    @torch.no_grad()
    def _kl(self, student: Speaker, texts: Sequence[Generated]) -> Tensor:
        """KL(teacher || student) ``[N, L]`` at the texts' positions; nan after a text's end."""
        kl_NL = torch.full((len(texts), self._max_new_tokens), torch.nan)
        for start in range(0, len(texts), _BATCH):
            rows = range(start, min(start + _BATCH, len(texts)))
            batch = _batch([(self._prompts[row], texts[row].ids) for row in rows], student.device)
            found = token_values(student.signal(batch), self._teacher.signal(batch), batch, num_ids=self._num_ids)
            for place, row in enumerate(rows):
                kl_N = found.values["kl"][found.rows_N == place] if found.values else torch.empty(0)
                kl_NL[row, : len(kl_N)] = kl_N
        return kl_NL


def beginnings(batches: Iterable[Batch], num_prompts: int, length: int) -> list[list[int]]:
    """Prompts from text that is there: what comes before the first label, or where that is nothing, the first tokens.

    Args:
        batches: the text.
        num_prompts: at most.
        length: tokens of a beginning; a question before an answer is taken whole.
    """
    prompts: list[list[int]] = []
    for batch in batches:
        for tokens_S, labels_S in zip(batch.tokens_BS, batch.labels_BS, strict=True):
            labelled = (labels_S != IGNORE_INDEX).nonzero().flatten().tolist()
            if labelled and len(prompts) < num_prompts:
                first, last = labelled[0], labelled[-1]
                prompts.append(tokens_S[: first + 1 if first else min(length, last + 1)].tolist())
        if len(prompts) == num_prompts:
            break
    return prompts


def numbers(diversity: Diversity) -> dict[str, float]:
    """Those of its fields that are numbers, by name."""
    return {name: float(value) for name, value in asdict(diversity).items() if isinstance(value, (int, float))}


def _batch(texts: Sequence[tuple[Sequence[int], Sequence[int]]], device: torch.device) -> Batch:
    """Prompts with their continuations, padded on the right; the continuations' tokens are the labels."""
    longest = max(len(prompt) + len(new) for prompt, new in texts)
    tokens_BS = torch.zeros(len(texts), longest, dtype=torch.long)
    labels_BS = torch.full_like(tokens_BS, IGNORE_INDEX)
    for row, (prompt, new) in enumerate(texts):
        tokens_BS[row, : len(prompt) + len(new)] = torch.tensor([*prompt, *new])
        labels_BS[row, len(prompt) - 1 : len(prompt) - 1 + len(new)] = torch.tensor(new)
    return Batch(tokens_BS, labels_BS).to(device)
