"""What can be known to be wrong before any weights are loaded: files, room on the disk, vocabularies, devices.

Only headers are read: the shapes in a safetensors file, the token-to-id map of a tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from kd_recipes.errors import ConfigError, Problem
from kd_recipes.storage import TensorSpec, read_safetensors_header, require_free_space
from kd_recipes.training.checkpoint import RunDirectory

_EMBEDDINGS = ("model.embed_tokens.weight", "tok_embeddings.weight")
_ADAM_BYTES = 14  # a parameter in a checkpoint: bf16 weight, float32 master, two float32 moments


def preflight(cfg: DictConfig) -> None:
    """Check a distillation's config against the files that it names.

    Raises:
        ConfigError: with every problem found.
    """
    problems = [*_device_problems(cfg), *_teacher_problems(cfg), *_output_problems(cfg)]
    sections = ["checkpointer"] + (["teacher_checkpointer"] if cfg.teacher_checkpointer is not None else [])
    missing = [problem for key in sections for problem in _file_problems(key, cfg[key])]
    problems += missing
    if not missing and len(sections) == 2:
        problems += _vocabulary_problems(cfg)
    if not missing:
        try:
            require_free_space(Path(cfg.output_dir), _bytes_to_write(cfg), key="output_dir")
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems)


def checkpoint_files(section: DictConfig) -> list[Path]:
    """The files that a checkpointer section names, as paths."""
    files = section.checkpoint_files
    if isinstance(files, DictConfig):  # {filename_format: model-{}-of-{}.safetensors, max_filename: "00004"}
        last = str(files.max_filename)
        numbers = (str(number).zfill(len(last)) for number in range(1, int(last) + 1))
        files = [files.filename_format.format(number, last) for number in numbers]
    return [Path(section.checkpoint_dir) / str(name) for name in files]


def embedding_rows(section: DictConfig) -> int | None:
    """Rows of the token embedding in a checkpoint, from its safetensors headers; None for other formats."""
    for path in checkpoint_files(section):
        if path.suffix == ".safetensors":
            for name, spec in read_safetensors_header(path).items():
                if name in _EMBEDDINGS:
                    return spec.shape[0]
    return None


def token_ids(directory: Path) -> dict[str, int] | None:
    """The token-to-id map that stands beside a checkpoint, special tokens included; None where no known file does."""
    if (directory / "tokenizer.json").is_file():
        content = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: [[token, score], …] in the order of the ids
            vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
        return {**vocabulary, **{added["content"]: added["id"] for added in content.get("added_tokens", [])}}
    if (directory / "vocab.json").is_file():
        return dict(json.loads((directory / "vocab.json").read_text(encoding="utf-8")))
    return None


def _device_problems(cfg: DictConfig) -> Iterator[Problem]:
    for key in ("device", "teacher_device"):
        name = cfg[key]
        if name is None:
            continue
        try:
            device = torch.device(name)
        except RuntimeError:
            yield Problem(key, name, "a device such as cpu, cuda or cuda:1")
            continue
        if device.type == "cuda" and not torch.cuda.is_available():
            yield Problem(key, name, "a device that is there", "torch sees no CUDA device; device=cpu runs without one")


def _teacher_problems(cfg: DictConfig) -> Iterator[Problem]:
    parts = ("teacher_model", "teacher_checkpointer")
    absent = [part for part in parts if cfg[part] is None]
    if cfg.kd_ratio > 0 or len(absent) == 1:
        for part in absent:
            yield Problem(
                part, None, f"a teacher, since kd_ratio is {cfg.kd_ratio}", "kd_ratio=0 trains on labels alone"
            )


def _output_problems(cfg: DictConfig) -> Iterator[Problem]:
    directory = Path(cfg.output_dir)
    if directory.exists() and not directory.is_dir():
        yield Problem("output_dir", str(directory), "a directory", "There is a file of that name")
    elif RunDirectory(directory).is_occupied and not cfg.resume_from_checkpoint:
        remedy = "Choose another output_dir, or resume_from_checkpoint=True to go on with it"
        yield Problem("output_dir", str(directory), "a directory that holds no other run", remedy)
    source = Path(cfg.checkpointer.checkpoint_dir).resolve()
    if source == directory.resolve() or source in directory.resolve().parents:
        yield Problem("output_dir", str(directory), f"a directory outside checkpointer.checkpoint_dir ({source})")


def _file_problems(key: str, section: DictConfig) -> Iterator[Problem]:
    if not Path(section.checkpoint_dir).is_dir():
        yield Problem(
            f"{key}.checkpoint_dir", section.checkpoint_dir, "a directory that exists", "Download the model first"
        )
        return
    for path in checkpoint_files(section):
        if not path.is_file():
            there = sorted(p.name for p in path.parent.glob(f"*{path.suffix}"))
            yield Problem(f"{key}.checkpoint_files", path.name, f"files that are in {path.parent}", f"There: {there}")
        elif path.suffix == ".safetensors":
            try:
                read_safetensors_header(path)
            except ValueError as error:
                yield Problem(f"{key}.checkpoint_files", path.name, "a whole safetensors file", str(error))


def _vocabulary_problems(cfg: DictConfig) -> Iterator[Problem]:
    student, teacher = (token_ids(Path(cfg[key].checkpoint_dir)) for key in ("checkpointer", "teacher_checkpointer"))
    if not student or not teacher:
        return
    wanted = "the same token-to-id map for student and teacher"
    remedy = "Distillation compares probabilities id by id: choose a teacher of the same family"
    for token, index in sorted(student.items(), key=lambda item: item[1]):
        if teacher.get(token) != index:
            difference = f"{token!r} is {index} for the student and {teacher.get(token)} for the teacher"
            yield Problem("teacher_checkpointer.checkpoint_dir", difference, wanted, remedy)
            return


def _bytes_to_write(cfg: DictConfig) -> int:
    """One export, two with held-out evaluation, and the checkpoints kept, one more while it is written."""
    specs: list[TensorSpec] = []
    total = 0
    for path in checkpoint_files(cfg.checkpointer):
        total += path.stat().st_size
        if path.suffix == ".safetensors":
            specs += read_safetensors_header(path).values()
    exports = total * (2 if cfg.eval_dataset is not None else 1)
    is_adapted = "lora_rank" in cfg.model
    num_parameters = sum(_num_elements(spec.shape) for spec in specs)
    return exports + (0 if is_adapted else num_parameters * _ADAM_BYTES * (cfg.keep_last_n_checkpoints + 1))


def _num_elements(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def check_tokenizer(tokenizer: Any, num_rows: int, max_seq_len: int) -> None:
    """Compare a tokenizer with the student that is to use it.

    Args:
        tokenizer: of torchtune's protocol.
        num_rows: of the student's embedding and head.
        max_seq_len: that the student's positions reach to.

    Raises:
        ConfigError: it has ids that the model has no row for, or lets through sequences that are too long.
    """
    problems = []
    special = getattr(tokenizer, "special_tokens", None) or {}
    highest_id = max([int(getattr(tokenizer, "vocab_size", 0)) - 1, *special.values()])
    if highest_id >= num_rows:
        problems.append(
            Problem("tokenizer", f"ids up to {highest_id}", f"ids below {num_rows}, the rows of the student's head")
        )
    if tokenizer.max_seq_len is not None and tokenizer.max_seq_len > max_seq_len:
        wanted = f"at most {max_seq_len}, the model's own max_seq_len"
        problems.append(Problem("tokenizer.max_seq_len", tokenizer.max_seq_len, wanted))
    if problems:
        raise ConfigError(*problems)
