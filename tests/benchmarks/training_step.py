"""What a whole training step costs: over its parts measured alone, and against torchtune's own recipe.

    python -m kd_recipes.quickstart && python tests/benchmarks/training_step.py

The quickstart's teacher and pruned student, adapters, text and batches. The parts are the bodies of both models, the
products of the heads that nobody can avoid, and the optimizer; they take turns with the whole step in one process. The
recipes run one after the other, each in a process of its own; memory is the peak of all that the process holds.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from quickstart_baselines import TORCHTUNE, TUNE

from kd_recipes.config import find_config, load_and_validate
from kd_recipes.distill import DistillRecipe

STEPS, ROUNDS = 8, 5
RECIPES = {
    "kd_recipes": ("kd_recipes/distill", "throughput/tokens_per_second", ["~eval_dataset", "dtype=fp32"]),
    "torchtune": ("knowledge_distillation_single_device", "tokens_per_second_per_gpu", TORCHTUNE),
}


def run_recipe(name: str, directory: Path) -> tuple[float, float]:
    """Seconds a thousand tokens, median over the steps but the first two, and peak memory in GiB."""
    recipe, speed, overrides = RECIPES[name]
    logger = ["metric_logger=torchtune.training.metric_logging.DiskLogger"]
    command = [TUNE, "run", recipe, "--config", str(find_config("quickstart")), f"output_dir={directory}", *logger]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*command, *overrides, f"max_steps_per_epoch={STEPS}"], **quiet)  # type: ignore[call-overload]
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed; run it to see why")
    text = next((directory / "logs").glob("*.txt")).read_text()
    speeds = [float(value) for value in re.findall(rf"\b{speed}:([\d.]+)", text)]
    unit = 2**20 if sys.platform == "linux" else 2**30  # macOS says bytes
    return 1000 / statistics.median(speeds[2:]), usage.ru_maxrss / unit


def seconds(action: Callable[[], object]) -> float:
    """That it takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


class Parts:
    """The parts of the quickstart's training step, each ready to be run alone, and the whole."""

    def __init__(self, directory: Path) -> None:
        overrides = [f"output_dir={directory}", "dtype=fp32", "~eval_dataset"]
        cfg = load_and_validate("quickstart", overrides, "distill")
        self.recipe = recipe = DistillRecipe(cfg)
        recipe.setup(cfg)
        assert recipe._teacher is not None
        self.batch = next(recipe._loader.batches())
        student = recipe.student(self.batch).logits
        teacher = recipe._teacher.signal(self.batch).logits
        self.factors = [(logits.inputs[0].detach(), logits.weights[0].detach()) for logits in (student, teacher)]
        self.grad = torch.randn_like(self.factors[0][0])
        self.logits = torch.empty(len(self.grad), recipe._num_ids)
        self.grads: list[torch.Tensor] = []
        self.whole()

    def whole(self) -> None:
        """As the recipe does it."""
        loss = self.recipe._loss(self.recipe._objective, self.batch, self.batch.num_valid_tokens)
        loss.total.backward()
        float(loss.total.detach())
        self.grads = [parameter.grad for parameter in self.recipe._updates.parameters.values()]
        self.optimizer()

    def teacher_body(self) -> None:
        """Its hidden states."""
        assert self.recipe._teacher is not None
        self.recipe._teacher.signal(self.batch)

    def student_body(self) -> None:
        """Its hidden states, and from their gradient to the adapters'."""
        self.recipe.student(self.batch).logits.inputs[0].backward(self.grad)
        self.recipe._updates.drop()

    @torch.no_grad()
    def floor(self) -> None:
        """Logits of both models, and the gradient of the student's hidden states: its head is frozen."""
        (hidden, weight), (teacher_hidden, teacher_weight) = self.factors
        torch.mm(teacher_hidden, teacher_weight.t(), out=self.logits)
        torch.mm(hidden, weight.t(), out=self.logits)
        torch.mm(self.logits, weight, out=self.grad)

    def optimizer(self) -> None:
        """Norm, clipping, update."""
        updates = self.recipe._updates
        for parameter, grad in zip(updates.parameters.values(), self.grads, strict=True):
            parameter.grad = grad
        updates.collect()
        updates.apply()

    def ratio(self) -> tuple[float, dict[str, float]]:
        """The whole step over the sum of its parts, and each part's share of that sum; medians."""
        names = ("teacher_body", "student_body", "floor", "optimizer")
        rounds = [[seconds(self.whole), *(seconds(getattr(self, name)) for name in names)] for _ in range(ROUNDS)]
        whole, *parts = (statistics.median(times) for times in zip(*rounds, strict=True))
        return whole / sum(parts), {name: part / sum(parts) for name, part in zip(names, parts, strict=True)}


def main() -> None:
    """Print both comparisons."""
    with tempfile.TemporaryDirectory() as root:
        figures = {name: run_recipe(name, Path(root) / name) for name in RECIPES}
        print("| recipe | time a token | peak memory |\n|---|---:|---:|")
        for name, (cost, memory) in figures.items():
            ratios = (mine / theirs for mine, theirs in zip((cost, memory), figures["torchtune"], strict=True))
            print(f"| {name} | {next(ratios):.2f} | {next(ratios):.2f} ({memory:.1f} GiB) |")
        whole, shares = Parts(Path(root) / "parts").ratio()
        parts = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        print(f"\nwhole step over the sum of its parts: {whole:.2f} ({parts})")


if __name__ == "__main__":
    main()
