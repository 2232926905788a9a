"""One model of an evaluation: what it is, what it says, what it costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torchtune.modules import TransformerDecoder
from tqdm import tqdm

from kd_recipes import _torchtune
from kd_recipes.batch import Batch
from kd_recipes.compression.checkpoint import read_checkpoint, sections, weight_files
from kd_recipes.errors import ConfigError, Problem, one_line
from kd_recipes.evaluation.cost import measure_cost
from kd_recipes.evaluation.diversity import Diversity, Generated, measure_diversity
from kd_recipes.evaluation.generation import generate, text_of, with_texts
from kd_recipes.evaluation.measure import Numbered, bytes_counter, change, measure_text
from kd_recipes.evaluation.reference import StoredReference
from kd_recipes.evaluation.results import ModelResult, Sample
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
    directory: Path,
    model: TransformerDecoder,
    questions: Questions,
    reference: Reference | None,
    place: Path,
) -> tuple[ModelResult, Reference]:
    """Ask a model everything.

    Args:
        name: of the model.
        directory: of its checkpoint.
        model: with its weights and its head.
        questions: what it is asked.
        reference: None if it is the reference.
        place: a directory for what the reference says.

    Returns:
        The result, and the reference: the one given, or what the model is as one.
    """
    cost = measure_cost(
        model, num_bytes=sum(path.stat().st_size for path in weight_files(directory)), seed=questions.seed
    )
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
    result = ModelResult(name, str(directory), describe(directory), cost, text, tasks, samples, diversity)
    if reference.result is None:
        return result, replace(reference, result=result)
    return beside(result, reference.result), reference


def beside(result: ModelResult, reference: ModelResult) -> ModelResult:
    """A result with what it takes another one to say."""
    text = replace(result.text, change=change(result.text, reference.text))
    tasks = {name: compare_tasks(task, reference.tasks[name]) for name, task in result.tasks.items()}
    return replace(result, text=text, tasks=tasks)


def describe(directory: Path) -> str:
    """A checkpoint's architecture in a line, by its config.json."""
    checkpoint = read_checkpoint(directory)
    config: Mapping[str, Any] = checkpoint.config
    heads = f"{config['num_attention_heads']}/{config.get('num_key_value_heads', config['num_attention_heads'])} heads"
    parts = [
        f"{config['num_hidden_layers']} blocks",
        f"{config['hidden_size']} wide",
        f"{config['intermediate_size']} neurons",
        heads,
        *(["low-rank"] if checkpoint.ranks else []),
        *sorted(set(checkpoint.schemes.values())),
    ]
    return ", ".join(parts)


def read_sections(key: str, directory: Path) -> DictConfig:
    """The model and its weights in a Hugging Face directory, as a recipe's config has them.

    Args:
        key: what names the directory, for messages.
        directory: of the checkpoint.

    Raises:
        ConfigError: it is none, or torchtune has no builder for its model.
    """
    wanted = "a Hugging Face checkpoint directory"
    if not (directory / "config.json").is_file():
        raise ConfigError(Problem(key, str(directory), wanted))
    try:
        return sections(directory)  # type: ignore[no-any-return]
    except ConfigError as error:
        raise ConfigError(*(replace(problem, key=key) for problem in error.problems)) from error
    except (KeyError, TypeError) as error:
        raise ConfigError(Problem(key, str(directory), wanted, one_line(error))) from error


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
