"""Does distillation pay? The quickstart's student, trained three ways on the same tokens in the same order.

`make bench` runs the quickstart first, whose teacher, pruned student and text this uses. Some 20 minutes on 2 cores.

    distilled    kd_recipes.distill, as the quickstart ran it
    labels_only  the same with kd_ratio=0
    torchtune    torchtune's own recipe with its own losses, at the same settings
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from kd_recipes.config import find_config

ROOT = Path("runs/bench")
STEPS = "30"
TUNE = str(Path(sys.executable).with_name("tune"))
# torchtune's recipe knows neither our keys nor `auto`, and needs all of its own
TORCHTUNE = [
    *("~recipe", "~temperature", "~max_steps", "~eval_every_n_steps", "~max_eval_batches", "~save_every_n_steps"),
    *(
        "~keep_last_n_checkpoints",
        "~health",
        "~log_graph",
        "dtype=fp32",
        f"max_steps_per_epoch={STEPS}",
        "gradient_accumulation_steps=1",
    ),
    *("compile=False", "resume_from_checkpoint=False", "enable_activation_checkpointing=False"),
    *("enable_activation_offloading=False", "loss._component_=torchtune.modules.loss.CEWithChunkedOutputLoss"),
    "kd_loss=torchtune.modules.loss.ForwardKLWithChunkedOutputLoss",
]
ARMS = {
    "labels_only": ("kd_recipes/distill", ["kd_ratio=0"], "final"),
    "torchtune": ("knowledge_distillation_single_device", TORCHTUNE, "epoch_0"),
}


def run(*words: str) -> None:
    """One `tune run`; stops at the first that fails."""
    print("tune run", *words, flush=True)
    subprocess.run([TUNE, "run", *words], check=True)


def main() -> None:
    """Train what is not there yet, then evaluate all of it beside teacher and pruned student."""
    for name, (recipe, overrides, result) in ARMS.items():
        if not (ROOT / name / result).is_dir():
            config = str(find_config("quickstart"))
            run(recipe, "--config", config, f"output_dir={ROOT / name}", f"max_steps={STEPS}", *overrides)
    models = ["models.distilled=runs/quickstart/distilled/final"]
    models += [f"models.{name}={ROOT / name / result}" for name, (_, _, result) in ARMS.items()]
    evaluate = str(find_config("quickstart_evaluate"))
    run("kd_recipes/evaluate", "--config", evaluate, *models, "max_batches=10", f"output_dir={ROOT / 'evaluation'}")


if __name__ == "__main__":
    main()
