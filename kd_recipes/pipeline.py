"""Run recipes in order, from one config: import, prune, cache a teacher, distil, evaluate, export, or some of them.

Each step is a recipe in a process of its own, with a directory of its own in ``output_dir``. A step whose settings and
files have not changed since it was made is not run again, and the same command goes on where it was cut off. Writes
report.html, report.md, pipeline.json, and the config of each step in configs/.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from kd_recipes.config import Key
from kd_recipes.evaluation.report import stylesheet
from kd_recipes.pipelining.page import write_page
from kd_recipes.pipelining.plan import build_plan, check_inputs
from kd_recipes.pipelining.records import Records
from kd_recipes.pipelining.runner import Runner
from kd_recipes.pipelining.summary import summarize
from kd_recipes.processes import alone
from kd_recipes.storage import explain_disk_errors

KEYS = (
    Key("recipe", "str", wanted="`pipeline`"),
    Key("output_dir", "path", required=True, wanted="a directory for everything that the steps write"),
    Key(
        "steps",
        "mapping",
        required=True,
        wanted="name: {recipe, config, with, checkpoints, result, enabled, num_processes}, in order; or, in the place "
        "of a section, the path of what is there already",
    ),
    Key("values", "mapping", wanted="anything that several steps have: ${values.NAME} in them"),
    Key(
        "keep_old",
        "bool",
        default=True,
        wanted="whether a step's result is kept, as NAME.old-1, when it is made anew because its inputs have changed",
    ),
)


def main(cfg: DictConfig) -> None:
    """Run the steps that are to be run, in order.

    Raises:
        ConfigError: what is wrong with the config, those that it names, and the files that they name.
        RunError: a step ended early, or a signal asked the pipeline to.
    """
    plan = build_plan(cfg)
    check_inputs(plan)
    directory = Path(cfg.output_dir)
    with explain_disk_errors(directory), alone(directory, "pipeline"):
        records = Records(directory)
        runner = Runner(plan, records, keeps_old=cfg.keep_old)
        try:
            runner.run()
        finally:
            summary = summarize(plan, records, runner.found)
            print(write_page(directory, summary, stylesheet()))


if __name__ == "__main__":
    from kd_recipes.entry import run_recipe

    raise SystemExit(run_recipe("pipeline"))
