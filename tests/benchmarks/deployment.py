"""What does the quickstart's student cost on a device, in each format, beside its teacher? Two tables.

`make bench` runs the quickstart first. Student and teacher are exported in all formats by `tune run kd_recipes.export`,
which asks each file through the program that loads it. Then students that have been trained on a lattice for two steps
are exported as what they are. What has been done is not done again; names on the command line choose formats:

    python tests/benchmarks/deployment.py [FORMAT …]
"""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

from quickstart_baselines import TUNE

from kd_recipes.compression import read_checkpoint
from kd_recipes.config import find_config
from kd_recipes.exporting.formats import FORMATS
from kd_recipes.exporting.gguf import verify_gguf

ROOT = Path("runs/bench/deployment")
MODELS = {"student": "runs/quickstart/distilled/best", "teacher": "runs/quickstart/teacher"}
NAMES = tuple(name for name in FORMATS if name not in ("gguf_trained", "hf_factors"))  # which are of other students
LATTICES = {  # of blocks: of the tied embedding, and what is written
    "gguf_q8_0": ("gguf_q8_0", ("gguf_trained", "gguf_f32")),
    "gguf_q4_0": ("gguf_q8_0", ("gguf_trained", "gguf_f32")),
    "8da4w_g32": ("8da8w", ("executorch_8da4w", "executorch_fp32")),
}
STEPS = 2


def run(recipe: str, config: str, *overrides: str) -> None:
    """One `tune run`; stops at the first that fails."""
    print("tune run", recipe, *overrides, flush=True)
    subprocess.run([TUNE, "run", f"kd_recipes/{recipe}", "--config", str(find_config(config)), *overrides], check=True)


def export(checkpoint: str, output_dir: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """What ``export.json`` says of each format."""
    settings = [f"checkpoint_dir={checkpoint}", f"output_dir={output_dir}", f"formats=[{','.join(names)}]"]
    run("export", "quickstart_export", *settings)
    found: dict[str, Any] = json.loads((output_dir / "export.json").read_text())["formats"]
    return found


def trained(scheme: str, embeddings: str) -> str:
    """The pruned student after a few steps on a lattice."""
    coded, output_dir = ROOT / scheme / "rounded", ROOT / scheme / "run"
    if not coded.is_dir():
        start = ["checkpoint_dir=runs/quickstart/pruned", f"output_dir={coded}"]
        lattice = [f"compress.scheme={scheme}", f"compress.embeddings={embeddings}"]
        run("compress", "quantize", *start, *lattice, "compress.method=round")
    if not (output_dir / "final").is_dir():
        paths = [f"model.checkpoint_dir={coded}", f"checkpointer.checkpoint_dir={coded}", f"output_dir={output_dir}"]
        shorter = [f"max_steps={STEPS}", "batch_size=1", "~eval_dataset", "~save_every_n_steps", "lr_scheduler=null"]
        lattice = [f"student_constraints.scheme={scheme}", f"student_constraints.embeddings={embeddings}"]
        run("distill", "quickstart_qad", *paths, *shorter, *lattice, "dtype=fp32")
    return str(output_dir / "final")


def cells(found: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    """Of one model in one format; speeds over those of the model itself."""
    speeds = [
        found[f"{name}_tokens_per_second"] / reference[f"{name}_tokens_per_second"] for name in ("prefill", "decode")
    ]
    alike = [f"{found['kl']:.2g}", f"{found['agreement']:.1%}"] if "kl" in found else ["", ""]
    size, peak = (f"{found[key] / 1e6:.0f}" for key in ("num_bytes", "peak_memory_bytes"))
    return [size, *alike, *(f"{speed:.2f}" for speed in speeds), peak, f"{found['load_seconds']:.1f}"]


def formats_table(names: tuple[str, ...]) -> str:
    """Student and teacher in each format."""
    of = {model: export(checkpoint, ROOT / model, names) for model, checkpoint in MODELS.items()}
    heads = [f"{model}: size, MB | KL | agreement | prefill | decode | peak, MB | load, s" for model in of]
    lines = [f"| | {' | '.join(heads)} |", "|---" + "|---:" * 7 * len(of) + "|"]
    for name in ("student", *names):
        row = chain.from_iterable(cells(found[name], found["student"]) for found in of.values())
        lines.append(f"| {'torchtune, float32' if name == 'student' else name} | {' | '.join(row)} |")
    return "\n".join(lines)


def lattices_table() -> str:
    """Students trained on a lattice, as files with their codes and with the same numbers in float32."""
    lines = [
        "| trained in | format | size, MB | KL | agreement | matrices that are the trained ones |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for scheme, (embeddings, names) in LATTICES.items():
        if any(FORMATS[name].missing for name in names):
            continue
        checkpoint = trained(scheme, embeddings)
        for name, found in export(checkpoint, ROOT / scheme / "exported", names).items():
            if name == "student":
                continue
            file = ROOT / scheme / "exported" / FORMATS[name].path
            equal = verify_gguf(read_checkpoint(Path(checkpoint)), file) if name == "gguf_trained" else ""
            figures = f"{found['num_bytes'] / 1e6:.0f} | {found['kl']:.2g} | {found['agreement']:.1%} | {equal}"
            lines.append(f"| {scheme} | {name} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    """Print both tables."""
    names = tuple(sys.argv[1:]) or NAMES
    tables = formats_table(names) + "\n\n" + lattices_table()
    (ROOT / "tables.md").write_text(tables + "\n")
    print(tables)


if __name__ == "__main__":
    main()
