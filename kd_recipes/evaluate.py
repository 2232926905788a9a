"""Compare models on the same text, prompts and tasks: what each is worth beside a reference, and what it costs.

Each model is a Hugging Face directory, as the other recipes leave them, a GGUF file, or a ``model`` and a
``checkpointer`` of torchtune's. Writes report.html, evaluation.md and evaluation.json to ``output_dir``. An evaluation
that was cut off goes on with the models that are not done.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torchtune.modules import TransformerDecoder

from kd_recipes import _torchtune
from kd_recipes.batch import Batch
from kd_recipes.config import Key, is_positive, without_environment
from kd_recipes.errors import ConfigError, Problem, gather, renamed
from kd_recipes.evaluation.behaviour import beginnings
from kd_recipes.evaluation.model import Questions, Reference, evaluate_model
from kd_recipes.evaluation.provenance import digest_of, made_by, runs_of, text_digest
from kd_recipes.evaluation.report import write_report
from kd_recipes.evaluation.results import Evaluation, ModelResult
from kd_recipes.evaluation.sources import WANTED, Source, find_source, is_gguf, of_gguf
from kd_recipes.evaluation.tasks import check_tasks
from kd_recipes.importing.gguf import import_gguf, open_gguf
from kd_recipes.parts import build, build_model, load_model
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
    Key("models", "mapping", required=True, wanted=f"name: {WANTED}, for each model"),
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
_NAME = re.compile(r"\w[\w.\-]*")  # of a model, which its results are kept under
_PROMPT = 16  # tokens of a held-out text's beginning


def main(cfg: DictConfig) -> None:
    """Evaluate the models that ``cfg`` names, the reference first, and write the report.

    Raises:
        ConfigError: what is wrong with the config and the files it names.
    """
    device = local_device(cfg.device)
    gather(*(partial(_check, str(name), value) for name, value in cfg.models.items()))
    reference = cfg.reference or str(next(iter(cfg.models)))
    if reference not in cfg.models:
        raise ConfigError(Problem("reference", reference, f"one of {', '.join(cfg.models)}"))
    tasks = [str(task) for task in cfg.tasks or ()]
    if tasks:
        check_tasks(tasks, cfg.num_fewshot)
    cfg.dtype = dtype_name(resolve_dtype(cfg.dtype, device))  # one for all models
    tokenizer = build("tokenizer", cfg.tokenizer)
    text = _text(cfg, tokenizer, device)
    prompts = _prompts(cfg, tokenizer, text)
    parallel = Parallel.start(device, timeout=cfg.distributed_timeout)
    sources = {str(name): _source(str(name), value, cfg, parallel) for name, value in cfg.models.items()}
    _require_one_vocabulary(sources, reference)
    gather(*(partial(_check_size, name, source, cfg, tokenizer, text, prompts) for name, source in sources.items()))
    questions = Questions(
        tokenizer=tokenizer,
        text=list(enumerate(text))[parallel.rank :: parallel.world_size],
        prompts=prompts,
        tasks=tasks,
        **{key: cfg[key] for key in ("max_task_items", "num_fewshot", "max_new_tokens", "seed")},
        gather=parallel.each,
    )
    against = [reference, sources[reference].stamps]
    asked = [_settings(cfg), text_digest(text), *map(_stamp, tasks), _stamp(str(cfg.tokenizer.get("path"))), *against]
    results = _evaluate_all(cfg, sources, reference, questions, parallel, digest_of(asked))
    if parallel.is_main:
        config: Any = OmegaConf.to_container(without_environment(cfg))
        origin = made_by(config, cfg.seed, text)
        runs = runs_of({name: source.place for name, source in sources.items()})
        evaluation = Evaluation([results[name] for name in sources], reference, runs, origin)
        files = write_report(evaluation, Path(cfg.output_dir))
        print("\n" + (Path(cfg.output_dir) / "evaluation.md").read_text(encoding="utf-8"))
        print("Wrote " + ", ".join(str(file) for file in files))
    parallel.stop()


def _check(name: str, value: Any) -> None:
    key = f"models.{name}"
    if not _NAME.fullmatch(name):
        raise ConfigError(Problem(key, name, "a name of letters, digits, . _ and -, as of a file"))
    if is_gguf(value):
        renamed(key, lambda: open_gguf(Path(value)))
    else:
        find_source(key, value)


def _source(name: str, value: Any, cfg: DictConfig, parallel: Parallel) -> Source:
    """A model that can be loaded; a GGUF file is imported once, beside what has been found of it."""
    key = f"models.{name}"
    if not is_gguf(value):
        return find_source(key, value)
    file, imported = Path(value), Path(cfg.output_dir) / "imported" / name
    parallel.on_main(lambda: renamed(key, lambda: _import(file, imported, cfg.dtype)))
    return of_gguf(key, file, imported)


def _import(file: Path, imported: Path, dtype: str) -> None:
    stamp = {"size": file.stat().st_size, "time": file.stat().st_mtime_ns, "dtype": dtype}
    record = imported.with_name(f"{imported.name}.json")
    if imported.is_dir() and record.is_file() and json.loads(record.read_text(encoding="utf-8")) == stamp:
        return
    shutil.rmtree(imported, ignore_errors=True)
    import_gguf(file, imported, dtype=DTYPES[dtype])
    write_json(record, stamp)


def _evaluate_all(
    cfg: DictConfig,
    sources: dict[str, Source],
    reference: str,
    questions: Questions,
    parallel: Parallel,
    asked: str,
) -> dict[str, ModelResult]:
    """The results by name; those that are there already, of the same files ``asked`` the same, stay."""
    done = Path(cfg.output_dir) / "models"
    states = Path(cfg.output_dir) / ".reference"
    keys = {name: digest_of([asked, source.stamps]) for name, source in sources.items()}
    results = parallel.each({name: found for name in keys if (found := _read(done / f"{name}.json", keys[name]))})[0]
    against: Reference | None = None
    if reference not in results:
        results = {}  # they are measured against it
    elif len(results) < len(sources):
        model = _load(cfg, reference, sources[reference])
        against = Reference.of(model, states / keys[reference], results[reference])
    for name in [reference, *(other for other in sources if other != reference)]:
        if name in results:
            continue
        model = _load(cfg, name, sources[name])
        found, against = evaluate_model(name, sources[name], model, questions, against, states / keys[reference])
        results[name] = found
        if parallel.is_main:
            done.mkdir(parents=True, exist_ok=True)
            write_json(done / f"{name}.json", {"key": keys[name], "result": asdict(found)})
    if parallel.is_main:
        shutil.rmtree(states, ignore_errors=True)
    return results


def _settings(cfg: DictConfig) -> dict[str, Any]:
    """All but which models there are, and where results go."""
    settings: Any = OmegaConf.to_container(cfg)
    return {key: value for key, value in settings.items() if key not in ("models", "reference", "output_dir")}


def _stamp(name: str) -> list[Any]:
    """What changes with a file or directory that is asked from; nothing where the name is of another thing."""
    path = Path(name)
    files = sorted(path.glob("*token*")) if path.is_dir() else [path] if path.is_file() else []
    return [[str(file), hashlib.sha256(file.read_bytes()).hexdigest()] for file in files]


def _read(file: Path, key: str) -> ModelResult | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return ModelResult.from_json(content["result"]) if content["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):  # not there, cut off, or of another version
        return None


def _load(cfg: DictConfig, name: str, source: Source) -> TransformerDecoder:
    dtype, device = DTYPES[cfg.dtype], local_device(cfg.device)
    model = load_model(f"models.{name}", source.model, source.checkpointer, dtype=dtype, device=device).model
    return model.eval().requires_grad_(False)


def _check_size(
    name: str, source: Source, cfg: DictConfig, tokenizer: Any, text: list[Batch], prompts: list[list[int]]
) -> None:
    """Whether a model, by its section alone, can be asked all the questions."""
    key = f"models.{name}"
    model = build_model(key, source.model, dtype=torch.bfloat16, device=torch.device("meta"))
    size = _torchtune.model_size(model)
    check_tokenizer(tokenizer, size.num_rows, size.max_seq_len, model=key)
    longest = max((batch.tokens_BS.shape[1] for batch in text), default=0)
    wanted = f"at most {size.max_seq_len}, the max_seq_len of {key}"
    if longest > size.max_seq_len:
        raise ConfigError(Problem("dataset", f"a sequence of {longest} tokens", wanted, "Set tokenizer.max_seq_len"))
    if (total := max(map(len, prompts), default=0) + cfg.max_new_tokens) > size.max_seq_len:
        got = f"{total} tokens, with the {cfg.max_new_tokens} of max_new_tokens"
        raise ConfigError(Problem("prompts", got, wanted, "Shorten the prompts or max_new_tokens"))


def _require_one_vocabulary(sources: dict[str, Source], reference: str) -> None:
    expected = token_ids(sources[reference].directory)
    for name, source in sources.items():
        found = token_ids(source.directory)
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
