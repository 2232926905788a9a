"""What does each way of making a model smaller cost, and what does distillation win back? One table.

`make bench` runs the quickstart first, whose teacher and text this uses. Each row is SmolLM2-135M compressed by
`kd_recipes.compress`, then distilled for the same few steps on the same tokens in the same order. Some two hours on two
cores; what has been done is not done again, and names on the command line choose rows:

    python tests/benchmarks/compression.py [ROW …]
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from kd_recipes import _torchtune
from kd_recipes.compression import sections
from kd_recipes.config import find_config
from kd_recipes.parts import build, load_model

ROOT = Path("runs/bench/compression")
TEACHER = Path("runs/quickstart/teacher")
STEPS = 30
NUM_DECODED = 24
TUNE = str(Path(sys.executable).with_name("tune"))
DEVICE = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Args:
        steps: of `compress:`, a component of kd_recipes.compression each; none for the teacher itself.
        constraint: on the student while it is distilled.
        lr: of the distillation.
        others: more settings of it.
    """

    steps: list[dict[str, Any]]
    constraint: dict[str, Any] | None = None
    lr: float = 5e-4
    others: list[str] = field(default_factory=list)


def quantized(scheme: str, lr: float, embeddings: str = "gguf_q8_0", others: tuple[str, ...] = ()) -> Row:
    """After training, and with quantization-aware distillation from there."""
    settings = {"scheme": scheme, "embeddings": embeddings}
    step = {"_component_": "Quantization", **settings}
    constraint = {"_component_": "QuantizationAwareTraining", **settings}
    return Row([step], constraint, lr, list(others))


def low_rank(**settings: Any) -> Row:
    """Linear layers as products of factors."""
    return Row([{"_component_": "LowRank", **settings}])


KEEP_ZEROS = {"_component_": "KeepZeros"}
ROWS = {
    "depth_2_3": Row([{"_component_": "DepthPruning", "num_blocks": 20}]),
    "width_2_3": Row([{"_component_": "WidthPruning", "intermediate_dim": 864}]),
    "both_2_3": Row(
        [
            {"_component_": "DepthPruning", "num_blocks": 25},
            {"_component_": "WidthPruning", "intermediate_dim": 1120},
        ]
    ),
    "budget_2_3": Row([{"_component_": "Budget", "num_parameters": 99.2e6, "num_candidates": 5}]),
    "wanda_50": Row([{"_component_": "Sparsification", "sparsity": 0.5}], KEEP_ZEROS),
    "magnitude_50": Row([{"_component_": "Sparsification", "importance": "magnitude"}], KEEP_ZEROS),
    "wanda_2_4": Row([{"_component_": "Sparsification", "pattern": "2:4"}], KEEP_ZEROS),
    "int2": quantized("int2_g64", 2e-3),
    "int2_longer": quantized("int2_g64", 2e-3, others=(f"max_steps={3 * STEPS}",)),
    "int4": quantized("gguf_q4_0", 3e-4),
    "int8": quantized("gguf_q8_0", 3e-5),
    "int3": quantized("int3_g64", 1e-3),
    "ternary": quantized("ternary_g64", 2e-3),
    "binary": quantized("binary_g64", 2e-3),
    "svd_60": low_rank(ratio=0.6),
    "svd_60_plain": low_rank(ratio=0.6, whiten=False),
    "svd_60_budget": low_rank(budget=0.6),
    "svd_40": low_rank(ratio=0.4),
    "svd_40_plain": low_rank(ratio=0.4, whiten=False),
    "svd_20": low_rank(ratio=0.2),
    "svd_20_plain": low_rank(ratio=0.2, whiten=False),
    "tucker_60": Row([{"_component_": "TensorDecomposition", "ratio": 0.6}]),
    "depth_1_2": Row([{"_component_": "DepthPruning", "num_blocks": 15}]),
    "depth_2_3_loss": Row([{"_component_": "DepthPruning", "num_blocks": 20, "criterion": "loss"}]),
    "int2_labels": quantized("int2_g64", 2e-3, others=("kd_ratio=0",)),
}


