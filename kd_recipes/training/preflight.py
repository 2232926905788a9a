"""What can be known to be wrong before any weights are loaded: files, room on the disk, vocabularies, devices.

Only headers are read: the shapes in a safetensors file, the token-to-id map of a tokenizer.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig

from kd_recipes import _torchtune
from kd_recipes._torchtune import ModelSize
from kd_recipes.errors import ConfigError, Problem, gather, one_line, problems_of
from kd_recipes.headers import checkpoint_files, embedding_shape, names_files, num_layers, read_specs
from kd_recipes.parts import CHECKPOINTERS, build_model, find_device
from kd_recipes.storage import is_inside, require_free_space
from kd_recipes.tensor_files import read_safetensors_header
from kd_recipes.tokenizers import token_ids
from kd_recipes.training.checkpoint import RunDirectory
from kd_recipes.training.disk import bytes_to_write
from kd_recipes.training.frozen import keeping_problems
from kd_recipes.training.parallel import is_main_process, world_size
from kd_recipes.training.schedules import Schedule


def preflight(cfg: DictConfig) -> None:
    """Check a distillation's config against the files that it names.

    Raises:
        ConfigError: with every problem found.
    """
    checks = (_device_problems, _process_problems, _teacher_problems, _effect_problems, _output_problems)
    problems = [problem for check in checks for problem in check(cfg)]
    missing = [problem for key in _checkpointers(cfg) for problem in _file_problems(key, cfg[key])]
    problems += missing or [*_vocabulary_problems(cfg, _teacher_checkpointers(cfg)), *_space_problems(cfg)]
    if problems:
        raise ConfigError(*problems)


def check_teacher(cfg: DictConfig) -> DictConfig:
    """Check what a config says of ``teacher_model``, if anything, for a recipe that runs it alone.

    The student's files are looked at where it is in the config, since its vocabulary counts.

    Returns:
        The config of a distillation from it, whatever stands in ``teacher``.

    Raises:
        ConfigError: with every problem found.
    """
    found = cfg.copy()
    found.teacher, found.kd_ratio = None, 1.0
    if found.checkpointer is None:
        found.checkpointer = cfg.teacher_checkpointer
    problems = [*_device_problems(found)]
    if found.teacher_checkpointer is not None:
        problems += _file_problems("teacher_checkpointer", found.teacher_checkpointer)
    if cfg.model is not None and cfg.checkpointer is not None:
        remedy = "A student that is yet to be made can be left out: ~model ~checkpointer"
        for problem in _file_problems("checkpointer", cfg.checkpointer):
            problems.append(replace(problem, remedy=f"{problem.remedy}. {remedy}" if problem.remedy else remedy))
    problems = problems or [*_vocabulary_problems(found, _teacher_checkpointers(found))]
    if problems:
        raise ConfigError(*problems)
    return found


def check_source(cfg: DictConfig, models: Mapping[str, DictConfig]) -> None:
    """Check the files of models that a ``teacher`` section names against each other and the student's.

    Args:
        cfg: of the distillation.
        models: sections of ``model``, ``checkpointer`` and perhaps ``device``, by their keys.

    Raises:
        ConfigError: with every problem found.
    """
    checkpointers = {f"{key}.checkpointer": section.checkpointer for key, section in models.items()}
    problems = [problem for key, section in checkpointers.items() for problem in _file_problems(key, section)]
    for key, section in models.items():
        if section.get("device") is not None:
            problems += problems_of(partial(find_device, f"{key}.device", section.device))
            problems += _shard_problems(cfg, f"{key}.device", section.device)
    if problems := problems or [*_vocabulary_problems(cfg, checkpointers)]:
        raise ConfigError(*problems)


def check_models(
    cfg: DictConfig, tokenizer: Any, keys: Sequence[str], others: Mapping[str, DictConfig] | None = None
) -> list[ModelSize]:
    """Check the models that a config describes against their checkpoints' headers and the tokenizer.

    The models are built without memory for their weights, on torch's meta device.

    Args:
        cfg: the config.
        tokenizer: of torchtune's protocol.
        keys: ``model``, and ``teacher_model`` where there is one.
        others: sections of ``model`` and ``checkpointer``, by their keys within the ``teacher`` section.

    Returns:
        The size of each model.

    Raises:
        ConfigError: with every problem found.
    """
    sections = {key: DictConfig({"model": cfg[key], "checkpointer": cfg[CHECKPOINTERS[key]]}) for key in keys}
    sections |= {f"teacher{key}": section for key, section in (others or {}).items()}
    return gather(*(partial(_check_model, cfg, key, section, tokenizer) for key, section in sections.items()))


def _check_model(cfg: DictConfig, place: str, section: DictConfig, tokenizer: Any) -> ModelSize:
    key = place if place in CHECKPOINTERS else f"{place}.model"
    model = build_model(key, section.model, dtype=torch.bfloat16, device=torch.device("meta"))
    size = _torchtune.model_size(model)
    specs = read_specs(section.checkpointer)
    wanted = f"the model in {section.checkpointer.get('checkpoint_dir')}"
    found = {"layers": num_layers(specs), "embedding": embedding_shape(specs)}
    for what, built in (("layers", size.num_layers), ("embedding", (size.num_rows, size.embed_dim))):
        if found[what] not in (None, built):
            remedy = f"Its {what}: {found[what]} in the file, {built} in `{key}`"
            raise ConfigError(Problem(key, section.model._component_, wanted, remedy))
    check_tokenizer(tokenizer, size.num_rows, size.max_seq_len, model=key)
    if key != "model" and (problems := [*keeping_problems(cfg, place, section, model)]):
        raise ConfigError(*problems)
    return size


def asks_teacher(cfg: DictConfig) -> bool:
    """Whether the run has a use for its teacher: in the objective, or to be compared with on held-out data."""
    has_teacher = cfg.teacher is not None or cfg.teacher_model is not None
    return has_teacher and (needs_teacher(cfg) or cfg.eval_dataset is not None)


def loads_teacher_model(cfg: DictConfig) -> bool:
    """Whether the teacher is ``teacher_model``, which a ``teacher`` section takes the place of."""
    return cfg.teacher is None and asks_teacher(cfg)


def needs_teacher(cfg: DictConfig) -> bool:
    """Whether a step asks the teacher."""
    return Schedule.of(cfg.kd_ratio).largest > 0 or cfg.feature_losses is not None


def _checkpointers(cfg: DictConfig) -> list[str]:
    keys = CHECKPOINTERS.values() if loads_teacher_model(cfg) else ["checkpointer"]
    return [key for key in keys if cfg[key] is not None]


def _teacher_checkpointers(cfg: DictConfig) -> dict[str, DictConfig]:
    return {key: cfg[key] for key in _checkpointers(cfg) if key != "checkpointer"}


def _device_problems(cfg: DictConfig) -> Iterator[Problem]:
    for key in ("device", "teacher_device"):
        if cfg[key] is not None:
            yield from problems_of(partial(find_device, key, cfg[key]))


def _process_problems(cfg: DictConfig) -> Iterator[Problem]:
    size = world_size()
    if cfg.shard_size is not None and size % cfg.shard_size:
        yield Problem(
            "shard_size", cfg.shard_size, f"a number that divides {size}, the processes that torchrun started"
        )
    if size == 1:
        return
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if str(cfg.device) == "cuda" and torch.cuda.device_count() < num_local:
        got = f"{num_local} on a machine of {torch.cuda.device_count()} CUDA devices"
        yield Problem("--nproc_per_node", got, "a GPU for each process", "device=cpu runs without")
    elif cfg.device not in ("cuda", "cpu"):
        yield Problem("device", cfg.device, "cuda or cpu, of which each process takes its own")
    yield from _shard_problems(cfg, "teacher_device", cfg.teacher_device)
    if cfg.fsdp_cpu_offload and cfg.device == "cpu":
        yield Problem("fsdp_cpu_offload", True, "False on cpu: weights are in its memory as it is")
    if str(cfg.optimizer._component_).startswith("torchao."):
        wanted = "an optimizer of torch with several processes: quantized moments cannot be split yet"
        yield Problem("optimizer._component_", cfg.optimizer._component_, wanted)
    if cfg.model.get("quantize_base"):
        yield Problem("model.quantize_base", True, "False with several processes", "NF4 weights cannot be split yet")


def _shard_problems(cfg: DictConfig, key: str, device: str | None) -> Iterator[Problem]:
    if world_size() > 1 and cfg.shard_teacher and device not in (None, cfg.device):
        remedy = "shard_teacher=False keeps a whole teacher there for each process"
        yield Problem(key, device, f"{cfg.device}, as the student: they share it", remedy)


def _teacher_problems(cfg: DictConfig) -> Iterator[Problem]:
    if cfg.teacher is not None:
        if cfg.feature_losses is not None:
            wanted = "none with a `teacher` section, of which logits alone are known"
            yield Problem("feature_losses", "given", wanted, "Name the teacher as teacher_model")
        return
    parts = ("teacher_model", "teacher_checkpointer")
    absent = [part for part in parts if cfg[part] is None]
    reason, remedy = f"kd_ratio is {cfg.kd_ratio}", "kd_ratio=0 trains on labels alone"
    if cfg.feature_losses is not None:
        reason, remedy = "feature_losses compare the student with it", f"Leave them out; {remedy}"
    if needs_teacher(cfg) or len(absent) == 1:
        for part in absent:
            yield Problem(part, None, f"a teacher, since {reason}", remedy)


def _effect_problems(cfg: DictConfig) -> Iterator[Problem]:
    """Settings that what stands beside them rules out."""
    if cfg.save_adapter_weights_only and "lora_rank" not in cfg.model:
        wanted = "False: this student has no adapter, all of it is trained"
        yield Problem("save_adapter_weights_only", True, wanted, "Or name a lora_ builder in `model`")
    for key in ("dataset", "eval_dataset"):
        if isinstance(cfg[key], DictConfig) and cfg[key].get("packed") and cfg[key].get("streaming"):
            yield Problem(f"{key}.packed", True, "False with streaming: packs are made of a whole data set")
    if cfg.group_by_length:
        sections = cfg.dataset if isinstance(cfg.dataset, ListConfig) else [cfg.dataset]
        kinds = {"packed": "packs are all as long", "streaming": "a stream does not tell its lengths"}
        for kind, reason in kinds.items():
            if any(section.get(kind) for section in sections):
                yield Problem("group_by_length", True, f"False with dataset.{kind}: {reason}")
        if not cfg.shuffle:
            yield Problem("group_by_length", True, "False with shuffle=False: it draws an order")
    if cfg.enable_activation_offloading and not str(cfg.device).startswith("cuda"):
        yield Problem(
            "enable_activation_offloading", True, f"False on {cfg.device}: activations are in its memory as it is"
        )


def _output_problems(cfg: DictConfig) -> Iterator[Problem]:
    directory = Path(cfg.output_dir)
    run = RunDirectory(directory)
    if directory.exists() and not directory.is_dir():
        yield Problem("output_dir", str(directory), "a directory", "There is a file of that name")
        return
    if cfg.resume_from_checkpoint == "auto" and cfg.checkpointer.get("recipe_checkpoint") is not None:
        wanted = "True with a checkpointer.recipe_checkpoint: auto takes the newest"
        yield Problem("resume_from_checkpoint", "auto", wanted)
    if run.goes_on(cfg.resume_from_checkpoint):
        if is_main_process():  # all of it is read
            yield from problems_of(lambda: run.find(cfg.checkpointer.get("recipe_checkpoint")))
    elif run.is_occupied and not run.may_begin_anew(cfg.resume_from_checkpoint):
        remedy = "Choose another output_dir, delete it, or go on with it: resume_from_checkpoint=True"
        yield Problem("output_dir", str(directory), "a directory that holds no other run", remedy)
    for key in _checkpointers(cfg):
        if isinstance(cfg[key].get("checkpoint_dir"), str):
            yield from _overlap_problems(directory, run, key, Path(cfg[key].checkpoint_dir))
    parent = nearest_existing(directory)
    try:
        with tempfile.TemporaryFile(dir=parent):  # on Linux without a name: the directory is as it was
            pass
    except OSError as error:
        yield Problem("output_dir", str(directory), f"a place that can be written to ({parent}: {error.strerror})")


def _overlap_problems(directory: Path, run: RunDirectory, key: str, checkpoint_dir: Path) -> Iterator[Problem]:
    source, target = checkpoint_dir.resolve(), directory.resolve()
    if target == source or source in target.parents:
        yield Problem("output_dir", str(directory), f"a directory outside {key}.checkpoint_dir ({source})")
    elif any(result.resolve() in (source, *source.parents) for result in run.results):
        wanted = "a checkpoint that the run does not write over"
        yield Problem(f"{key}.checkpoint_dir", str(checkpoint_dir), wanted, "Choose another output_dir")


def nearest_existing(path: Path) -> Path:
    """The path itself, or the first of its parents that is there."""
    path = Path(os.path.abspath(path))
    return next(parent for parent in (path, *path.parents) if os.path.lexists(parent))


def _file_problems(key: str, section: DictConfig) -> Iterator[Problem]:
    if "checkpoint_dir" not in section:  # a checkpointer of the user's own, with arguments of its own
        return
    directory = section.checkpoint_dir
    if not isinstance(directory, str) or not Path(directory).is_dir():
        yield Problem(f"{key}.checkpoint_dir", directory, "a directory that exists", "Download the model first")
        return
    if not names_files(section):
        files = section.get("checkpoint_files")
        yield Problem(f"{key}.checkpoint_files", files, "a list of files, or filename_format and max_filename")
        return
    found = checkpoint_files(section)
    names = [str(path.relative_to(directory) if path.is_relative_to(directory) else path) for path in found]
    if outside := [name for name in names if not is_inside(name)]:
        yield Problem(f"{key}.checkpoint_files", outside, f"files in checkpoint_dir ({directory})")
        return
    damaged = [problem for path in found for problem in _damage(f"{key}.checkpoint_files", path)]
    yield from damaged
    if not damaged:
        try:
            _torchtune.build_checkpointer(section)
        except Exception as error:  # a component of the user's can raise anything
            yield Problem(key, section._component_, "one that can be built", one_line(error))


def _damage(key: str, path: Path) -> Iterator[Problem]:
    if not path.is_file():
        there = sorted(p.name for p in path.parent.glob(f"*{path.suffix}"))
        yield Problem(key, path.name, f"files that are in {path.parent}", f"There: {there}")
    elif path.suffix == ".safetensors":
        try:
            read_safetensors_header(path)
        except ConfigError as error:
            yield Problem(key, path.name, "a whole safetensors file", "; ".join(str(p.got) for p in error.problems))


def _vocabulary_problems(cfg: DictConfig, checkpointers: Mapping[str, DictConfig]) -> Iterator[Problem]:
    """Tokens to which the student, its tokenizer and the teachers, whose checkpointers are given, give other ids."""
    try:
        student = _token_ids(cfg.checkpointer)
        teachers = {key: ids for key, section in checkpointers.items() if (ids := _token_ids(section)) is not None}
        path = Path(str(cfg.tokenizer.get("path", "")))
        tokenizer = token_ids(path if path.is_dir() else path.parent) if path.name else None
    except ConfigError as error:
        yield from error.problems
        return
    for token, index in sorted((student or {}).items(), key=lambda item: item[1]):
        if tokenizer is not None and tokenizer.get(token, index) != index:
            difference = f"{token!r} is {tokenizer[token]} for the tokenizer and {index} for the student"
            yield Problem("tokenizer.path", difference, "the tokenizer of the student", "Use the student's own")
            tokenizer = None
        for key in [key for key, ids in teachers.items() if ids.get(token) != index]:
            difference = f"{token!r} is {index} for the student and {teachers.pop(key).get(token)} for the teacher"
            wanted = "the same token-to-id map for student and teacher"
            remedy = "Distillation compares probabilities id by id: choose a teacher of the same family"
            yield Problem(f"{key}.checkpoint_dir", difference, wanted, remedy)


def _token_ids(section: DictConfig | None) -> dict[str, int] | None:
    """The token-to-id map beside a checkpointer's weights; None where it is not known."""
    return token_ids(Path(section.checkpoint_dir)) if section is not None and "checkpoint_dir" in section else None


