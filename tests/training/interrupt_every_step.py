"""One of several processes: a run that is interrupted after each step in turn, and gone on with.

For test_parallel.py, which starts it once: starting each of the 41 runs would take minutes.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from kd_recipes.entry import run_recipe
from kd_recipes.training.parallel import Parallel


def main(config: str) -> None:
    """Run, next to the config, ``unbroken`` and ``run1`` … ``run20``."""
    Parallel.stop = lambda self: None  # type: ignore[method-assign]  # torchrun's processes meet once

    def run(name: str, *overrides: str) -> int:
        return run_recipe("distill", ["--config", config, f"output_dir={Path(config).with_name(name)}", *overrides])

    assert run("unbroken") == 0
    for at in range(1, 21):
        logger = ["metric_logger._component_=toy.SignallingLogger", f"metric_logger.at={at}"]
        assert run(f"run{at}", *logger) == 128 + signal.SIGTERM
        assert run(f"run{at}", "resume_from_checkpoint=auto") == 0
        checkpoints = os.listdir(Path(config).with_name(f"run{at}") / "checkpoints")
        assert "step_00000020" in checkpoints


if __name__ == "__main__":
    main(sys.argv[1])
