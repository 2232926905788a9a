"""What does a cached teacher cost on disk, and what does distilling from it lose? One table.

`make bench` runs the quickstart first, whose teacher, pruned student and text this uses. The teacher is asked once for
each encoding; then the pruned student is distilled for the same steps on the same tokens in the same order from the
teacher itself and from each cache, and all students are evaluated beside the teacher. Last, steps from each cache take
turns with steps that have labels only, in one process. About an hour on two cores; what has been done is not done
again, and names on the command line choose rows:

    python tests/benchmarks/cached_teachers.py [ROW …]
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

from quickstart_baselines import TUNE

from kd_recipes.config import find_config, load_and_validate
from kd_recipes.distill import DistillRecipe
from kd_recipes.teachers import CachedTeacher

ROOT = Path("runs/bench/cached_teachers")
STEPS = 30
ROUNDS = 8
MAX_BATCHES = 20  # of held-out text
SAME = ["dataset.split=train[:300]", "dtype=fp32"]  # some more than the steps see
COMPONENT = "teacher.encoding._component_=kd_recipes.teachers"
TOP = (8, 16, 64)
ENCODINGS = {
    **{f"drawn_{draws}": [f"{COMPONENT}.RandomSampling", f"teacher.encoding.num_draws={draws}"] for draws in (12, 50)},
    **{f"top_{k}": ["~teacher.encoding.num_draws", f"{COMPONENT}.TopK", f"teacher.encoding.k={k}"] for k in TOP},
}
CONFIG = str(find_config("quickstart_cached"))


def run(recipe: str, config: str, name: str, *overrides: str) -> None:
    """One `tune run`, whose output goes to a file; stops at the first that fails."""
    print("tune run", recipe, name, flush=True)
    ROOT.mkdir(parents=True, exist_ok=True)
    with (ROOT / f"{name}_{recipe}.log").open("w") as log:
        command = [TUNE, "run", f"kd_recipes/{recipe}", "--config", config, *overrides]
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)


def settings(name: str) -> list[str]:
    """Overrides that make a row's teacher the quickstart's."""
    if name == "online":
        return [*SAME, "teacher=null"]
    if name == "labels":
        return [*SAME, "teacher=null", "kd_ratio=0"]
    return [*SAME, f"teacher.path={ROOT / name / 'cache'}", *ENCODINGS[name]]


def fill(name: str) -> None:
    """Ask the teacher about what is not in the cache yet."""
    if name in ENCODINGS:
        run("cache_teacher", CONFIG, name, *settings(name), "~eval_dataset")


def distil(name: str) -> None:
    """Distil the pruned student, if that has not been done."""
    if not (ROOT / name / "run" / "final" / "config.json").is_file():
        shorter = ["~eval_dataset", "~save_every_n_steps", f"max_steps={STEPS}", f"output_dir={ROOT / name / 'run'}"]
        run("distill", CONFIG, name, *settings(name), *shorter)


def evaluate(names: list[str]) -> dict[str, tuple[float, float]]:
    """Perplexity and KL(teacher || student) on held-out text, with the teacher itself, over all ids."""
    models = [f"models.{name}={ROOT / name / 'run' / 'final'}" for name in names]
    others = ["~models.distilled", "prompts=null", "num_prompts=0", f"max_batches={MAX_BATCHES}", "dtype=fp32"]
    run(
        "evaluate",
        str(find_config("quickstart_evaluate")),
        "all",
        *models,
        *others,
        f"output_dir={ROOT / 'evaluation'}",
    )
    found = json.loads((ROOT / "evaluation" / "evaluation.json").read_text())["models"]
    texts = {model["name"]: model["text"] for model in found}
    return {name: (math.exp(text["cross_entropy"]["mean"]), text["kl"]["mean"]) for name, text in texts.items()}


def bytes_a_token(name: str) -> float:
    """Of a cache, its index included."""
    store = CachedTeacher(str(ROOT / name / "cache")).open_cache().store
    return store.num_bytes / store.num_positions


def step_ratio(name: str) -> float:
    """Time of a step from a cache over that of one with labels only; median over steps that take turns."""
    output = [f"output_dir={ROOT / 'steps'}", "~eval_dataset", "resume_from_checkpoint=auto"]
    cfg = load_and_validate(CONFIG, [*settings(name), *output], "distill")
    recipe = DistillRecipe(cfg)
    recipe.setup(cfg)
    ratios = []
    for batch in islice(recipe._loader.batches(), ROUNDS):
        seconds = []
        for kd_ratio in (0.0, 0.5, 0.5, 0.0):  # so that a drift of the machine's speed cancels
            started = time.perf_counter()
            objective = replace(recipe._objective, kd_ratio=kd_ratio)
            recipe._loss(objective, batch, batch.num_valid_tokens).total.backward()
            recipe._updates.collect()
            recipe._updates.apply()
            seconds.append(time.perf_counter() - started)
        ratios.append((seconds[1] + seconds[2]) / (seconds[0] + seconds[3]))
    recipe.cleanup()
    return statistics.median(ratios)


def main() -> None:
    """Do the rows that are asked for, then evaluate all that are there."""
    for name in sys.argv[1:] or ("online", "labels", *ENCODINGS):
        fill(name)
        distil(name)
    done = [name for name in ("online", "labels", *ENCODINGS) if (ROOT / name / "run" / "final").is_dir()]
    found = evaluate(done)
    lines = [
        "| | bytes a token | perplexity | over online | KL | step over labels only |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in ["teacher", "pruned", *done]:
        perplexity, kl = found[name]
        over = f"{perplexity / found['online'][0]:.3f}" if "online" in found else ""
        cost = (f"{bytes_a_token(name):.1f}", f"{step_ratio(name):.3f}") if name in ENCODINGS else ("", "")
        lines.append(f"| {name} | {cost[0]} | {perplexity:.2f} | {over} | {kl:.4f} | {cost[1]} |")
        print(lines[-1], flush=True)
    (ROOT / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
