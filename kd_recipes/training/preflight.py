"""What can be known to be wrong before any weights are loaded: files, room on the disk, vocabularies, devices.

Only headers are read: the shapes in a safetensors file, the token-to-id map of a tokenizer.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig

from kd_recipes import _torchtune
from kd_recipes._torchtune import ModelSize
from kd_recipes.errors import ConfigError, Problem, gather, one_line
from kd_recipes.parts import CHECKPOINTERS, build_model, find_device
from kd_recipes.storage import TensorSpec, is_inside, read_safetensors_header, require_free_space
from kd_recipes.tokenizers import token_ids
from kd_recipes.training.checkpoint import RunDirectory
from kd_recipes.training.parallel import is_main_process, world_size
from kd_recipes.training.schedules import Schedule

_EMBEDDINGS = ("model.embed_tokens.weight", "tok_embeddings.weight")
_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.")


def preflight(cfg: DictConfig) -> None:
    """Check a distillation's config against the files that it names.

    Raises:
        ConfigError: with every problem found.
    """
    checks = (_device_problems, _process_problems, _teacher_problems, _effect_problems, _output_problems)
    problems = [problem for check in checks for problem in check(cfg)]
    missing = [problem for key in _checkpointers(cfg) for problem in _file_problems(key, cfg[key])]
    problems += missing or [*_vocabulary_problems(cfg), *_space_problems(cfg)]
    if problems:
        raise ConfigError(*problems)


def check_teacher(cfg: DictConfig) -> DictConfig:
    """Check what a config says of ``teacher_model``, for a recipe that runs it alone.

    Returns:
        The config of a distillation from it, whatever stands in ``teacher``.

    Raises:
        ConfigError: with every problem found.
    """
    found = cfg.copy()
    found.teacher, found.kd_ratio = None, 1.0
    if found.checkpointer is None:
        found.checkpointer = cfg.teacher_checkpointer
    problems = [*_device_problems(found), *_file_problems("teacher_checkpointer", found.teacher_checkpointer)]
    problems = problems or [*_vocabulary_problems(found)]
    if problems:
        raise ConfigError(*problems)
    return found


def check_models(cfg: DictConfig, tokenizer: Any, keys: Sequence[str]) -> list[ModelSize]:
    """Check the models that a config describes against their checkpoints' headers and the tokenizer.

    The models are built without memory for their weights, on torch's meta device.

    Args:
        cfg: the config.
        tokenizer: of torchtune's protocol.
        keys: ``model``, and ``teacher_model`` where there is one.

    Returns:
        The size of each model.

    Raises:
        ConfigError: with every problem found.
    """
    return gather(*(partial(_check_model, cfg, key, CHECKPOINTERS[key], tokenizer) for key in keys))


def _check_model(cfg: DictConfig, key: str, checkpointer: str, tokenizer: Any) -> ModelSize:
    model = build_model(key, cfg[key], dtype=torch.bfloat16, device=torch.device("meta"))
    size = _torchtune.model_size(model)
    specs = _specs(cfg[checkpointer])
    wanted = f"the model in {cfg[checkpointer].get('checkpoint_dir')}"
    found = {"layers": _num_layers(specs), "embedding": _embedding_shape(specs)}
    for what, built in (("layers", size.num_layers), ("embedding", (size.num_rows, size.embed_dim))):
        if found[what] not in (None, built):
            remedy = f"Its {what}: {found[what]} in the file, {built} in `{key}`"
            raise ConfigError(Problem(key, cfg[key]._component_, wanted, remedy))
    check_tokenizer(tokenizer, size.num_rows, size.max_seq_len, model=key)
    return size


def checkpoint_files(section: DictConfig) -> list[Path]:
    """The files that a checkpointer section names, as paths."""
    files = section.checkpoint_files
    if isinstance(files, DictConfig):  # {filename_format: model-{}-of-{}.safetensors, max_filename: "00004"}
        last = str(files.max_filename)
        numbers = (str(number).zfill(len(last)) for number in range(1, int(last) + 1))
        files = [files.filename_format.format(number, last) for number in numbers]
    return [Path(section.checkpoint_dir) / str(name) for name in files]


def file_bytes(cfg: DictConfig, key: str) -> int | None:
    """Of the weights in the files of a checkpointer section; None where they are not there, or not whole."""
    section = cfg[key]
    if section is None or "checkpoint_dir" not in section or any(_file_problems(key, section)):
        return None
    return sum(file.stat().st_size for file in checkpoint_files(section))


def _specs(section: DictConfig) -> dict[str, TensorSpec]:
    """What the headers of a checkpoint's safetensors files say; nothing of files in other formats."""
    specs: dict[str, TensorSpec] = {}
    if "checkpoint_dir" in section:
        for path in checkpoint_files(section):
            if path.suffix == ".safetensors":
                specs |= read_safetensors_header(path)
    return specs


def _embedding_shape(specs: Mapping[str, TensorSpec]) -> tuple[int, ...] | None:
    return next((specs[name].shape for name in _EMBEDDINGS if name in specs), None)


def _num_layers(specs: Mapping[str, TensorSpec]) -> int | None:
    indices = [int(match.group(1)) for name in specs if (match := _LAYER.match(name))]
    return max(indices) + 1 if indices else None


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


def _caught(check: Callable[[], object]) -> tuple[Problem, ...]:
    try:
        check()
    except ConfigError as error:
        return error.problems
    return ()


