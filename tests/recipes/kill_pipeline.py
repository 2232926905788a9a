"""Run a pipeline of toys while it is killed, again and again, and compare what it leaves with one that was left alone.

Every other kill is of the pipeline's process alone, whose step then lives on until the pipeline is started again; the
others are of the step as well, as when a machine goes down. An hour on two busy cores.

    python tests/recipes/kill_pipeline.py [NUM_KILLS] [SEED]
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
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from pipelines import digests, save_pipeline

from toy import TUNE, save_toys

ENVIRONMENT = {"KD_RECIPES_TRUSTED_COMPONENTS": "*", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


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
    checkpoints = sorted(path.name for path in output_dir.glob("distilled/checkpoints/step_*"))
    inside = f" ({checkpoints[-1]})" if checkpoints else ""
    return " ".join(f"{name}{'' if record['is_done'] else '…'}" for name, record in steps.items()) + inside


def left(output_dir: Path) -> dict[str, Any]:
    """What has to be alike: weights bit for bit, and the evaluation's figures of text."""
    models = json.loads((output_dir / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))["models"]
    places = ("teacher", "pruned", "distilled/best", "distilled/final")
    return {place: digests(output_dir / place) for place in places} | {
        model["name"]: [model["text"]["cross_entropy"]["mean"], model["text"]["kl"]["mean"]] for model in models
    }


def main(num_kills: int, seed: int) -> None:
    """Print where each kill fell."""
    root = Path(tempfile.mkdtemp(prefix="kill_pipeline"))
    config = save_pipeline(save_toys(root / "toys"), root, max_steps=60)
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
            assert left(killed) == left(unbroken)
            killed = killed.with_name(f"{killed.name}_again")
    assert start(config, killed).wait() == 0, killed.with_suffix(".log").read_text()
    assert left(killed) == left(unbroken)
    assert not list(killed.glob("*.old-*")), "something was made anew"
    print(f"{num_kills} of {num_kills} kills survived: the same weights, the same evaluation")


if __name__ == "__main__":
    main(*(int(word) for word in (sys.argv[1:] + ["20", "0"][len(sys.argv) - 1 :])))
