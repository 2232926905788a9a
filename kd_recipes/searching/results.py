"""What a search leaves: its table, its best config, and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from kd_recipes.searching.hparams import write_hparams
from kd_recipes.searching.page import html
from kd_recipes.searching.plan import Plan
from kd_recipes.searching.records import Record, best, markdown, shown
from kd_recipes.searching.study import Search
from kd_recipes.storage import write_json

BEST = "best.yaml"
PAGE = "sweep.html"


def write_results(directory: Path, plan: Plan, search: Search) -> str:
    """Write sweep.md, sweep.json, sweep.html, hparams/, and best.yaml where a trial was run to its end.

    Returns:
        The table and the verdict, for the screen; nothing, and nothing is written, where no trial has ended.
    """
    records, metric = search.records(), plan.metric.name
    if not records:
        return ""
    table, said = markdown(records, metric), verdict(records, metric)
    leader = best(records)
    trials = [record.to_json() for record in records]
    write_json(directory / "sweep.json", {"metric": metric, "best": leader and leader.name, "trials": trials})
    (directory / "sweep.md").write_text(f"{said}\n\n{table}\n", encoding="utf-8")
    done = f"Wrote {directory / PAGE}, and for TensorBoard {directory / 'hparams'}"
    if leader is not None:
        done += f". The best again: tune run kd_recipes.distill --config {directory / BEST}"
        values = search.values(leader.name)
        config = OmegaConf.to_yaml(plan.best_config(values, directory / "best"))
        (directory / BEST).write_text(f"# {said}\n{config}", encoding="utf-8")
    write_hparams(directory / "hparams", records, search.trials, metric)
    (directory / PAGE).write_text(html(records, search.ended(), metric, said), encoding="utf-8")
    return f"\n{table}\n\n{said}\n\n{done}"


def verdict(records: Sequence[Record], metric: str) -> str:
    """What came out, in a sentence."""
    leader = best(records)
    count = f"{len(records)} trial{'s' * (len(records) != 1)}"
    if leader is None:
        return f"None of {count} was run to its end."
    values = ", ".join(f"{key} {shown(value)}" for key, value in leader.values.items())
    text = f"Best of {count}: {leader.name} with {values}: {metric} {shown(leader.metric)} at step {leader.step}"
    baseline = next((record for record in records if record.is_baseline and record.status == "complete"), None)
    if leader.is_baseline:
        return f"{text}; these are the config's own values."
    return f"{text}; the config's own values have {shown(baseline.metric)}." if baseline else f"{text}."