def _device_problems(cfg: DictConfig) -> Iterator[Problem]:
    for key in ("device", "teacher_device"):
        if cfg[key] is not None:
            yield from _caught(partial(find_device, key, cfg[key]))


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
    if cfg.shard_teacher and cfg.teacher_device not in (None, cfg.device):
        remedy = "shard_teacher=False keeps a whole teacher there for each process"
        yield Problem("teacher_device", cfg.teacher_device, f"{cfg.device}, as the student: they share it", remedy)
    if cfg.fsdp_cpu_offload and cfg.device == "cpu":
        yield Problem("fsdp_cpu_offload", True, "False on cpu: weights are in its memory as it is")
    if str(cfg.optimizer._component_).startswith("torchao."):
        wanted = "an optimizer of torch with several processes: quantized moments cannot be split yet"
        yield Problem("optimizer._component_", cfg.optimizer._component_, wanted)
    if cfg.model.get("quantize_base"):
        yield Problem("model.quantize_base", True, "False with several processes", "NF4 weights cannot be split yet")


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
            yield from _caught(lambda: run.find(cfg.checkpointer.get("recipe_checkpoint")))
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
    directory, files = section.checkpoint_dir, section.get("checkpoint_files")
    if not isinstance(directory, str) or not Path(directory).is_dir():
        yield Problem(f"{key}.checkpoint_dir", directory, "a directory that exists", "Download the model first")
        return
    is_pattern = isinstance(files, DictConfig) and {"filename_format", "max_filename"} <= files.keys()
    if not is_pattern and not (isinstance(files, ListConfig) and files):
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


def _vocabulary_problems(cfg: DictConfig) -> Iterator[Problem]:
    try:
        student, teacher = (
            token_ids(Path(cfg[key].checkpoint_dir))
            if key in _checkpointers(cfg) and "checkpoint_dir" in cfg[key]
            else None
            for key in CHECKPOINTERS.values()
        )
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
        if teacher is not None and teacher.get(token) != index:
            difference = f"{token!r} is {index} for the student and {teacher.get(token)} for the teacher"
            wanted = "the same token-to-id map for student and teacher"
            remedy = "Distillation compares probabilities id by id: choose a teacher of the same family"
            yield Problem("teacher_checkpointer.checkpoint_dir", difference, wanted, remedy)
            teacher = None


def _space_problems(cfg: DictConfig) -> tuple[Problem, ...]:
    results = RunDirectory(Path(cfg.output_dir)).results  # those of a run that goes on are written over
    present = sum(file.stat().st_size for result in results for file in result.rglob("*") if file.is_file())
    num_bytes = max(0, sum(bytes_to_write(cfg).values()) - present)
    return _caught(lambda: require_free_space(Path(cfg.output_dir), num_bytes, key="output_dir"))


def bytes_to_write(cfg: DictConfig) -> dict[str, int]:
    """What a run needs at least: one export, two with held-out evaluation; the checkpoints kept, and one more, since
    an old one goes when the new one is whole; the best student's state, where `health` may go back to it."""
    if (size := file_bytes(cfg, "checkpointer")) is None:
        return {}
    exports = 0 if cfg.save_adapter_weights_only else size * (1 if cfg.eval_dataset is None else 2)
    if "lora_rank" in cfg.model:
        return {"students": exports}
    num_parameters = sum(math.prod(spec.shape) for spec in _specs(cfg.checkpointer).values())
    return {"students": exports, "checkpoints": num_parameters * _checkpoint_bytes(cfg) * num_checkpoints(cfg)}


def num_checkpoints(cfg: DictConfig) -> int:
    """Most checkpoints that are on disk at a time."""
    found = min(_num_saves(cfg), int(cfg.keep_last_n_checkpoints) + 1)
    if cfg.eval_dataset is not None and (cfg.health or {}).get("action") == "restore_best":
        found += 2  # the best student's state, and a better one's before the old one goes
    return found


def _num_saves(cfg: DictConfig) -> int:
    if cfg.save_every_n_steps is None or cfg.max_steps is None:
        return int(cfg.epochs)
    return max(1, int(cfg.max_steps) // int(cfg.save_every_n_steps))


def _checkpoint_bytes(cfg: DictConfig) -> int:
    """Of a parameter in a checkpoint: the weight, or its float32 copy, and Adam's two moments."""
    is_bf16 = cfg.dtype == "bf16"
    weights = 2 if is_bf16 and not cfg.master_weights else 4
    is_adam = str(cfg.optimizer._component_).rpartition(".")[2] in ("Adam", "AdamW")
    moment = 2 if is_bf16 and not cfg.master_weights else 4
    return weights + 2 * moment * is_adam


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
    special = getattr(tokenizer, "special_tokens", None) or {}
    highest_id = max([int(getattr(tokenizer, "vocab_size", 0)) - 1, *special.values()])
    if highest_id >= num_rows:
        wanted = f"ids below {num_rows}, the rows of `{model}`"
        problems.append(Problem("tokenizer", f"ids up to {highest_id}", wanted, "Use the model's own tokenizer"))
    if tokenizer.max_seq_len is not None and tokenizer.max_seq_len > max_seq_len:
        wanted = f"at most {max_seq_len}, the max_seq_len of `{model}`"
        problems.append(Problem("tokenizer.max_seq_len", tokenizer.max_seq_len, wanted))
    if problems:
        raise ConfigError(*problems)
