"""What came out, in a sentence or two, and no more than the text shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kd_recipes.evaluation.report.comparison import (
    SIGNIFICANT,
    best_trained,
    change_tone,
    leader_of,
    paired,
    reference_of,
    task_tone,
)
from kd_recipes.evaluation.report.formats import (
    interval,
    is_known,
    num_bytes,
    number,
    percent,
    ratio,
    share_interval,
    spread,
)
from kd_recipes.evaluation.results import Evaluation, ModelResult


def verdict(evaluation: Evaluation) -> tuple[str, ...]:
    """The sentence on the best model, then those on the best distilled one, on labels alone, on tasks."""
    reference = reference_of(evaluation)
    leader = leader_of(evaluation)
    if leader is None:
        return (_alone(reference),)
    distilled = best_trained(evaluation, labels_alone=False)
    labels = best_trained(evaluation, labels_alone=True)
    trained = [distilled] if distilled not in (None, leader) else []
    sentences = [_beside(model, reference) for model in (leader, *trained) if model is not None]
    if labels is not None:
        sentences.append(_labels_alone(labels, distilled, evaluation.runs))
    sentences += [tasks for model in (leader, *trained) if model is not None and (tasks := _on_tasks(model))]
    return tuple(sentences)


def _alone(model: ModelResult) -> str:
    text = model.text
    return (
        f"{model.name} has {interval(text.bits_per_byte)} bits per byte, {share_interval(text.accuracy)} of tokens "
        f"right, at {num_bytes(model.cost.num_bytes)}."
    )


def _beside(model: ModelResult, reference: ModelResult) -> str:
    """``distilled keeps 94% of teacher's token accuracy at 74% of its size and is 1.3× as fast; bits per byte …``"""
    said = _kept(model, reference)
    speed = ratio(model.cost.decode_tokens_per_second, reference.cost.decode_tokens_per_second)
    if speed is not None:
        said.append(f"is {_as_fast(speed)}")
    return (
        f"{model.name} {' and '.join(said)}; {_quality(model, reference)}."
        if said
        else (f"{model.name}: {_quality(model, reference)}.")
    )


def _kept(model: ModelResult, reference: ModelResult) -> list[str]:
    """Accuracy and size beside the reference's, as one part of a sentence; none where neither is known."""
    accuracy = ratio(model.text.accuracy.mean, reference.text.accuracy.mean)
    size = ratio(model.cost.num_bytes, reference.cost.num_bytes)
    said = "has"
    if accuracy is not None:
        verb = "keeps" if accuracy < 1.005 else "reaches"
        said = f"{verb} {percent(accuracy, 0)} of {reference.name}'s token accuracy"
    if size is None:
        return [said] if accuracy is not None else []
    if percent(size, 0) == "100%":
        return [f"{said} at the same size" if accuracy is not None else f"{said} {reference.name}'s size"]
    of = "its" if accuracy is not None else f"{reference.name}'s"
    return [f"{said} {'at ' if accuracy is not None else ''}{percent(size, 0)} of {of} size"]


def _as_fast(speed: float) -> str:
    digits = 1 if speed >= 0.95 else 2
    return "as fast" if round(speed, digits) == 1 else f"{number(speed, digits)}× as fast"


def _quality(model: ModelResult, reference: ModelResult) -> str:
    found = model.text.change
    if found is None or not is_known(found.mean):
        return f"{interval(model.text.bits_per_byte)} bits per byte"
    said = interval(found, signed=True)
    if change_tone(found) == "same":
        return f"no difference in bits per byte that the text shows ({said})"
    return f"bits per byte {said}" + (f", better than {reference.name}" if found.mean < 0 else "")


def _labels_alone(labels: ModelResult, distilled: ModelResult | None, runs: Mapping[str, Any]) -> str:
    """Whether the teacher was worth having."""
    found = labels.text.change
    at = interval(labels.text.bits_per_byte) if found is None else interval(found, signed=True)
    said = f"{labels.name}, trained on labels alone, is at {at} bits per byte"
    if distilled is None:
        return said + "."
    steps, other = _num_steps(runs[labels.name]), _num_steps(runs[distilled.name])
    if steps != other:
        said += f" after {steps:,} steps ({distilled.name}: {other:,})"
    by = paired(labels, distilled)
    if by is None:
        return said + "."
    tone = change_tone(by)
    gap = f"{number(abs(by.mean))} {spread(by)}"
    if tone == "worse":
        return f"{said}: the teacher has made {distilled.name} better by {gap}."
    if tone == "better":
        return f"{said}: better than {distilled.name} by {gap}, to which its teacher was no help."
    return f"{said}: no difference from {distilled.name} that the text shows ({interval(by, signed=True)})."


def _num_steps(run: Mapping[str, Any]) -> int:
    return int(run["train"][-1][0]) if run.get("train") else 0


def _on_tasks(model: ModelResult) -> str | None:
    """What paired tests say of its tasks."""
    tones = {name: tone for name, task in model.tasks.items() if (tone := task_tone(task))}
    if not tones:
        return None
    by_tone = {tone: [name for name, found in tones.items() if found == tone] for tone in ("worse", "better")}
    said = [f"{tone} on {', '.join(names)}" for tone, names in by_tone.items() if names]
    num_tasks = f"{len(tones)} task{'s' if len(tones) > 1 else ''}"
    if not said:
        return f"On {num_tasks} {model.name} shows no difference."
    rest = list(tones.values()).count("same")
    tail = f"; on the other{f' {rest}' if rest > 1 else ''} no difference shows" if rest else ""
    return f"Of {num_tasks}, {model.name} is {' and '.join(said)} (p < {SIGNIFICANT}){tail}."
