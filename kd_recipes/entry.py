"""Where every recipe starts: which one was asked for, its config, and what a user reads when it cannot run.

``tune run kd_recipes.distill`` strips ``.distill`` as if it were a file extension and runs the package, so the name
asked for has to be read from the command line of this process, or under torchrun of its parent.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import re
import sys
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any

from omegaconf import DictConfig

from kd_recipes.config import Key, hide_environment, load, validate
from kd_recipes.errors import ConfigError, Problem, RunError

RECIPES = (
    "cache_teacher",
    "compress",
    "correct_teacher",
    "distill",
    "evaluate",
    "export",
    "import_gguf",
    "pipeline",
    "sweep",
)
DEFAULT_RECIPE = "distill"
EXIT_STOPPED = 1
EXIT_BAD_INPUT = 2
# Recipes that share their work out to the processes of torchrun.
PARALLEL = ("cache_teacher", "correct_teacher", "distill", "evaluate")


def requested_recipe() -> str | None:
    """The recipe named after ``tune run``, from the process's command line; None where it names the package alone."""
    name = _recipe_in(sys.orig_argv)
    if name is None and "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun's workers are started as `python -m kd_recipes`
        import psutil

        parent = psutil.Process().parent()
        name = _recipe_in(parent.cmdline()) if parent else None
    return name


def _recipe_in(command_line: Iterable[str]) -> str | None:
    for word in takewhile(lambda word: word != "--config", command_line):  # what follows is the recipe's own
        if match := re.fullmatch(r"kd_recipes[./](\w+?)(\.py)?", word):
            return match.group(1)
    return None


def choose_recipe(requested: str | None, cfg: DictConfig) -> str:
    """The recipe to run: the one asked for, else the config's own ``recipe``, else a distillation.

    Raises:
        ConfigError: the two contradict each other, or there is no such recipe.
    """
    configured = cfg.get("recipe")
    name = requested or configured or DEFAULT_RECIPE
    if name not in RECIPES:
        near = difflib.get_close_matches(str(name), RECIPES, n=1)
        remedy = f"Did you mean `{near[0]}`?" if near else ""
        raise ConfigError(Problem("recipe", name, f"one of {', '.join(RECIPES)}", remedy))
    if requested and configured and requested != configured:
        wanted = f"`{requested}`, as on the command line"
        raise ConfigError(Problem("recipe", configured, wanted, "Name the same recipe in both places"))
    return str(name)


def recipe_module(name: str) -> Any:
    """The module of a recipe: ``KEYS`` is its schema, ``main(cfg)`` runs it."""
    return importlib.import_module(f"kd_recipes.{name}")


def _require_one_process(recipe: str) -> None:
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    if num_processes > 1 and recipe not in PARALLEL:  # each would do it all, and write over what the others write
        wanted = f"1: `{recipe}` runs in a single process"
        raise ConfigError(Problem("--nproc_per_node", num_processes, wanted, "Leave the torchrun options out"))


def run_recipe(name: str | None, argv: Sequence[str] | None = None) -> int:
    """Parse the command line, check the config, run the recipe.

    Args:
        name: the recipe, or None to take it from the config.
        argv: ``--config FILE [key=value …] [--trust-config] [--help]``, and ``--check`` for ``check=True``; the
            process's own by default.

    Returns:
        0; 2 after bad input; where a run that had begun ended early (stderr says why) 1, or 128 and the number of the
        signal that asked it to.
    """
    parser = argparse.ArgumentParser(prog=f"tune run kd_recipes.{name or '<recipe>'}", add_help=False)
    parser.add_argument("--config")
    parser.add_argument("--trust-config", action="store_true")
    parser.add_argument("--check", dest="switches", action="append_const", const="check=True", default=[])
    parser.add_argument("--help", "-h", action="store_true")
    options, overrides = parser.parse_known_args(argv)
    overrides += options.switches
    if options.config is None and not options.help:
        parser.error("the following arguments are required: --config")
    cfg = DictConfig({})
    try:
        if options.config is not None:
            cfg = load(options.config, overrides, trusts_all=options.trust_config)
        name = choose_recipe(name, cfg)
        recipe = recipe_module(name)
        _require_one_process(name)
        if options.help:
            print(_help(name, recipe))
            return 0
        recipe.main(validate(cfg, recipe.KEYS))
    except ConfigError as error:
        message = hide_environment(cfg, str(error))
        print(f"kd_recipes.{name or DEFAULT_RECIPE} cannot run:\n{message}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except RunError as error:
        print(f"kd_recipes.{name} stopped:\n  - {hide_environment(cfg, str(error))}", file=sys.stderr)
        return error.exit_status
    return 0


def _help(name: str, recipe: Any) -> str:
    lines = [
        f"tune run kd_recipes.{name} --config FILE [key=value …] [--trust-config]",
        "",
        (recipe.__doc__ or "").strip(),
        "",
        "Keys:",
    ]
    key: Key
    for key in recipe.KEYS:
        default = "required" if key.required else f"default {key.default}"
        lines.append(f"  {key.name:32} {key.kind:11} {default:16} {key.all_wanted}".rstrip())
    return "\n".join(lines)