def run(recipe: str, config: Any, directory: Path, *overrides: str) -> None:
    """One `tune run`; stops at the first that fails."""
    file = ROOT / f"{directory.name}_{recipe}.yaml"
    OmegaConf.save(config, file)
    print("tune run", recipe, file, *overrides, flush=True)
    log = (ROOT / f"{directory.name}_{recipe}.log").open("w")
    command = [TUNE, "run", f"kd_recipes/{recipe}", "--config", str(file), f"output_dir={directory}", *overrides]
    subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)


def named(component: dict[str, Any]) -> dict[str, Any]:
    """A component of the package, by its whole name."""
    return {**component, "_component_": f"kd_recipes.compression.{component['_component_']}"}


def compress(name: str, row: Row) -> Path:
    """What the row's steps leave."""
    directory = ROOT / f"{name}_before"
    if not (directory / "config.json").is_file():
        config = OmegaConf.load(find_config("quantize"))
        config.compress = [named(step) for step in row.steps]
        run("compress", config, directory, "num_calibration_tokens=8192")
    return directory


def distil(name: str, row: Row, before: Path) -> Path:
    """What distillation makes of it."""
    directory = ROOT / f"{name}_after"
    if not (directory / "final" / "config.json").is_file():
        config = OmegaConf.load(find_config("quickstart_qad"))
        source = sections(before)
        place = source.checkpointer.checkpoint_dir
        config.model.checkpoint_dir = config.checkpointer.checkpoint_dir = place
        config.checkpointer.checkpoint_files = source.checkpointer.checkpoint_files
        config.student_constraints = named(row.constraint) if row.constraint else None
        config.optimizer.lr = row.lr
        config.kd_ratio = 0.5
        config.eval_dataset = config.save_every_n_steps = config.eval_every_n_steps = None
        run("distill", config, directory, f"max_steps={STEPS}", *row.others)
    return directory / "final"


def bytes_per_token(config: Any) -> float:
    """Of the held-out text."""
    rows = [json.loads(line)["text"] for line in Path(config.dataset.data_files).read_text("utf-8").splitlines()[:60]]
    tokenizer = build("tokenizer", config.tokenizer)
    return sum(len(row.encode()) for row in rows) / sum(len(tokenizer.encode(row, add_bos=False)) for row in rows)


def seconds_a_token(directory: Path) -> float:
    """Of greedy decoding in eager float32, the best of three."""
    found = sections(directory)
    model = load_model("model", found.model, found.checkpointer, dtype=torch.float32, device=DEVICE).model.eval()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        _torchtune.greedy(model, list(range(100, 116)), NUM_DECODED, [])
        times.append(time.perf_counter() - start)
    return min(times) / NUM_DECODED


def table(models: dict[str, Path]) -> str:
    """Evaluate all models on the same text, and say what came of it."""
    config = OmegaConf.load(find_config("quickstart_evaluate"))
    config.models = {"teacher": str(TEACHER), **{name: str(path) for name, path in models.items()}}
    config.prompt = None
    run("evaluate", config, ROOT / "evaluation", "dtype=fp32")
    found = json.loads((ROOT / "evaluation" / "evaluation.json").read_text())["models"]
    per_token = bytes_per_token(config) * math.log(2)
    lines = ["| | parameters | on disk | bits a byte | KL | decoding |", "|---|---:|---:|---:|---:|---:|"]
    reference = seconds_a_token(TEACHER)
    for model in found:
        path = {"teacher": TEACHER, **models}[model["name"]]
        at = model["held_out"]
        lines.append(
            f"| {model['name']} | {model['num_parameters'] / 1e6:.1f} M | {model['num_bytes'] / 1e6:.0f} MB "
            f"| {at['cross_entropy'] / per_token:.3f} | {at['kl']:.3f} | {reference / seconds_a_token(path):.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Do the rows that are asked for, then evaluate all that are there."""
    ROOT.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[1:] or ROWS:
        row = ROWS[name]
        distil(name, row, compress(name, row))
    models = {}
    for name in ROWS:
        paths = {f"{name}_before": ROOT / f"{name}_before", f"{name}_after": ROOT / f"{name}_after" / "final"}
        models |= {label: path for label, path in paths.items() if (path / "config.json").is_file()}
    text = table(models)
    (ROOT / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