def _space_problems(cfg: DictConfig) -> tuple[Problem, ...]:
    results = RunDirectory(Path(cfg.output_dir)).results  # those of a run that goes on are written over
    present = sum(file.stat().st_size for result in results for file in result.rglob("*") if file.is_file())
    num_bytes = max(0, sum(bytes_to_write(cfg).values()) - present)
    return problems_of(lambda: require_free_space(Path(cfg.output_dir), num_bytes, key="output_dir"))


def highest_id(tokenizer: Any) -> int:
    """That a tokenizer of torchtune's protocol can make, some of which lack a ``vocab_size``; -1 for unknown."""
    special = getattr(tokenizer, "special_tokens", None) or {}
    highest: int = max([int(getattr(tokenizer, "vocab_size", 0)) - 1, *special.values()])
    return highest


def check_tokenizer(tokenizer: Any, num_rows: int, max_seq_len: int, *, model: str = "model") -> None:
    """Compare a tokenizer with a model that is to use it.

    Args:
        tokenizer: of torchtune's protocol.
        num_rows: of the model's embedding and head.
        max_seq_len: that the model's positions reach to.
        model: the key of the model, for the message.

    Raises:
        ConfigError: it has ids that the model has no row for, or lets through sequences that are too long.
    """
    problems = []
    if (highest := highest_id(tokenizer)) >= num_rows:
        wanted = f"ids below {num_rows}, the rows of `{model}`"
        problems.append(Problem("tokenizer", f"ids up to {highest}", wanted, "Use the model's own tokenizer"))
    if tokenizer.max_seq_len is not None and tokenizer.max_seq_len > max_seq_len:
        wanted = f"at most {max_seq_len}, the max_seq_len of `{model}`"
        problems.append(Problem("tokenizer.max_seq_len", tokenizer.max_seq_len, wanted))
    if problems:
        raise ConfigError(*problems)
