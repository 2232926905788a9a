"""What monitoring adds to a step: everything that is measured and written, without the step itself.

python tests/benchmarks/monitoring.py [SECONDS_OF_A_STEP]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torchtune.training.metric_logging import TensorBoardLogger

from kd_recipes.batch import Batch
from kd_recipes.losses import LossSum
from kd_recipes.models import llama
from kd_recipes.monitoring.metrics import StepMeter
from kd_recipes.monitoring.recorder import Recorder
from kd_recipes.training.parallel import Parallel

NUM_STEPS = 300
NAMES = ("cross_entropy", "divergence", "accuracy", "agreement", "forward_kl", "reverse_kl", "teacher_entropy")


def main() -> None:
    """Print milliseconds a step."""
    device = torch.device("cpu")
    sizes = {"num_heads": 9, "num_kv_heads": 3, "embed_dim": 576, "intermediate_dim": 1536, "max_seq_len": 256}
    with torch.device("meta"):
        student, teacher = (llama(49152, num_layers, **sizes) for num_layers in (20, 30))
    tokens_BS = torch.zeros(4, 256, dtype=torch.long)
    loss = LossSum(torch.tensor(1.0), dict.fromkeys(NAMES, torch.tensor(1.0, dtype=torch.float64)), 1024)
    seconds = []
    with tempfile.TemporaryDirectory() as place:
        logger = TensorBoardLogger(place)
        recorder = Recorder(Path(place), Parallel(0, 1, device), logger, None)
        meter = StepMeter(device, student, [teacher])
        for step, batches in enumerate(meter.steps([[Batch(tokens_BS, tokens_BS)]] * NUM_STEPS), 1):
            start = time.perf_counter()
            for phase in ("teacher", "student", "loss", "backward", "optimizer"):
                with meter.phase(phase):
                    pass
            meter.add(loss, batches[0])
            metrics = meter.means(1024, lambda sums: sums) | meter.finish(1024)
            recorder.step(step, metrics | {"kd/temperature": 1.0}, is_logged=True)
            seconds.append(time.perf_counter() - start)
        recorder.close()
    cost = median(seconds)
    print(f"{cost * 1000:.2f} ms a step, median of {NUM_STEPS}")
    if len(sys.argv) > 1:
        print(f"{cost / float(sys.argv[1]):.3%} of a step of {sys.argv[1]} s")


if __name__ == "__main__":
    main()
