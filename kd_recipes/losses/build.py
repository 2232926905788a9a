"""From the sections of a config to an objective."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from omegaconf import DictConfig, ListConfig
from torch import nn
from torchtune.modules.loss import CEWithChunkedOutputLoss

from kd_recipes.batch import IGNORE_INDEX
from kd_recipes.errors import ConfigError, Problem, gather, within
from kd_recipes.losses.divergences import Differentiated, Divergence, ForwardKL
from kd_recipes.losses.features import FeatureTerm, FeatureTerms
from kd_recipes.losses.objective import Objective
from kd_recipes.losses.torchtune_losses import TorchtuneObjective
from kd_recipes.parts import build, build_callable


def build_divergence(key: str, section: DictConfig | None) -> Any:
    """What a ``kd_loss:`` section names: a class is built; a function is a divergence itself, differentiated for it.

    Raises:
        ConfigError: as :func:`~kd_recipes.parts.build`.
    """
    built = build_callable(key, section)
    return Differentiated(built) if isinstance(built, partial) else built


def build_feature_terms(key: str, sections: DictConfig | ListConfig | None) -> FeatureTerms:
    """The terms that a ``feature_losses:`` section, or a list of them, names.

    Raises:
        ConfigError: as :func:`~kd_recipes.parts.build`, or one that is no term.
    """
    if isinstance(sections, ListConfig):
        by_key = {f"{key}[{index}]": section for index, section in enumerate(sections)}
    else:
        by_key = {} if sections is None else {key: sections}
    terms = gather(*(partial(_build_term, path, section) for path, section in by_key.items()))
    return FeatureTerms(dict(zip(by_key, terms, strict=True)))


def _build_term(key: str, section: DictConfig) -> FeatureTerm:
    term = within(key, partial(build, key, section))
    if not isinstance(term, FeatureTerm):
        raise ConfigError(Problem(key, section._component_, "a kd_recipes.losses.FeatureTerm"))
    return term


def choose_objective(
    loss: nn.Module | None, kd_loss: Any, *, token_weights: Any = None, **settings: Any
) -> Objective | TorchtuneObjective:
    """The objective that a config's ``loss`` and ``kd_loss`` describe.

    Args:
        loss: a cross entropy of torchtune's signature; None for ours.
        kd_loss: a divergence of ours, or a module of torchtune's signature; None for forward KL.
        token_weights: the section that gives the batches' tokens their weights; None where all weigh the same.
        settings: the fields of :class:`~kd_recipes.losses.objective.Objective` but the divergence.

    Raises:
        ConfigError: a part that is no such loss, two chunked modules that do not chunk alike, or settings that
            torchtune's losses do not have.
    """
    _require_signature("loss", loss, "logits, labels")
    if not isinstance(kd_loss, nn.Module):
        if not (kd_loss is None or isinstance(kd_loss, Divergence)):
            wanted = "a Divergence, a function of (log_p, log_q), or a loss of torchtune's"
            raise ConfigError(Problem("kd_loss", type(kd_loss).__name__, wanted))
        if loss is not None and not isinstance(loss, CEWithChunkedOutputLoss):  # which is the cross entropy of ours
            wanted = "no loss beside a divergence of ours, which brings its own cross entropy"
            raise ConfigError(Problem("loss", type(loss).__name__, wanted, "Leave it out, or set torchtune's kd_loss"))
        return Objective(divergence=kd_loss or ForwardKL(), **settings)
    _require_signature("kd_loss", kd_loss, "student logits, teacher logits, labels")
    loss = loss if loss is not None else nn.CrossEntropyLoss(ignore_index=IGNORE_INDEX)
    chunks = {part.num_output_chunks for part in (loss, kd_loss) if hasattr(part, "num_output_chunks")}
    if len(chunks) > 1:
        raise ConfigError(Problem("loss.num_output_chunks", chunks, "the same number as kd_loss.num_output_chunks"))
    lacking = {key: settings.pop(key, None) for key in ("teacher_temperature", "label_smoothing")}
    lacking["token_weights"] = token_weights and token_weights._component_
    for key, value in lacking.items():
        if value:
            remedy = "Choose a kd_loss of kd_recipes.losses, which has it"
            raise ConfigError(Problem(key, value, "none beside torchtune's kd_loss", remedy))
    settings.pop("chunk_size", None)
    return TorchtuneObjective(loss, kd_loss, **settings)


def _require_signature(key: str, part: Any, names: str) -> None:
    if part is None:
        return
    try:
        inspect.signature(part.forward if isinstance(part, nn.Module) else part).bind(*names.split(", "))
    except TypeError as error:
        raise ConfigError(Problem(key, type(part).__name__, f"a loss that is called with ({names})")) from error
