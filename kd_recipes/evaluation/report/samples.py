"""What each model makes of the same prompts, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kd_recipes.evaluation.results import Evaluation, Sample


@dataclass(frozen=True)
class PromptSamples:
    """One prompt.

    Args:
        prompt: which all continue.
        samples: (name of the model, what it made of it) of those that were given it, in the order of the models.
    """

    prompt: str
    samples: Sequence[tuple[str, Sample]]


def side_by_side(evaluation: Evaluation) -> list[PromptSamples]:
    """By prompt, in the order in which they first come."""
    by_prompt: dict[str, list[tuple[str, Sample]]] = {}
    for model in evaluation.models:
        for sample in model.samples:
            by_prompt.setdefault(sample.prompt, []).append((model.name, sample))
    return [PromptSamples(prompt, samples) for prompt, samples in by_prompt.items()]
