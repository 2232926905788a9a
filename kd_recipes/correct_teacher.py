"""Fine-tune a teacher on the text that it is to teach, before a student learns from it: see docs/teachers.md.

Takes the config of the distillation: adapters on `teacher_model` are trained on the labels of `dataset`, with what
`correction` says in the place of the distillation's settings. Leaves the merged teacher in `best/` of its output_dir
(`teacher` in the distillation's by default), for `teacher_checkpointer.checkpoint_dir`, and says how much better it is
on `eval_dataset`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from kd_recipes import _torchtune
from kd_recipes.compression.checkpoint import replace_record
from kd_recipes.config import validate
from kd_recipes.entry import recipe_module
from kd_recipes.errors import ConfigError, Problem
from kd_recipes.history import History
from kd_recipes.training import settings
from kd_recipes.training.parallel import is_main_process

_REQUIRED = (
    *("teacher_model", "teacher_checkpointer", "tokenizer", "dataset", "eval_dataset", "correction"),
    *("batch_size", "optimizer", "metric_logger"),
)
_ADAPTER: Mapping[str, Any] = {  # what `correction` may say of adapters, and says by default
    "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "lora_rank": 16,
    "lora_alpha": 32,
}
_ADAPTER_SETTINGS = (*_ADAPTER, "apply_lora_to_output", "lora_dropout", "use_dora", "quantize_base")
# Of the distillation's settings, what is about its student or about what its teacher says.
_LEFT_OUT = (
    *("recipe", "model", "checkpointer", "teacher", "teacher_model", "teacher_checkpointer", "teacher_dtype"),
    *("teacher_device", "teacher_temperature", "temperature", "kd_loss", "loss", "feature_losses", "label_smoothing"),
    *("student_constraints", "health", "best_metric", "export_dtype", "save_adapter_weights_only", "correction"),
)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")

KEYS = tuple(replace(key, required=key.name in _REQUIRED) for key in settings.KEYS)


@dataclass(frozen=True)
class Corrected:
    """What a correction came to, in nats a token of held-out text.

    Args:
        directory: of the corrected teacher.
        step: after which it was the best one; 0 if it is the teacher as it was.
        before: the teacher's cross entropy.
        after: the corrected one's.
    """

    directory: Path
    step: int
    before: float
    after: float

    @classmethod
    def of(cls, run: Path) -> Corrected:
        """As the run in a directory has recorded it."""
        found = [(e.values["cross_entropy"], e.step) for e in History(run).read("held_out")]
        after, step = min((pair for pair in found if pair[0] is not None), default=(float("nan"), 0))
        return cls(run / "best", step, next(value for value, at in found if at == 0), after)

    def __str__(self) -> str:
        said = f"the teacher's cross entropy on held-out text: {self.before:.4f} nats a token before"
        if self.step == 0:
            return f"{said}, and never less; {self.directory} has the teacher as it was"
        return f"{said}, {self.after:.4f} after step {self.step}, in {self.directory}"


def main(cfg: DictConfig) -> None:
    """Correct the teacher that ``cfg`` names.

    Raises:
        ConfigError: what is wrong with the config and the files it names.
    """
    found = fine_tuning(cfg)
    recipe_module("distill").main(found)  # its loop, with the teacher for a student and none for a teacher
    if is_main_process():
        corrected = Corrected.of(Path(found.output_dir))
        _record(corrected, found, cfg)
        files = sorted(path.name for path in corrected.directory.iterdir() if path.suffix in _WEIGHTS)
        print(corrected)
        print(
            f"To distil from it: teacher_checkpointer.checkpoint_dir={corrected.directory} "
            f"teacher_checkpointer.checkpoint_files=[{','.join(files)}]"
        )


def fine_tuning(cfg: DictConfig) -> DictConfig:
    """The config of a distillation whose student is the teacher, and which has none itself.

    Raises:
        ConfigError: ``correction`` has a setting that there is not, or no ``output_dir`` of its own; or no adapter is
            known.
    """
    correction: Any = OmegaConf.to_container(cfg.correction, resolve=True)
    correction.setdefault("output_dir", str(Path(cfg.output_dir) / "teacher"))
    if problems := [*_problems(correction, cfg.output_dir)]:
        raise ConfigError(*problems)
    adapter = {name: value for name, value in correction.items() if name in _ADAPTER_SETTINGS}
    own = {name: value for name, value in correction.items() if name not in adapter}
    found = cfg.copy()
    for name in _LEFT_OUT:
        found.pop(name)
    found.model = own.get("model") or lora_section(cfg.teacher_model, adapter)
    found.checkpointer = cfg.teacher_checkpointer
    for key in ("dtype", "device"):
        found[key] = cfg[f"teacher_{key}"] or cfg[key]
    for name, value in own.items():  # a component is another one; of a section without a name, some settings
        if isinstance(value, dict) and "_component_" in value:
            found[name] = None
    merged: Any = OmegaConf.merge(found, own, {"kd_ratio": 0.0, "health": None})
    return validate(merged, settings.KEYS)


def _problems(correction: Mapping[str, Any], output_dir: str) -> Iterator[Problem]:
    names = {key.name for key in settings.KEYS}.difference(_LEFT_OUT, ["kd_ratio"]).union(_ADAPTER_SETTINGS, ["model"])
    for name in correction:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            remedy = f"Did you mean `{near[0]}`?" if near else ""
            wanted = "a setting of the adapters, or one of the distillation's that is not about student or teacher"
            yield Problem(f"correction.{name}", name, wanted, remedy)
    place = correction.get("output_dir")
    if place is None or Path(str(place)).resolve() == Path(output_dir).resolve():
        wanted = "a directory for the corrected teacher, apart from the distillation's"
        yield Problem("correction.output_dir", place, wanted)


def lora_section(section: DictConfig, adapter: Mapping[str, Any]) -> DictConfig:
    """The section of a model with adapters on it: that of its builder's twin, ``lora_<name>`` of the same module.

    Args:
        section: of the model.
        adapter: settings of the adapters; those that are not given have defaults.

    Raises:
        ConfigError: the builder has no such twin.
    """
    package, _, name = str(section._component_).rpartition(".")
    component = str(section._component_) if name.startswith("lora_") else f"{package}.lora_{name}"
    try:
        _torchtune.locate(component)
    except ValueError as error:
        remedy = "Name a model with adapters, or the model itself, in correction.model"
        wanted = f"a builder beside which there is a {component}"
        raise ConfigError(Problem("teacher_model._component_", section._component_, wanted, remedy)) from error
    return OmegaConf.merge(_ADAPTER, section, adapter, {"_component_": component})  # type: ignore[return-value]


def _record(corrected: Corrected, found: DictConfig, cfg: DictConfig) -> None:
    """Say beside the weights what they are, in the place of the distillation that the loop takes itself for."""
    step = {
        "step": "teacher correction",
        "from": cfg.teacher_checkpointer.get("checkpoint_dir"),
        "adapter": {name: found.model[name] for name in _ADAPTER_SETTINGS if name in found.model},
        "after_step": corrected.step,
        "figures": {"cross_entropy_before": corrected.before, "cross_entropy_after": corrected.after},
    }
    plain: Any = OmegaConf.to_container(OmegaConf.create(step))
    replace_record(corrected.directory, plain)


if __name__ == "__main__":
    from kd_recipes.entry import run_recipe

    raise SystemExit(run_recipe("correct_teacher"))
