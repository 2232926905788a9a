"""What a distillation may not ask of a teacher that is not one model here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from omegaconf import DictConfig
from torch import nn

from kd_recipes.errors import Problem
from kd_recipes.losses import Divergence, build_divergence


def temperatures(cfg: DictConfig) -> set[float]:
    """Those that the teacher's distribution is softened with in a distillation of this config."""
    if cfg.teacher_temperature is not None:
        return {float(cfg.teacher_temperature)}
    value = cfg.temperature
    ends = [value["start"], value["end"]] if isinstance(value, Mapping) else [value]
    return {float(end) for end in ends}


def temperature_problems(cfg: DictConfig, temperature: float, why: str) -> Iterator[Problem]:
    """Where a config asks for another temperature: what is not named has one probability, and cannot be softened.

    Args:
        cfg: of the distillation.
        temperature: the teacher's.
        why: it is that one, as a clause.
    """
    wanted = f"{temperature}, {why}, throughout"
    key = "temperature" if cfg.teacher_temperature is None else "teacher_temperature"
    if temperatures(cfg) != {temperature}:
        yield Problem(key, cfg[key], wanted, f"teacher_temperature={temperature} lets the student's differ")
    health = cfg.health or {}
    if health.get("action") == "raise_temperature" and cfg.teacher_temperature is None:
        yield Problem("health.action", "raise_temperature", f"none that changes the teacher's {wanted}")


def own_divergence_problems(cfg: DictConfig, reason: str) -> Iterator[Problem]:
    """A ``kd_loss`` of torchtune's, where the teacher is none that gives logits.

    Args:
        cfg: of the distillation.
        reason: why it does not do.
    """
    kd_loss = build_divergence("kd_loss", cfg.kd_loss)
    if isinstance(kd_loss, nn.Module):
        remedy = "kd_recipes.losses.ForwardKL has the gradient of theirs"
        yield Problem("kd_loss", type(kd_loss).__name__, f"a divergence of kd_recipes.losses: {reason}", remedy)


def loss_problems(cfg: DictConfig, *, is_drawn: bool = False) -> Iterator[Problem]:
    """Where a config's divergence needs more than is known of the teacher.

    Args:
        cfg: of the distillation.
        is_drawn: whether the ids are drawn, and not the likeliest.
    """
    yield from own_divergence_problems(cfg, "torchtune's need all of a teacher's logits")
    kd_loss = build_divergence("kd_loss", cfg.kd_loss)
    if isinstance(kd_loss, Divergence) and not kd_loss.is_estimable and is_drawn:
        wanted = "ForwardKL, which alone can be estimated from ids that were drawn"
        yield Problem("kd_loss", type(kd_loss).__name__, wanted, "A cache of TopK takes the others")
