"""Run a pipeline of toys while it is killed, again and again, and compare what it leaves with one that was left alone.

Every other kill is of the pipeline's process alone, whose step then lives on until the pipeline is started again; the
others are of the step as well, as when a machine goes down. Twenty take one to two hours on two busy cores.

    PYTHONPATH=tests python tests/recipes/kill_pipeline.py [NUM_KILLS] [SEED]
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from pipelines import digests, save_pipeline
from teachers.kill_often import content

from toy import TUNE, save_toys

ENVIRONMENT = {"KD_RECIPES_TRUSTED_COMPONENTS": "*", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

PLACES = (
    *("teacher", "pruned", "corrected/teacher/best", "distilled/best", "distilled/final"),
    *("quantized", "qad/best", "qad/final"),
)
COSTS = ("load_seconds", "prefill_tokens_per_second", "decode_tokens_per_second", "peak_memory_bytes")


def start(config: Path, output_dir: Path) -> subprocess.Popen[bytes]:
    """The pipeline, in a session of its own."""
    log = output_dir.with_suffix(".log").open("ab")
    command = [str(TUNE), "run", "kd_recipes.pipeline", "--config", str(config), f"output_dir={output_dir}"]
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env={**os.environ, **ENVIRONMENT})


def kill(process: subprocess.Popen[bytes], *, with_step: bool) -> None:
    """End it, and what it started, as nothing can be caught."""
    steps = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    process.wait()
    for step in steps if with_step else ():
        with suppress(psutil.NoSuchProcess):
            os.kill(step.pid, signal.SIGKILL)


def state(output_dir: Path) -> str:
    """Which steps are done, and which is begun."""
    try:
        steps = json.loads((output_dir / "pipeline.json").read_text(encoding="utf-8"))["steps"]
    except FileNotFoundError:
        return "before the first step"
    checkpoints = sorted(output_dir.glob("*/checkpoints/step_*"), key=lambda path: path.stat().st_mtime)
    inside = f" ({checkpoints[-1].relative_to(output_dir)})" if checkpoints else ""
    return " ".join(f"{name}{'' if record['is_done'] else '…'}" for name, record in steps.items()) + inside


def left(output_dir: Path) -> dict[str, Any]:
    """What has to be alike: weights, the cache's records and the exported file bit for bit; all figures but of cost."""
    found: dict[str, Any] = {place: digests(output_dir / place) for place in PLACES}
    found["cached"] = content(output_dir / "cached")
    found["exported"] = digests(output_dir / "exported", "*.pt2")
    assert all(found.values()), "something that is to be compared is not where it was"
    exported = _read(output_dir / "exported" / "export.json")["formats"]
    found["answers"] = {name: _without(figures, COSTS) for name, figures in exported.items()}
    evaluation = _read(output_dir / "evaluation" / "evaluation.json")
    found["evaluated"] = [_without(model, ("directory", "cost")) for model in evaluation["models"]]
    found["held_out"] = {name: run["held_out"] for name, run in evaluation["runs"].items()}
    return found


def compare(killed: Path, unbroken: Path) -> None:
    """Say what differs, and whether a step was begun anew."""
    one, other = left(killed), left(unbroken)
    assert one.keys() == other.keys()
    assert not (different := [name for name in one if one[name] != other[name]]), f"{killed}: {', '.join(different)}"
    assert not list(killed.glob("*.old-*")), f"{killed}: something was made anew"


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _without(figures: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if name not in names}


def main(num_kills: int, seed: int) -> None:
    """Print where each kill fell."""
    root = Path(tempfile.mkdtemp(prefix="kill_pipeline"))
    config = save_pipeline(save_toys(root / "toys"), root, max_steps=60, is_long=True)
    unbroken, killed = root / "unbroken", root / "killed"
    begun = time.monotonic()
    assert start(config, unbroken).wait() == 0, unbroken.with_suffix(".log").read_text()
    whole = time.monotonic() - begun
    print(f"unbroken: {whole:.0f} s", flush=True)
    moments, num_left = random.Random(seed), num_kills
    while num_left:
        process = start(config, killed)
        seconds = moments.uniform(0, whole / 3)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            kill(process, with_step=num_left % 2 == 0)
            num_left -= 1
            print(f"killed after {seconds:.1f} s: {state(killed)}", flush=True)
        else:  # it has come to its end: what is left of the kills falls on another run of it
            assert status == 0, killed.with_suffix(".log").read_text()
            compare(killed, unbroken)
            killed = killed.with_name(f"{killed.name}_again")
    assert start(config, killed).wait() == 0, killed.with_suffix(".log").read_text()
    compare(killed, unbroken)
    print(f"{num_kills} of {num_kills} kills survived: the same weights, cache, evaluation and export")


if __name__ == "__main__":
    main(*(int(word) for word in (sys.argv[1:] + ["20", "0"][len(sys.argv) - 1 :])))
