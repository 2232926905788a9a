"""Compare models on the same text, prompts and tasks: what each is worth beside a reference, and what it costs.

Each model is a Hugging Face directory, as the other recipes leave them. Writes report.html, evaluation.md and
evaluation.json to ``output_dir``. An evaluation that was cut off goes on with the models that are not done.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torchtune.modules import TransformerDecoder

from kd_recipes.batch import Batch
from kd_recipes.compression.checkpoint import file_stamps
from kd_recipes.config import Key, is_positive, without_environment
from kd_recipes.errors import ConfigError, Problem, gather
from kd_recipes.evaluation.behaviour import beginnings
from kd_recipes.evaluation.model import Questions, Reference, evaluate_model, read_sections
from kd_recipes.evaluation.provenance import made_by, runs_of
from kd_recipes.evaluation.report import write_report
from kd_recipes.evaluation.results import Evaluation, ModelResult
from kd_recipes.evaluation.tasks import check_tasks
from kd_recipes.parts import build, load_model
from kd_recipes.storage import write_json
from kd_recipes.tokenizers import token_ids
from kd_recipes.training.data import Loader, build_dataset
from kd_recipes.training.order import Rows
from kd_recipes.training.parallel import Parallel, local_device
from kd_recipes.training.precision import DTYPES, dtype_name, is_dtype_name, resolve_dtype
from kd_recipes.training.preflight import check_tokenizer

KEYS = (
    Key("recipe", "str", wanted="`evaluate`"),
    Key("output_dir", "path", required=True, wanted="a directory for the report"),
    Key("models", "mapping", required=True, wanted="name: directory of a Hugging Face checkpoint, for each model"),
    Key("reference", "str", wanted="the name of the model that the others are measured against; the first by default"),
    Key("tokenizer", "component", required=True),
    Key("dataset", "components", required=True, args=1, wanted="text that none of the models was trained on"),
    Key("batch_size", "int", default=4, wanted="sequences in a batch, above 0", check=is_positive),
    Key("max_batches", "int", wanted="a whole number above 0; all by default", check=is_positive),
    Key("prompts", "list", wanted="texts that each model goes on from; the beginnings of the held-out ones by default"),
    Key(
        "num_prompts",
        "int",
        default=8,
        wanted="how many beginnings of held-out text, where there are no prompts, from 0",
        check=lambda value: value >= 0,
    ),
    Key("max_new_tokens", "int", default=64, wanted="tokens of a continuation, above 0", check=is_positive),
    Key("tasks", "list", wanted="tasks of lm-evaluation-harness, or .jsonl files of question, choices and answer"),
    Key("max_task_items", "int", wanted="items of each task, above 0; all by default", check=is_positive),
    Key("num_fewshot", "int", wanted="examples before each item; what the task says by default"),
    Key("seed", "int", default=0, wanted="a whole number; of what is drawn"),
    Key("device", "str", default="cuda", wanted="cpu, cuda or cuda:1"),
    Key("dtype", "choice", default="auto", wanted="auto, bf16 or fp32", check=is_dtype_name),
    Key("distributed_timeout", "float", default=1800.0, wanted="seconds a process waits for others", check=is_positive),
)
_PROMPT = 16  # tokens of a held-out text's beginning


def main(cfg: DictConfig) -> None:
    """Evaluate the models that ``cfg`` names, the reference first, and write the report.

    Raises:
        ConfigError: what is wrong with the config and the files it names.
    """
    device = local_device(cfg.device)
    directories = {str(name): Path(path) for name, path in cfg.models.items()}
    gather(*(partial(read_sections, f"models.{name}", path) for name, path in directories.items()))
    reference = cfg.reference or next(iter(directories))
    if reference not in directories:
        raise ConfigError(Problem("reference", reference, f"one of {', '.join(directories)}"))
    _require_one_vocabulary(directories, reference)
    tasks = [str(task) for task in cfg.tasks or ()]
    if tasks:
        check_tasks(tasks, cfg.num_fewshot)
    cfg.dtype = dtype_name(resolve_dtype(cfg.dtype, device))  # one for all models
    tokenizer = build("tokenizer", cfg.tokenizer)
    parallel = Parallel.start(device, timeout=cfg.distributed_timeout)
    text = _text(cfg, tokenizer, device)
    questions = Questions(
        tokenizer=tokenizer,
        text=list(enumerate(text))[parallel.rank :: parallel.world_size],
        prompts=_prompts(cfg, tokenizer, text),
        tasks=tasks,
        **{key: cfg[key] for key in ("max_task_items", "num_fewshot", "max_new_tokens", "seed")},
        gather=parallel.each,
    )
    results = _evaluate_all(cfg, directories, reference, questions, parallel)
    if parallel.is_main:
        config: Any = OmegaConf.to_container(without_environment(cfg))
        origin = made_by(config, cfg.seed, text)
        evaluation = Evaluation([results[name] for name in directories], reference, runs_of(directories), origin)
        files = write_report(evaluation, Path(cfg.output_dir))
        print("\n" + (Path(cfg.output_dir) / "evaluation.md").read_text(encoding="utf-8"))
        print("Wrote " + ", ".join(str(file) for file in files))
    parallel.stop()


def _evaluate_all(
    cfg: DictConfig, directories: dict[str, Path], reference: str, questions: Questions, parallel: Parallel
) -> dict[str, ModelResult]:
    """The results by name; those that an evaluation cut off has left are taken from it."""
    done = Path(cfg.output_dir) / "models"
    states = Path(cfg.output_dir) / ".reference"
    keys = {name: _key(cfg, path) for name, path in directories.items()}
    results = parallel.each({name: found for name in keys if (found := _read(done / f"{name}.json", keys[name]))})[0]
    against: Reference | None = None
    if reference not in results:
        results = {}  # they are measured against it
    elif len(results) < len(directories):
        model = _load(cfg, reference, directories[reference], questions)
        against = Reference.of(model, states / keys[reference], results[reference])
    for name in [reference, *(other for other in directories if other != reference)]:
        if name in results:
            continue
        model = _load(cfg, name, directories[name], questions)
        found, against = evaluate_model(name, directories[name], model, questions, against, states / keys[reference])
        results[name] = found
        if parallel.is_main:
            done.mkdir(parents=True, exist_ok=True)
            write_json(done / f"{name}.json", {"key": keys[name], "result": asdict(found)})
    if parallel.is_main:
        shutil.rmtree(states, ignore_errors=True)
    return results


def _key(cfg: DictConfig, directory: Path) -> str:
    """Another one where a result would be another one: the settings, and the files of the model."""
    asked = {key: value for key, value in OmegaConf.to_container(cfg).items() if key not in ("models", "output_dir")}  # type: ignore[union-attr]
    described = json.dumps([asked, str(directory.absolute()), file_stamps(directory)], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _read(file: Path, key: str) -> ModelResult | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return ModelResult.from_json(content["result"]) if content["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):  # not there, cut off, or of another version
        return None


def _load(cfg: DictConfig, name: str, directory: Path, questions: Questions) -> TransformerDecoder:
    """A model that can be asked all the questions."""
    found = read_sections(f"models.{name}", directory)
    dtype, device = DTYPES[cfg.dtype], local_device(cfg.device)
    model = load_model(f"models.{name}", found.model, found.checkpointer, dtype=dtype, device=device).model.eval()
    check_tokenizer(questions.tokenizer, model.tok_embeddings.num_embeddings, model.max_seq_len)
    longest = max((batch.tokens_BS.shape[1] for _, batch in questions.text), default=0)
    if longest > model.max_seq_len:
        wanted = f"at most {model.max_seq_len}, the max_seq_len of models.{name}"
        raise ConfigError(Problem("dataset", f"a sequence of {longest} tokens", wanted, "Set tokenizer.max_seq_len"))
    return model.requires_grad_(False)


def _require_one_vocabulary(directories: dict[str, Path], reference: str) -> None:
    expected = token_ids(directories[reference])
    for name, directory in directories.items():
        found = token_ids(directory)
        if expected is not None and found is not None and found != expected:
            token, _ = min(set(found.items()) ^ set(expected.items()), key=lambda item: item[1])
            got = f"{token!r} is {found.get(token)}, and {expected.get(token)} in {reference}"
            wanted = "the token-to-id map of the reference"
            raise ConfigError(Problem(f"models.{name}", got, wanted, "Compare models of one vocabulary"))


def _text(cfg: DictConfig, tokenizer: Any, device: Any) -> list[Batch]:
    dataset, packed = build_dataset(cfg.dataset, tokenizer, "dataset")
    loader = Loader(
        Rows(dataset, shuffle=False, seed=0),
        packed=packed,
        batch_size=cfg.batch_size,
        padding_idx=tokenizer.pad_id,
        device=device,
        max_seq_len=sys.maxsize,
    )
    return list(islice(loader.batches(), cfg.max_batches))


def _prompts(cfg: DictConfig, tokenizer: Any, text: list[Batch]) -> list[list[int]]:
    """The config's own, or the beginnings of held-out sequences."""
    if cfg.prompts is not None:
        return [tokenizer.encode(str(prompt), add_eos=False) for prompt in cfg.prompts]
    return beginnings(text, cfg.num_prompts, _PROMPT)


if __name__ == "__main__":
    from kd_recipes.entry import run_recipe

    raise SystemExit(run_recipe("evaluate"))
