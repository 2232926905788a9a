"""What does a teacher behind a server cost a step, is it the same teacher, and does a run outlive the server? One page.

`make bench` runs the quickstart first, whose teacher, pruned student and text this uses. Two servers on this machine
have the quickstart's teacher: llama-cpp-python's, with the GGUF file that it came from, and one of the tests that
speaks vLLM's protocol, with numpy and the imported weights. The student is distilled for a few steps from each, and
from the model itself beside it; last, the second server is killed within a run and started again.

    python tests/benchmarks/remote_teacher.py [PYTHON]

PYTHON is that of an environment with `llama-cpp-python[server]`, this one by default. The figures are in
runs/bench/remote_teacher/table.md.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from quickstart_baselines import TUNE

sys.path.append(str(Path(__file__).parent.parent))

from served import Served, free_port

from kd_recipes.config import find_config, load_and_validate
from kd_recipes.evaluation.tokens import token_values
from kd_recipes.parts import build, load_model
from kd_recipes.teachers import OnlineTeacher, RemoteTeacher, Surroundings
from kd_recipes.training.data import build_loader
from kd_recipes.training.parallel import Parallel

ROOT = Path("runs/bench/remote_teacher")
CONFIG, CACHED = (str(find_config(f"quickstart_{name}")) for name in ("remote", "cached"))
GGUF = "runs/quickstart/downloads/SmolLM2-135M-Instruct.Q4_1.gguf"
TEACHER = Path("runs/quickstart/teacher")
STEPS = 4
AWAY_S = 20
SAME = ["~eval_dataset", "dtype=fp32", "~save_every_n_steps", "log_graph=False", f"max_steps={STEPS}"]
# the same data, and the model beside the student
LOCAL = [
    "teacher=null",
    "tokenizer.max_seq_len=64",
    "dataset.packed=False",
    "dataset.split=train[:100]",
    "batch_size=2",
]
PROTOCOL = ["teacher.dialect=vllm", "teacher.max_concurrency=2"]


def servers(python: str) -> dict[str, Served]:
    """Both, not started."""
    ROOT.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = [python, "-m", "llama_cpp.server", "--model", GGUF, "--logits_all", "true", "--n_ctx", "512"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--n_threads", "1", "--n_threads_batch", "1"]
    shutil.rmtree(ROOT / "toy", ignore_errors=True)
    (ROOT / "toy").mkdir()
    toy = Served.toy(TEACHER, ROOT / "toy", max_logprobs=64)
    return {"llama_cpp_python": Served(command, port, ROOT / "none", ROOT / "llama_cpp_server.log"), "vllm": toy}


def distil(name: str, *overrides: str, config: str = CONFIG) -> list[dict[str, float]]:
    """One run; what it has logged of each step."""
    print("tune run distill", name, flush=True)
    output = ROOT / name
    shutil.rmtree(output, ignore_errors=True)
    command = [TUNE, "run", "kd_recipes/distill", "--config", config, *SAME, *overrides, f"output_dir={output}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (ROOT / f"{name}.log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=environment)
    lines = [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]
    return [line["values"] for line in lines if line["split"] == "train"]


def distance(served: Served, dialect: str, num_batches: int = 1) -> dict[str, float]:
    """Over some text: mean KL(server || model) over k + 1 buckets, and how often both have the same likeliest id."""
    cfg = load_and_validate(CONFIG)
    tokenizer, device = build("tokenizer", cfg.tokenizer), torch.device("cpu")
    section = load_and_validate(CACHED, recipe="distill")
    loaded = load_model(
        "teacher_model", section.teacher_model, section.teacher_checkpointer, dtype=torch.float32, device=device
    )
    local = OnlineTeacher(loaded.model, device)
    source = RemoteTeacher(served.url, k=cfg.teacher.k, dialect=dialect, max_concurrency=1)
    remote = source.open(Surroundings(cfg, tokenizer, 49152, device, lambda *_: local))
    loader = build_loader(cfg, "dataset", tokenizer, Parallel.start(device), seed=0, max_seq_len=64)
    sums: dict[str, list[float]] = {"kl": [], "agreement": []}
    for _, batch in zip(range(num_batches), loader.batches(), strict=False):
        values = token_values(local.signal(batch), remote.signal(batch), batch, num_ids=49152).values
        for name, found in sums.items():
            found += values[name].tolist()
    return {name: statistics.fmean(found) for name, found in sums.items()}


def outlive(served: Served) -> tuple[float, float]:
    """Kill a server within a run, start it again; the largest difference of a loss from a run that was left alone, and
    the seconds that the run took longer."""
    url = f"teacher.url={served.url}"
    started = time.monotonic()
    calm = distil("calm", url, *PROTOCOL, "teacher.num_ahead=1")
    calm_s = time.monotonic() - started
    first = len(served.questions)

    def restart() -> None:
        while len(served.questions) < first + 6:
            time.sleep(0.05)
        served.kill()
        time.sleep(AWAY_S)
        served.start()

    watcher = threading.Thread(target=restart, daemon=True)
    watcher.start()
    started = time.monotonic()
    shaken = distil("shaken", url, *PROTOCOL, "teacher.num_ahead=1")
    watcher.join()
    gaps = [abs(a["loss/total"] - b["loss/total"]) for a, b in zip(calm, shaken, strict=True)]
    return max(gaps), time.monotonic() - started - calm_s


def main() -> None:
    """All of it."""
    python = sys.argv[1] if len(sys.argv) > 1 else sys.executable
    found = servers(python)
    local = statistics.median(step["time/step"] for step in distil("local", *LOCAL, config=CACHED)[1:])
    lines = [
        "| server | KL(server, model) | same likeliest id | step over local | of it, waiting |",
        "|---|---:|---:|---:|---:|",
    ]
    try:
        for name, served in found.items():
            served.start()
            apart = distance(served, name)
            extra = PROTOCOL if name == "vllm" else []
            steps = distil(name, f"teacher.url={served.url}", *extra)[1:]
            step, wait = (statistics.median(s[key] for s in steps) for key in ("time/step", "time/teacher"))
            row = (f"{apart['kl']:.5f}", f"{apart['agreement']:.3f}", f"{step / local:.1f}", f"{wait / step:.2f}")
            lines.append(f"| {name} | {' | '.join(row)} |")
            print(lines[-1], flush=True)
            if name != "vllm":
                served.kill()
        gap, seconds = outlive(found["vllm"])
        away = f"Killed, and started again after {AWAY_S} s: the run took {seconds:.0f} s longer"
        lines += ["", f"{away}, and its losses differ by at most {gap:.1e} from those of a run that was left alone."]
    finally:
        for served in found.values():
            served.kill()
    (ROOT / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
