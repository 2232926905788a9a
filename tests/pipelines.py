"""A pipeline of toys, for the tests that run it and for the script that kills it."""

from __future__ import annotations

import hashlib
import multiprocessing
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from kd_recipes.compression import read_checkpoint
from kd_recipes.entry import RECIPES, run_recipe
from kd_recipes.exporting.gguf import write_gguf
from toy import MAX_SEQ_LEN, Toys, save_config, text_section, toy_config


def save_pipeline(toys: Toys, root: Path, *, max_steps: int = 12, is_long: bool = False) -> Path:
    """Write a pipeline from a GGUF file to a report, and what it names; returns its path. It writes to ``root/out``.

    Args:
        toys: what it is made of.
        root: its directory.
        max_steps: of the distillation.
        is_long: whether the teacher is corrected, and the student quantized and distilled on the lattice.
    """
    root.mkdir(parents=True, exist_ok=True)
    write_gguf(read_checkpoint(toys.teacher), root / "teacher.gguf", "f32")
    distillation = toy_config(toys, root)
    for key in ("recipe", "output_dir"):
        del distillation[key]
    held_out = text_section(toys.data / "held_out.jsonl", root / "cache")
    length = {"max_steps": max_steps, "epochs": 100, "eval_every_n_steps": 6, "save_every_n_steps": 2}
    text = {"dataset": text_section(toys.data / "text.jsonl", root / "cache"), "eval_dataset": held_out}
    save_config(distillation, root / "distill.yaml", health=None, **length, **text)
    config = {
        "recipe": "pipeline",
        "output_dir": str(root / "out"),
        "values": {
            "tokenizer": {
                "_component_": "kd_recipes.tokenizers.hf_tokenizer",
                "path": "step:teacher",
                "max_seq_len": MAX_SEQ_LEN,
            },
            "text": text["dataset"],
            "held_out": held_out,
        },
        "steps": _long(root) if is_long else _steps(root),
    }
    OmegaConf.save(OmegaConf.create(config), root / "pipeline.yaml")
    return root / "pipeline.yaml"


def _steps(root: Path) -> dict[str, Any]:
    data = {"tokenizer": "${values.tokenizer}", "device": "cpu", "dtype": "fp32"}
    calibration = {"num_calibration_tokens": 128, "num_held_out_tokens": 64, "sequence_length": 64}
    pruning = {"_component_": "kd_recipes.compression.DepthPruning", "num_blocks": 2}
    cached = {
        "teacher": {
            "_component_": "kd_recipes.teachers.CachedTeacher",
            "path": "step:cached",
            "encoding": {"_component_": "kd_recipes.teachers.TopK", "k": 8},
        }
    }
    models = {"model": "step:pruned|teacher", "teacher_model": "step:teacher"}
    distillation = {"config": str(root / "distill.yaml"), "checkpoints": models, "with": cached}
    names = {"teacher": "step:teacher", "pruned": "step:pruned?", "distilled": "step:distilled"}
    text = {"dataset": "${values.held_out}", "batch_size": 2, "prompts": ["the cat"], "max_new_tokens": 5}
    asked = {"prompts": ["the cat sat"], "num_new_tokens": 4, "max_seq_len": 64}
    return {
        "teacher": {"recipe": "import_gguf", "with": {"gguf_file": str(root / "teacher.gguf"), "dtype": "fp32"}},
        "pruned": {
            "recipe": "compress",
            "with": {
                "checkpoint_dir": "step:teacher",
                "compress": pruning,
                "dataset": "${values.text}",
                **calibration,
                **data,
            },
        },
        "cached": {"recipe": "cache_teacher", **distillation},
        "distilled": {"recipe": "distill", **distillation},
        "evaluation": {"recipe": "evaluate", "with": {"models": names, "reference": "teacher", **text, **data}},
        "exported": {
            "recipe": "export",
            "with": {"checkpoint_dir": "step:distilled", "formats": ["torch_export"], **asked},
        },
    }


def _long(root: Path) -> dict[str, Any]:
    steps, scheme = _steps(root), {"scheme": "int4_g16", "embeddings": None, "overrides": {}}
    correction = {"max_steps": 6, "optimizer": {"lr": 0.01}}
    taught = {"config": str(root / "distill.yaml"), "checkpoints": {"teacher_model": "step:teacher"}}
    corrected = {"recipe": "correct_teacher", **taught, "with": {"correction": correction}}
    rounding = {"_component_": "kd_recipes.compression.Quantization", "method": "round", **scheme}
    quantized = {"recipe": "compress", "with": {**steps["pruned"]["with"], "compress": rounding}}
    quantized["with"]["checkpoint_dir"] = "step:distilled"
    lattice = {"_component_": "kd_recipes.compression.QuantizationAwareTraining", **scheme}
    for name in ("cached", "distilled"):
        steps[name]["checkpoints"] = {"model": "step:pruned", "teacher_model": "step:corrected"}
    qad = {**steps["distilled"], "with": {**steps["distilled"]["with"], "student_constraints": lattice}}
    qad["checkpoints"] = {"model": "step:quantized", "teacher_model": "step:corrected"}
    qad["with"]["max_steps"] = 12
    steps["evaluation"]["with"]["models"] |= {name: f"step:{name}" for name in ("corrected", "quantized", "qad")}
    steps["exported"]["with"]["checkpoint_dir"] = "step:qad"
    return {
        **{name: steps[name] for name in ("teacher", "pruned")},
        "corrected": corrected,
        **{name: steps[name] for name in ("cached", "distilled")},
        **{"quantized": quantized, "qad": qad},
        **{name: steps[name] for name in ("evaluation", "exported")},
    }


def digests(directory: Path, pattern: str = "*.safetensors") -> dict[str, str]:
    """SHA-256 of a checkpoint's weights, or of other files, by their names."""
    files = sorted(directory.glob(pattern))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


class Forked:
    """A recipe's process, forked from one that has imported everything: starting each anew would take minutes.

    Args:
        recipe: its name.
        config: its file.
        num_processes: of which there is one here.
    """

    def __init__(self, recipe: str, config: Path, num_processes: int = 1) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([f"kd_recipes.{name}" for name in RECIPES])
        self._process = context.Process(target=_run, args=(recipe, str(config)))
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int:
        self._process.join()
        return int(self._process.exitcode or 0)

    def terminate(self) -> None:
        self._process.terminate()


def _run(recipe: str, config: str) -> None:
    raise SystemExit(run_recipe(recipe, ["--config", config]))
