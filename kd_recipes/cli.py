"""The ``kd-recipes`` command: what is there to run, a config to start from, and whether a config is right.

Running is torchtune's part: ``tune run kd_recipes.distill --config FILE``. Nothing here imports torch, except that
``validate`` has to look at the components that a config names, and ``consolidate`` at a model.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kd_recipes import __version__
from kd_recipes.config import load_and_validate, shipped_configs
from kd_recipes.entry import EXIT_BAD_INPUT, RECIPES
from kd_recipes.errors import ConfigError, RunError

EXIT_FAILED = 1
# torchtune 0.6.1, its last release, imports names that torchao 0.16 moved.
FIRST_BAD_TORCHAO = (0, 16)

_EXAMPLES = """\
examples:
  kd-recipes ls                                    the configs and recipes that there are
  kd-recipes cp qwen_1b my_config.yaml             a config to start from
  kd-recipes validate my_config.yaml temperature=2 everything that is wrong with it, before anything is loaded
  tune run kd_recipes.distill --config my_config.yaml
  kd-recipes doctor --config my_config.yaml        memory, disk and time that it will take
  kd-recipes chat --config my_config.yaml          talk to its teacher and student
  kd-recipes consolidate runs/mine                 the student of a run's newest checkpoint
  python -m kd_recipes.quickstart                  the whole way on a CPU, with a real model
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: the words after ``kd-recipes``; the process's own by default.

    Returns:
        The exit status: 0, or 1 where the command could not be carried out or the config is wrong.
    """
    options = _parser().parse_args(argv)
    try:
        if options.command == "ls":
            return _list()
        if options.command == "cp":
            return _copy(options.name, options.destination, force=options.force)
        if options.command == "chat":
            return _chat(options)
        if options.command == "doctor":
            return _doctor(options)
        if options.command == "consolidate":
            return _consolidate(options.run, options.checkpoint, options.output, trusts_all=options.trust_config)
        return _validate(options.file, options.overrides, options.recipe, trusts_all=options.trust_config)
    except ImportError as error:
        installed = version("torchao")
        if tuple(int(part) for part in installed.split(".")[:2]) < FIRST_BAD_TORCHAO:
            raise
        return _fail(
            f"torchtune {version('torchtune')} cannot be imported with torchao {installed} ({error}).\n"
            "Install the one that it works with: pip install 'torchao>=0.15,<0.16'"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kd-recipes",
        description="Recipes for torchtune that distil and compress language models.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kd-recipes {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    commands.add_parser("ls", help="list the configs and recipes")

    copy = commands.add_parser("cp", help="copy a config, to change it")
    copy.add_argument("name", metavar="NAME", help="as `kd-recipes ls` lists it")
    copy.add_argument("destination", metavar="DEST", type=Path, help="a file, or a directory to copy into")
    copy.add_argument("--force", action="store_true", help="overwrite DEST")

    doctor = commands.add_parser("doctor", help="what a distillation will need, and whether that is there")
    doctor.add_argument("overrides", metavar="key=value", nargs="*", help="as after `tune run … --config FILE`")
    doctor.add_argument("--config", metavar="FILE", required=True, help="a YAML file, or the name of a shipped config")
    doctor.add_argument("--device", metavar="NAME", help="such as H100, A10, or cpu; default: what is here")
    doctor.add_argument("--num-devices", metavar="N", type=int, default=1, help="each with a process; default: 1")
    doctor.add_argument("--json", action="store_true", help="all of it as JSON, in bytes and seconds")
    doctor.add_argument("--trust-config", action="store_true", help="let the config name any code")

    _add_chat(commands)

    consolidate = commands.add_parser("consolidate", help="write the student of a run's checkpoint, to be loaded")
    consolidate.add_argument("run", metavar="RUN", type=Path, help="the output_dir of a distillation")
    consolidate.add_argument("--checkpoint", metavar="NAME", help="such as step_00000120; default: the newest")
    consolidate.add_argument("--output", metavar="DIR", type=Path, help="default: RUN/students/NAME")
    consolidate.add_argument("--trust-config", action="store_true", help="let the run's config name any code")

    validate = commands.add_parser("validate", help="check a config, and list all that is wrong with it")
    validate.add_argument("file", metavar="FILE", help="a YAML file, or the name of a shipped config")
    validate.add_argument("overrides", metavar="key=value", nargs="*", help="as after `tune run … --config FILE`")
    validate.add_argument("--trust-config", action="store_true", help="let the config name any code")
    validate.add_argument("--recipe", choices=RECIPES, help="default: the config's own `recipe`, else distill")
    return parser


def _add_chat(commands: Any) -> None:
    chat = commands.add_parser("chat", help="talk to models, side by side")
    chat.add_argument(
        "words", metavar="CHECKPOINT", nargs="*", help="models' directories and .gguf files; after --config, key=value"
    )
    chat.add_argument("--config", metavar="FILE", help="of a distillation that has run: its teacher and best student")
    chat.add_argument("--temperature", metavar="T", type=float, default=0.7, help="0 for the likeliest; default: 0.7")
    chat.add_argument("--top-p", metavar="P", type=float, default=0.9, help="of the likeliest tokens; default: 0.9")
    chat.add_argument("--max-new-tokens", metavar="N", type=int, default=256, help="of a reply; default: 256")
    chat.add_argument("--seed", metavar="N", type=int, default=0, help="of what is drawn; default: 0")
    chat.add_argument("--system", metavar="TEXT", default="", help="what the models are told at the beginning")
    chat.add_argument("--raw", action="store_true", help="go on with what is typed, without a chat template")
    chat.add_argument("--device", metavar="NAME", help="default: cuda if there is one, else cpu")
    chat.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="default: auto")
    chat.add_argument("--trust-config", action="store_true", help="let the config name any code")


def _list() -> int:
    configs = {name: _first_comment(path) for name, path in shipped_configs().items()}
    modules = {name: Path(__file__).with_name(f"{name}.py") for name in RECIPES}
    recipes = {name: _first_docstring_line(path) for name, path in modules.items() if path.is_file()}
    width = max(map(len, [*configs, *recipes]), default=0)
    print("Configs (kd-recipes cp NAME DEST):")
    for name, description in configs.items():
        print(f"  {name:{width}}  {description}")
    print("\nRecipes (tune run kd_recipes.NAME --config FILE):")
    for name, description in recipes.items():
        print(f"  {name:{width}}  {description}")
    return 0


def _copy(name: str, destination: Path, *, force: bool) -> int:
    configs = shipped_configs()
    stem = name.removeprefix("configs/").removesuffix(".yaml")
    if stem not in configs:
        near = difflib.get_close_matches(stem, configs)
        remedy = f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(configs)}"
        return _fail(f"There is no config named {name!r}. {remedy}")
    if destination.is_dir():
        destination = destination / f"{stem}.yaml"
    elif not destination.suffix:  # `tune cp` completes a bare name in the same way
        destination = destination.with_suffix(".yaml")
    if destination.exists() and not force:
        return _fail(f"{destination} is there already. Choose another name, or overwrite it with --force")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(configs[stem], destination)
    except OSError as error:
        return _fail(f"{destination} cannot be written: {error}")
    print(f"Copied {stem} to {destination}")
    return 0


def _validate(file: str, overrides: Sequence[str], recipe: str | None, *, trusts_all: bool) -> int:
    try:
        cfg = load_and_validate(file, list(overrides), recipe, trusts_all=trusts_all)
        if "pipeline" in (recipe, cfg.get("recipe")):  # which names other configs
            from kd_recipes.pipelining.plan import build_plan

            build_plan(cfg)
    except ConfigError as error:
        count = len(error.problems)
        return _fail(f"{file} has {count} problem{'' if count == 1 else 's'}:\n{error}")
    print(f"{file} is valid")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from kd_recipes.estimation import examine, render

    chosen = {"device": options.device, "num_devices": options.num_devices, "trusts_all": options.trust_config}
    try:
        report = examine(options.config, options.overrides, **chosen)
    except ConfigError as error:
        _fail(f"{options.config} cannot be estimated:\n{error}")
        return EXIT_BAD_INPUT
    print(json.dumps(report.as_json(), indent=2) if options.json else render(report))
    return report.exit_status


def _chat(options: argparse.Namespace) -> int:
    from kd_recipes.conversation import Sampling, Settings, converse

    overrides = [word for word in options.words if options.config and "=" in word]
    checkpoints = [Path(word) for word in options.words if word not in overrides]
    sampling = Sampling(options.temperature, options.top_p, options.max_new_tokens, options.seed)
    settings = Settings(sampling, options.system, options.device, options.dtype, options.raw)
    try:
        cfg = None
        if options.config:
            cfg = load_and_validate(options.config, overrides, "distill", trusts_all=options.trust_config)
        converse(checkpoints, cfg, settings)
    except ConfigError as error:
        _fail(f"There is nobody to talk to:\n{error}")
        return EXIT_BAD_INPUT
    except RunError as error:  # no room to unpack a GGUF file
        return _fail(f"There is nobody to talk to:\n{error}")
    return 0


def _consolidate(run: Path, checkpoint: str | None, output: Path | None, *, trusts_all: bool) -> int:
    from kd_recipes.consolidate import consolidate

    try:
        print(f"The student: {consolidate(run, checkpoint, output, trusts_all=trusts_all)}")
    except (ConfigError, RunError) as error:
        return _fail(str(error))
    return 0


def _first_comment(path: Path) -> str:
    comments = (line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    return next(comments, "").lstrip("# ")


def _first_docstring_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def _fail(message: str) -> int:
    print(message, file=sys.stderr)
    return EXIT_FAILED


if __name__ == "__main__":
    raise SystemExit(main())
