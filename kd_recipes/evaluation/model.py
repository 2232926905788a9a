"""One model of an evaluation: what it is, what it says, what it costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torchtune.modules import TransformerDecoder
from tqdm import tqdm

from kd_recipes import _torchtune
from kd_recipes.batch import Batch
from kd_recipes.evaluation.cost import measure_cost
from kd_recipes.evaluation.diversity import Diversity, Generated, measure_diversity
from kd_recipes.evaluation.generation import generate, text_of, with_texts
from kd_recipes.evaluation.measure import Numbered, bytes_counter, change, measure_text
from kd_recipes.evaluation.reference import StoredReference
from kd_recipes.evaluation.results import ModelResult, Sample
from kd_recipes.evaluation.sources import Source
from kd_recipes.evaluation.tasks import compare_tasks, run_tasks
from kd_recipes.signals import DenseSignal


@dataclass(frozen=True)
class Questions:
    """What all models are asked.

    Args:
        tokenizer: of torchtune's protocol.
        text: this process's batches of held-out text, each with its number.
        prompts: ids that the models go on from.
        tasks: of lm-evaluation-harness, or JSONL files.
        max_task_items: of each task; None for all.
        num_fewshot: examples before each item; None for what the task says.
        max_new_tokens: of a continuation.
        seed: of what is drawn.
        gather: an object -> those of all processes.
    """

    tokenizer: Any
    text: Sequence[Numbered]
    prompts: Sequence[Sequence[int]] = ()
    tasks: Sequence[str] = ()
    max_task_items: int | None = None
    num_fewshot: int | None = None
    max_new_tokens: int = 64
    seed: int = 0
    gather: Callable[[Any], list[Any]] = field(default=lambda part: [part])


@dataclass(frozen=True)
class Reference:
    """The model that the others are measured against.

    Args:
        stored: what it says of the text.
        num_ids: rows of its head.
        result: None while it is itself measured.
    """

    stored: StoredReference
    num_ids: int
    result: ModelResult | None = None

    @classmethod
    def of(cls, model: TransformerDecoder, place: Path, result: ModelResult | None = None) -> Reference:
        """A model, which loses its head, as a reference; what it says is kept in the directory ``place``."""
        return cls(StoredReference(_torchtune.Headless(model), place), _torchtune.model_size(model).num_rows, result)


def evaluate_model(
    name: str,
    source: Source,
    model: TransformerDecoder,
    questions: Questions,
    reference: Reference | None,
    place: Path,
) -> tuple[ModelResult, Reference]:
    """Ask a model everything.

    Args:
        name: of the model.
        source: that it comes from.
        model: with its weights and its head.
        questions: what it is asked.
        reference: None if it is the reference.
        place: a directory for what the reference says.

    Returns:
        The result, and the reference: the one given, or what the model is as one.
    """
    cost = measure_cost(model, num_bytes=source.num_bytes, seed=questions.seed)
    samples, diversity = _continuations(model, questions, name)
    tasks = {}
    if questions.tasks:
        from kd_recipes.evaluation.language_model import DecoderLM

        lm = DecoderLM(model, questions.tokenizer, seed=questions.seed)
        tasks = run_tasks(lm, questions.tasks, questions.max_task_items, questions.num_fewshot)
    if reference is None:
        reference = Reference.of(model, place)
        num_ids, signal = reference.num_ids, reference.stored.signal
    else:
        num_ids = min(reference.num_ids, _torchtune.model_size(model).num_rows)
        signal = partial(_of, _torchtune.Headless(model))
    text = measure_text(
        signal,
        reference.stored.signal,
        tqdm(questions.text, desc=f"{name}: text", unit="batch"),
        num_ids=num_ids,
        count_bytes=bytes_counter(questions.tokenizer),
        gather=questions.gather,
    )
    result = ModelResult(name, str(source.place), source.description, cost, text, tasks, samples, diversity)
    if reference.result is None:
        return result, replace(reference, result=result)
    return beside(result, reference.result), reference


def beside(result: ModelResult, reference: ModelResult) -> ModelResult:
    """A result with what it takes another one to say."""
    text = replace(result.text, change=change(result.text, reference.text))
    tasks = {name: compare_tasks(task, reference.tasks[name]) for name, task in result.tasks.items()}
    return replace(result, text=text, tasks=tasks)


def _of(signal: Callable[[Batch], DenseSignal], _number: int, batch: Batch) -> DenseSignal:
    return signal(batch)


def _continuations(model: TransformerDecoder, questions: Questions, name: str) -> tuple[list[Sample], Diversity | None]:
    """Of each prompt, the likeliest and a drawn one; and how the drawn ones differ."""
    if not questions.prompts:
        return [], None

    def go_on(temperature: float) -> list[Generated]:
        with tqdm(total=len(questions.prompts), desc=f"{name}: prompts", unit="prompt", leave=False) as progress:
            found = generate(
                model,
                questions.prompts,
                max_new_tokens=questions.max_new_tokens,
                temperature=temperature,
                stop_ids=questions.tokenizer.stop_tokens,
                seed=questions.seed,
                progress=progress.update,
            )
            return with_texts(questions.tokenizer, found)

    likeliest, drawn = go_on(0.0), go_on(1.0)
    samples = [
        Sample(text_of(questions.tokenizer, prompt), greedy.text, other.text)
        for prompt, greedy, other in zip(questions.prompts, likeliest, drawn, strict=True)
    ]
    return samples, measure_diversity(drawn)
