"""What does each way of making a model smaller cost, and what does distillation win back? One table.

`make bench` runs the quickstart first, whose teacher and text this uses. Each row is SmolLM2-135M compressed by
`kd_recipes.compress`, then distilled for the same few steps on the same tokens in the same order. Some two hours on two
cores; what has been done is not done again, and names on the command line choose rows:

    python tests/benchmarks/compression.py [ROW …]

Rows are independent of each other: several processes with `--no-evaluation` can make some each, before one evaluates.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from kd_recipes.compression import sections
from kd_recipes.config import find_config

ROOT = Path("runs/bench/compression")
TEACHER = Path("runs/quickstart/teacher")
STEPS = 30
LEAST_LOSS = 0.01  # bits a byte, of which a share is said to be taken back
TUNE = str(Path(sys.executable).with_name("tune"))
# Other packages on the same model and text: neurons by torch-pruning, 4 and 2 bits by torchao alone and llm-compressor.
PEERS = Path("runs/bench/peers")
PEER_PACKAGES = ("torch==2.13.0", "llmcompressor==0.14.0.1", "torch-pruning==1.6.1", "torchao>=0.15,<0.17")
PEER_ROWS = ("torch_pruning", "torchao_4_32", "llm_compressor_4_32", "torchao_2_64", "llm_compressor_2_64")


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


def peer(name: str) -> Path:
    """What another package makes of the teacher, in an environment of its own; a plain directory."""
    directory = ROOT / f"{name}_before"
    if not (directory / "config.json").is_file():
        python = PEERS / "bin" / "python"
        if not python.is_file():
            subprocess.run([sys.executable, "-m", "venv", str(PEERS)], check=True)
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PEER_PACKAGES], check=True)
        text = "runs/quickstart/data/train.jsonl"
        subprocess.run([str(python), "tests/benchmarks/peers.py", name, str(TEACHER), text, str(directory)], check=True)
    return directory


def evaluate(models: dict[str, Path]) -> dict[str, Any]:
    """All models on the same text, with the teacher; what has been measured is not measured again."""
    config = OmegaConf.load(find_config("quickstart_evaluate"))
    config.models = {"teacher": str(TEACHER), **{name: str(path) for name, path in models.items()}}
    config.prompts, config.num_prompts = None, 0
    run("evaluate", config, ROOT / "evaluation", "dtype=fp32")
    found = json.loads((ROOT / "evaluation" / "evaluation.json").read_text())["models"]
    return {model["name"]: model for model in found}


def table(found: dict[str, Any]) -> str:
    """A line for each row: what it costs, and what distillation takes back; ± is half of a paired 95% interval."""
    lines = [
        "| | parameters | on disk | bits a byte over the teacher's | distilled | won back | KL | distilled | decode |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    teacher = found["teacher"]
    for name in (*ROWS, *PEER_ROWS):
        before, after = found.get(f"{name}_before"), found.get(f"{name}_after")
        if before is None:
            continue
        cost, speed = before["cost"], before["cost"]["decode_tokens_per_second"]
        lost = before["text"]["change"]["mean"]
        kept = f"{1 - after['text']['change']['mean'] / lost:.0%}" if after and lost > LEAST_LOSS else ""
        lines.append(
            f"| {name} | {cost['num_parameters'] / 1e6:.1f} M | {cost['num_bytes'] / 1e6:.0f} MB "
            f"| {difference(before)} | {difference(after)} | {kept} | {divergence(before)} | {divergence(after)} "
            f"| {speed / teacher['cost']['decode_tokens_per_second']:.2f} |"
        )
    bits = teacher["text"]["bits_per_byte"]
    spread = (bits["high"] - bits["low"]) / 2
    return "\n".join([*lines, "", f"Teacher: {bits['mean']:.4f} ± {spread:.4f} bits a byte."])


def difference(model: dict[str, Any] | None) -> str:
    """In bits a byte from the teacher, on the same sequences."""
    change = model["text"]["change"] if model else None
    return f"{change['mean']:+.4f} ± {(change['high'] - change['low']) / 2:.4f}" if change else ""


def divergence(model: dict[str, Any] | None) -> str:
    """KL from the teacher in nats a token."""
    return f"{model['text']['kl']['mean']:.3f}" if model else ""


def main() -> None:
    """Do the rows that are asked for; then evaluate all that are there, unless another process is to."""
    ROOT.mkdir(parents=True, exist_ok=True)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = (*ROWS, *PEER_ROWS)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(names))
    parser.add_argument("--no-evaluation", action="store_true", help="make the rows alone")
    options = parser.parse_args()
    if unknown := set(options.rows) - set(names):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    for name in options.rows or names:
        before = peer(name) if name in PEER_ROWS else compress(name, ROWS[name])
        if name in ROWS or name == "torch_pruning":
            distil(name, ROWS.get(name, Row([])), before)
    if options.no_evaluation:
        return
    models = {}
    for name in names:
        paths = {f"{name}_before": ROOT / f"{name}_before", f"{name}_after": ROOT / f"{name}_after" / "final"}
        models |= {label: path for label, path in paths.items() if (path / "config.json").is_file()}
    text = table(evaluate(models))
    (ROOT / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
