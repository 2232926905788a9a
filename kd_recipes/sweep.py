"""Search for the settings of a distillation: which loss, temperature, share of the teacher, learning rate.

Each trial is a distillation of its own; one that is worse than others at the same step is ended early. Writes the best
config (best.yaml), what became of every trial (sweep.md, .json, .html, TensorBoard's HPARAMS) and the best student to
``output_dir``. The same command goes on where a search was cut off.
"""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from kd_recipes.config import Key, is_positive
from kd_recipes.errors import ConfigError, Problem, gather
from kd_recipes.losses import build_divergence
from kd_recipes.processes import alone
from kd_recipes.searching.records import METRICS
from kd_recipes.searching.strategy import PRUNERS, SAMPLERS, Strategy
from kd_recipes.storage import explain_disk_errors
from kd_recipes.training.checkpoint import RunDirectory
from kd_recipes.training.preflight import preflight


def _is_overrides(value: Any) -> bool:
    return isinstance(value, DictConfig) or (
        isinstance(value, ListConfig) and all(isinstance(word, str) for word in value)
    )


KEYS = (
    Key("recipe", "str", wanted="`sweep`"),
    Key("output_dir", "path", required=True, wanted="a directory for everything that the search writes"),
    Key("config", "path", required=True, wanted="a distillation's config: a file, or the name of a shipped one"),
    Key("overrides", "any", wanted="key: value, or a list of key=value, for all trials", check=_is_overrides),
    Key("search", "mapping", required=True, wanted="dotted key: {low, high, log, step} or {choices: [...]}"),
    Key("num_trials", "int", default=20, wanted="a whole number above 0, the baseline included", check=is_positive),
    Key("timeout_minutes", "float", wanted="after which no other trial begins; no limit by default", check=is_positive),
    Key(
        "metric",
        "choice",
        default="perplexity",
        wanted=f"of held-out text, the less the better: {', '.join(METRICS)}",
        check=lambda value: value in METRICS,
    ),
    Key("sampler", "choice", default="tpe", wanted=" or ".join(SAMPLERS), check=lambda value: value in SAMPLERS),
    Key("pruner", "choice", default="median", wanted=" or ".join(PRUNERS), check=lambda value: value in PRUNERS),
    Key(
        "num_warmup_steps",
        "int",
        default=0,
        wanted="steps of a trial before it may be pruned, from 0",
        check=lambda value: value >= 0,
    ),
    Key(
        "num_startup_trials",
        "int",
        default=5,
        wanted="trials before the sampler learns from them and the median prunes, above 0",
        check=is_positive,
    ),
    Key("seed", "int", default=0, wanted="of the values drawn, from 0", check=lambda value: 0 <= value < 2**31),
    Key(
        "keep",
        "choice",
        default="best",
        wanted="whose weights are kept: best or all",
        check=lambda value: value in ("best", "all"),
    ),
    Key("num_processes", "int", default=1, wanted="of each trial, on this machine, above 0", check=is_positive),
)


def main(cfg: DictConfig) -> None:
    """Search, or go on with the search in ``output_dir``.

    Raises:
        ConfigError: what is wrong with the config, the one that it names, and the files that that names.
        RunError: a signal asked it to end, or several trials in a row failed; what is known by then is written.
    """
    _require_packages()
    from kd_recipes.searching.plan import build_plan
    from kd_recipes.searching.results import write_results
    from kd_recipes.searching.runner import Budget, Runner
    from kd_recipes.searching.study import Search

    directory = Path(cfg.output_dir)
    plan = build_plan(
        cfg.config,
        _plain(cfg.overrides) or {},
        _plain(cfg.search),
        cfg.metric,
        directory=directory,
        is_grid=cfg.sampler == "grid",
        check=_check,
    )
    strategy = Strategy(**{field.name: cfg[field.name] for field in fields(Strategy)})
    budget = Budget(**{field.name: cfg[field.name] for field in fields(Budget)})
    with explain_disk_errors(directory), alone(directory, "search"):
        plan.record(directory)
        search = Search(directory, plan.space, plan.own, strategy, plan.metric)
        try:
            Runner(plan, search, budget, _clear if cfg.keep == "best" else lambda _: None).run()
        finally:
            print(write_results(directory, plan, search))


def _check(cfg: DictConfig) -> None:
    """What a distillation would find wrong with its config before it loads anything."""
    gather(partial(preflight, cfg), partial(build_divergence, "kd_loss", cfg.kd_loss))


def _plain(section: Any) -> Any:
    """With references as they stand: they are the trials' own to resolve."""
    return section if section is None else OmegaConf.to_container(section, resolve=False)


def _require_packages() -> None:
    """All that is used later, too: a search of a night is not to end for want of a package that draws it."""
    missing = [name for name in ("matplotlib", "optuna") if importlib.util.find_spec(name) is None]
    if missing:
        wanted, remedy = f"the package {' and the package '.join(missing)}", "pip install 'kd-recipes[search]'"
        raise ConfigError(Problem("recipe", "sweep", wanted, remedy))


def _clear(trial: Path) -> None:
    for weights in RunDirectory(trial).results:
        shutil.rmtree(weights, ignore_errors=True)


if __name__ == "__main__":
    from kd_recipes.entry import run_recipe

    raise SystemExit(run_recipe("sweep"))
