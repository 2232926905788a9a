"""What config sections describe, built, with errors that name the section: the step from config to objects."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig
from torchtune import training
from torchtune.modules import TransformerDecoder

from kd_recipes import _torchtune
from kd_recipes.errors import ConfigError, Problem, one_line

# The section of a model -> the section of its weights.
CHECKPOINTERS = {"model": "checkpointer", "teacher_model": "teacher_checkpointer"}


def build(key: str, section: DictConfig | None, *args: Any, **kwargs: Any) -> Any:
    """Instantiate a section; None for none.

    Raises:
        ConfigError: the component's own error, which is about the section's values.
    """
    if section is None:
        return None
    try:
        return _torchtune.instantiate(section, *args, **kwargs)
    except ConfigError:
        raise
    except Exception as error:  # a component of the user's can raise anything
        raise ConfigError(Problem(key, section._component_, "one that can be built", one_line(error))) from error


def build_callable(key: str, section: DictConfig | None) -> Any:
    """As :func:`build`, but a function is not called: it is returned, with the section's settings as its arguments.

    Raises:
        ConfigError: as :func:`build`.
    """
    function = _torchtune.locate(section._component_) if section is not None else None
    if section is None or not inspect.isfunction(function):
        return build(key, section)
    return partial(function, **{str(name): value for name, value in section.items() if name != "_component_"})


def build_profiler(section: DictConfig | None) -> Any:
    """The profiler that a ``profiler:`` section describes: start, step and stop; does nothing where it is off.

    Raises:
        ConfigError: as :func:`build`.
    """
    if section is None or not section.get("enabled", False):
        return training.DummyProfiler()
    return build("profiler", section)[0]


def find_device(key: str, name: str) -> torch.device:
    """The device of that name.

    Raises:
        ConfigError: there is no such device, or not here.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(Problem(key, name, "a device such as cpu, cuda or cuda:1")) from error
    if device.type == "meta":
        raise ConfigError(Problem(key, name, "a device that computes, such as cpu, cuda or cuda:1"))
    if device.type == "cuda" and not torch.cuda.is_available():
        remedy = "torch sees no CUDA device; device=cpu runs without one"
        raise ConfigError(Problem(key, name, "a device that is there", remedy))
    try:
        torch.empty(0, device=device)
    except Exception as error:  # a number too high, or a kind of device that this build of torch lacks
        raise ConfigError(Problem(key, name, "a device that is there", str(error).partition("\n")[0])) from error
    return device


@dataclass(frozen=True)
class Loaded:
    """A model with its weights, and where they came from.

    Args:
        model: in the dtype asked for.
        checkpointer: the torchtune checkpointer that read the weights, and can write them; None where nothing was read.
        file_dtype: of the weights in the file.
    """

    model: TransformerDecoder
    checkpointer: Any
    file_dtype: torch.dtype


def build_model(key: str, section: DictConfig, *, dtype: torch.dtype, device: torch.device) -> TransformerDecoder:
    """Build a model without its weights.

    Raises:
        ConfigError: its builder cannot do with the section's values.
    """
    try:
        return _torchtune.build_model(section, dtype=dtype, device=device)
    except ConfigError:
        raise
    except Exception as error:  # builders check little, and fail where they happen to
        raise ConfigError(Problem(key, section._component_, "a model that can be built", one_line(error))) from error


def load_model(
    key: str,
    model: DictConfig,
    checkpointer: DictConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    is_main: bool = True,
) -> Loaded:
    """Build a model and load its weights.

    Args:
        key: of the model's section.
        model: its section.
        checkpointer: of its weights.
        dtype: of the model.
        device: of the model.
        is_main: a process that is not reads nothing: its model is on the meta device.

    Raises:
        ConfigError: the model cannot be built, or is not the one that the checkpoint holds.
    """
    if not is_main:
        return Loaded(build_model(key, model, dtype=dtype, device=torch.device("meta")), None, dtype)
    decoder = build_model(key, model, dtype=dtype, device=device)
    try:
        reader, state = _torchtune.load_checkpoint(checkpointer)
    except Exception as error:  # torchtune raises bare ones
        raise unreadable(key, checkpointer, error) from error
    problems = _torchtune.load_weights(decoder, state)
    if problems:
        raise does_not_fit(key, model, problems)
    file_dtype = next(tensor.dtype for tensor in state.values())
    return Loaded(decoder, reader, file_dtype)


def unreadable(key: str, checkpointer: DictConfig, error: Exception) -> ConfigError:
    """That the checkpoint of the model ``key`` cannot be read."""
    where = checkpointer.get("checkpoint_dir", checkpointer._component_)
    return ConfigError(Problem(CHECKPOINTERS.get(key, key), where, "a checkpoint that can be read", one_line(error)))


def does_not_fit(key: str, model: DictConfig, problems: Sequence[str]) -> ConfigError:
    """That the model ``key`` is not the one whose weights have been read."""
    more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
    wanted = "the model that the checkpoint holds"
    return ConfigError(Problem(key, model._component_, wanted, f"{problems[0]}{more}"))
