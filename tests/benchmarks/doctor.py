"""What `kd-recipes doctor` says of memory, beside what runs take.

    python -m kd_recipes.quickstart && PYTHONPATH=tests python tests/benchmarks/doctor.py

Each configuration is distilled for two steps in a process of its own, which says at its end what the most of its
resident memory was; the doctor is another process, started before it. Without the quickstart's models its lines are
left out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import toy
from toy import checkpointer_section, hf_config, lora_section, model_section, save_config, text_section, toy_config

SIZES = {  # blocks, width, width of the feed-forward layers, ids
    "41M from 90M": ((8, 512, 1536, 32_000), (10, 768, 2048, 32_000)),
    "124M from 201M": ((12, 768, 2048, 50_304), (16, 896, 2432, 50_304)),
}
BF16, RECOMPUTED = "dtype=bf16", "enable_activation_checkpointing=True"
RUNS: list[tuple[str, str, list[str]]] = [
    ("41M from 90M", "full", ["batch_size=2"]),
    ("41M from 90M", "full", ["batch_size=2", BF16]),
    ("41M from 90M", "full", ["batch_size=4", RECOMPUTED]),
    ("41M from 90M", "LoRA", ["batch_size=4"]),
    ("41M from 90M", "LoRA", ["batch_size=1", BF16]),
    ("124M from 201M", "full", ["batch_size=1"]),
    ("124M from 201M", "full", ["batch_size=4", BF16, RECOMPUTED]),
    ("124M from 201M", "LoRA", ["batch_size=4", RECOMPUTED]),
    ("quickstart", "LoRA", ["batch_size=4", "dtype=fp32"]),
    ("quickstart", "LoRA", ["batch_size=1", BF16]),
]


# What the parent is told of a process's peak is also its own, which the process had before it was another program.
_RUN = """
import re, resource, sys
from pathlib import Path
from kd_recipes.entry import run_recipe
status = run_recipe("distill", sys.argv[1:])
proc = Path("/proc/self/status")
found = re.search(r"VmHWM:\\s+(\\d+)", proc.read_text()) if proc.exists() else None
print(int(found[1]) * 1024 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(status)
"""


def save_pair(root: Path, sizes: tuple[tuple[int, int, int, int], ...]) -> toy.Toys:
    """A random pair on disk, with text."""
    for name, (layers, width, inner, ids) in zip(("student", "teacher"), sizes, strict=True):
        settings = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": inner, "vocab_size": ids}
        heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1024}
        toy.save_model(root / name, **settings, **heads)
        toy.save_tokenizer(root / name)
    (root / "data").mkdir()
    texts = [" ".join(toy.sentence(40 * index + k) for k in range(40)) for index in range(40)]
    toy.write_jsonl(root / "data" / "text.jsonl", [{"text": text} for text in texts])
    return toy.Toys(root / "student", root / "teacher", root, root / "data")


def write_config(toys: toy.Toys, kind: str, directory: Path, length: int = 256) -> Path:
    """A run of two steps on packed text."""
    cfg = toy_config(toys, directory)
    cfg.model = model_section(hf_config(toys.student)) if kind == "full" else lora_section(toys.student, lora_rank=16)
    cfg.dataset = text_section(toys.data / "text.jsonl", toys.data / "cache", packed=True)
    cfg.tokenizer.max_seq_len = length
    cfg.checkpointer = checkpointer_section(toys.student)
    return save_config(cfg, directory / "config.yaml")


def measure(config: str, overrides: list[str], directory: Path) -> tuple[dict[str, Any], int]:
    """What the doctor says, and the peak of a run, in bytes."""
    words = ["--config", config, f"output_dir={directory / 'run'}", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KD_RECIPES_TRUSTED_COMPONENTS": "*"}
    doctor = [sys.executable, "-m", "kd_recipes.cli", "doctor", *words, "--json"]
    said = subprocess.run(doctor, env=environment, capture_output=True, text=True, check=True)
    run = subprocess.run(
        [sys.executable, "-c", _RUN, *words], env=environment, capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{run.stderr}")
    return json.loads(said.stdout), int(run.stdout.split()[-1])


def main() -> None:
    """Print a line for each run."""
    print("| pair | student | settings | estimated | measured | | the estimate's peak is in |")
    print("|---|---|---|---:|---:|---:|---|")
    with tempfile.TemporaryDirectory() as root:
        toys = {name: save_pair(Path(root) / name.replace(" ", "_"), sizes) for name, sizes in SIZES.items()}
        for number, (name, kind, overrides) in enumerate(RUNS):
            directory = Path(root) / str(number)
            directory.mkdir()
            extra = []
            if name == "quickstart":
                config, extra = "quickstart", ["max_steps=2", "eval_every_n_steps=2", "max_eval_batches=1"]
                if not Path("runs/quickstart/pruned").is_dir():
                    continue
            else:
                config = str(write_config(toys[name], kind, directory))
            report, peak = measure(config, [*overrides, *extra], directory)
            estimate = report["memory"]["peak"]
            figures = f"{estimate / 2**20:,.0f} MiB | {peak / 2**20:,.0f} MiB | {estimate / peak - 1:+.1%}"
            print(f"| {name} | {kind} | {' '.join(overrides)} | {figures} | {report['memory']['phase']} |", flush=True)


if __name__ == "__main__":
    main()
