"""Settings that need less memory: each is tried on the estimate, so that what it saves is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from kd_recipes import _torchtune
from kd_recipes.errors import ConfigError
from kd_recipes.estimation.memory import Memory, Question, estimate_memory
from kd_recipes.training.preflight import loads_teacher_model

_LORA = {"lora_attn_modules": ["q_proj", "v_proj", "output_proj"], "apply_lora_to_mlp": True, "lora_rank": 32}
_LORA |= {"lora_alpha": 64}
_LEAST = 0.01  # share of the peak that a remedy has to save to be worth a line


@dataclass(frozen=True)
class Remedy:
    """One thing to change.

    Args:
        what: it is, and its price.
        settings: as they are written after the config's name.
        saved: bytes of the peak.
        peak: that is left.
        fits: whether that is little enough.
    """

    what: str
    settings: str
    saved: int
    peak: int
    fits: bool


def find_remedies(question: Question, memory: Memory) -> list[Remedy]:
    """What saves memory, the most first.

    Args:
        question: what the memory was estimated for.
        memory: that it takes.
    """
    limit = question.machine.memory or 0
    found = []
    for what, settings, changed in _candidates(question):
        try:
            peak = estimate_memory(changed).peak
        except ConfigError:  # not with this model
            continue
        if memory.peak - peak > _LEAST * memory.peak:
            found.append(Remedy(what, settings, memory.peak - peak, peak, peak <= limit))
    return sorted(found, key=lambda remedy: -remedy.saved)


def _candidates(question: Question) -> Iterator[tuple[str, str, Question]]:
    cfg, machine = question.cfg, question.machine

    def change(what: str, **settings: Any) -> tuple[str, str, Question]:
        words = " ".join(f"{name}={value}" for name, value in settings.items())
        return what, words, replace(question, cfg=_with(cfg, **settings))

    if not cfg.enable_activation_checkpointing:
        yield change("compute blocks again: a third more work", enable_activation_checkpointing=True)
    if cfg.batch_size > 1:
        fewer = {"batch_size": 1, "gradient_accumulation_steps": cfg.gradient_accumulation_steps * cfg.batch_size}
        yield change("smaller micro-batches, the same update", **fewer)
    if cfg.dtype == "fp32":
        yield change("compute in bf16", dtype="bf16")
    if loads_teacher_model(cfg) and (cfg.teacher_dtype or cfg.dtype) == "fp32":
        yield change("the teacher in bf16", teacher_dtype="bf16")
    if loads_teacher_model(cfg) and machine.num_devices == 1:
        yield change("the teacher's weights in 8 bits", teacher_quantization="int8")
        if machine.kind == "cuda":
            yield change("the teacher's blocks in host memory: it answers more slowly", teacher_cpu_offload=True)
    if cfg.dtype == "bf16" and cfg.master_weights and "lora_rank" not in cfg.model:
        yield change("no float32 copies: small updates are lost", master_weights=False)
    yield from _structural(question, change)
    half = question.length // 2
    shorter = replace(question, cfg=cfg, length=half)
    yield "sequences half as long", f"tokenizer.max_seq_len={half}", shorter
    if machine.kind == "cuda":
        more = replace(machine, num_devices=machine.num_devices * 2)
        words = f"tune run --nproc_per_node {more.num_devices}"
        yield f"share the models among {more.num_devices} devices", words, replace(question, machine=more)


def _structural(
    question: Question, change: Callable[..., tuple[str, str, Question]]
) -> Iterator[tuple[str, str, Question]]:
    """Other models and optimizers."""
    cfg = question.cfg
    if (lora := _lora_builder(cfg.model)) is not None:
        section = {**OmegaConf.to_container(cfg.model), "_component_": lora, **_LORA}  # type: ignore[dict-item]
        words = f"model={lora} " + " ".join(f"model.{name}={_word(value)}" for name, value in _LORA.items())
        yield "train adapters alone", words, replace(question, cfg=_with(cfg, model=section))
    if (
        str(cfg.optimizer._component_) in ("torch.optim.AdamW", "torch.optim.Adam")
        and question.machine.num_devices == 1
    ):
        name = f"torchao.optim.{str(cfg.optimizer._component_).rpartition('.')[2]}8bit"
        section = {k: v for k, v in cfg.optimizer.items() if k not in ("fused", "foreach")} | {"_component_": name}
        yield "moments in 8 bits", f"optimizer={name}", replace(question, cfg=_with(cfg, optimizer=section))
    if loads_teacher_model(cfg):
        section = {"_component_": "kd_recipes.teachers.CachedTeacher", "path": "runs/teacher"}
        section |= {"encoding": {"_component_": "kd_recipes.teachers.RandomSampling", "num_draws": 50}}
        changed = replace(question, cfg=_with(cfg, teacher=section))
        yield "ask the teacher once, before the run: docs/teachers.md", "a `teacher:` section", changed


def _with(cfg: DictConfig, **settings: Any) -> DictConfig:
    changed = cfg.copy()
    for name, value in settings.items():
        changed[name] = value
    return changed


def _lora_builder(model: DictConfig) -> str | None:
    """The builder of the same model with adapters; None where it has them, or there is none."""
    module, _, name = str(model._component_).rpartition(".")
    if "lora_rank" in model:
        return None
    try:
        _torchtune.locate(f"{module}.lora_{name}")
    except ValueError:
        return None
    return f"{module}.lora_{name}"


def _word(value: object) -> str:
    return f"'[{','.join(map(str, value))}]'" if isinstance(value, list) else str(value)
