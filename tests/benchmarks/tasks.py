"""Does our language model answer as lm-evaluation-harness's own `hf` model does? One table, in float32 on a CPU.

`make bench` runs the quickstart first, whose teacher, SmolLM2-135M, and text this uses. Two tasks are made of that
text: which sentence goes on with a Wikipedia lead, and how many bits a byte of it takes. Three are BIG-bench's, of the
package `bigbench` on PyPI (358 MB, once; Apache-2.0). It depends on a URL, which newer pips (26.3) refuse
even to download: an older one fetches it, in an environment of its own. What they are converted to lies in runs/tasks.

    python tests/benchmarks/tasks.py [NUM_ITEMS [TASK …]]
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kd_recipes.compression import sections
from kd_recipes.evaluation.language_model import DecoderLM
from kd_recipes.evaluation.results import TaskFigures
from kd_recipes.evaluation.tasks import run_tasks
from kd_recipes.parts import load_model
from kd_recipes.tokenizers import hf_tokenizer

TEACHER = Path("runs/quickstart/teacher")
LEADS = Path("runs/quickstart/data/held_out.jsonl")
SDIST = Path("runs/downloads/bigbench-1.0.0.tar.gz")
OLD_PIP = Path("runs/bench/old_pip")
TASKS = Path("runs/tasks")
BIG_BENCH = {
    "social_iqa": "social_iqa",
    "step_inference": "goal_step_wikihow/step_inference",
    "goal_inference": "goal_step_wikihow/goal_inference",
}
BATCH_SIZE = 16  # of the harness's model; ours takes tokens
NUM_EXACT = 10  # items that are asked in float64 too


# ------------------------------------------------------------------------------------------------------------ tasks
def fetch_big_bench() -> None:
    """Convert what is wanted of BIG-bench, and delete the rest."""
    if all((TASKS / f"{name}.jsonl").is_file() for name in BIG_BENCH):
        return
    if not SDIST.is_file():
        subprocess.run([sys.executable, "-m", "venv", OLD_PIP], check=True)
        pip = [OLD_PIP / "bin" / "python", "-m", "pip"]
        subprocess.run([*pip, "install", "--quiet", "pip<25"], check=True)
        download = ["download", "--no-deps", "--no-binary", "bigbench", "--dest", SDIST.parent, "bigbench==1.0.0"]
        subprocess.run([*pip, *download], check=True)
    with tarfile.open(SDIST) as archive:
        for member in archive:
            name = next((name for name, path in BIG_BENCH.items() if member.name.endswith(f"/{path}/task.json")), None)
            content = archive.extractfile(member) if name else None
            if content is not None:
                write(str(name), map(from_big_bench, json.load(content)["examples"]))
    SDIST.unlink()


def from_big_bench(example: dict[str, Any]) -> dict[str, Any]:
    """A row of ours; the prompt is BIG-bench's default."""
    scores = {choice.strip(): score for choice, score in example["target_scores"].items()}
    choices = list(scores)
    return {
        "context": f"Q: {example['input']}\nA:",
        "choices": choices,
        "answer": max(choices, key=lambda c: scores[c]),
    }


def leads() -> list[str]:
    """Of Wikipedia's articles, not trained on by the quickstart's students."""
    return [json.loads(line)["text"] for line in LEADS.read_text("utf-8").splitlines()]


def continuations() -> Iterator[dict[str, Any]]:
    """The beginning of a lead; its next sentence, and those of three others."""
    split = [re.split(r"(?<=[.!?])\s+", lead) for lead in leads()]
    told = [(" ".join(sentences[:2]), sentences[2].strip()) for sentences in split if len(sentences) > 2]
    told = [(begun, following) for begun, following in told if following]
    draw = random.Random(0)
    for begun, following in told:
        others = draw.sample([other for _, other in told if other != following], 3)
        choices = draw.sample([following, *others], 4)
        yield {"context": begun, "choices": choices, "answer": choices.index(following)}


def write(name: str, rows: Iterable[dict[str, Any]]) -> None:
    """A task's file."""
    TASKS.mkdir(parents=True, exist_ok=True)
    (TASKS / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------- comparison
@dataclass
class Asked:
    """A model on a task: its figures, all log-likelihoods in nats, and how long it took in seconds."""

    figures: TaskFigures
    log_likelihoods: list[float]
    seconds: float


def ours() -> DecoderLM:
    """torchtune's decoder."""
    found, settings = sections(TEACHER), {"dtype": torch.float32, "device": torch.device("cpu")}
    return DecoderLM(load_model("model", found.model, found.checkpointer, **settings).model, hf_tokenizer(str(TEACHER)))


def theirs() -> Any:
    """transformers' model in the harness's own class."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    return HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=BATCH_SIZE)


def ask(lm: Any, task: str, num_items: int) -> Asked:
    """Run a task, and note what the model answers."""
    seen: list[float] = []

    def noting(method: Any) -> Any:
        def answer(requests: Any, **settings: Any) -> Any:
            answers = method(requests, **settings)
            seen.extend(one[0] if isinstance(one, tuple) else one for one in answers)
            return answers

        return answer

    lm = copy(lm)
    lm.loglikelihood, lm.loglikelihood_rolling = noting(lm.loglikelihood), noting(lm.loglikelihood_rolling)
    start = time.perf_counter()
    figures = run_tasks(lm, [str(TASKS / f"{task}.jsonl")], limit=num_items)[task]
    return Asked(figures, seen, time.perf_counter() - start)


def line(task: str, mine: Asked, hf: Asked) -> str:
    """Of the table."""
    pairs = list(zip(mine.figures.choices, hf.figures.choices, strict=True))
    identical = f"{sum(a == b for a, b in pairs) / len(pairs):.1%}" if pairs else ""
    difference = max(abs(a - b) for a, b in zip(mine.log_likelihoods, hf.log_likelihoods, strict=True))
    metric = "acc_norm" if pairs else "bits_per_byte"
    found, wanted = (asked.figures.metrics[metric] for asked in (mine, hf))
    shown = f"{found.mean:.4f} ± {found.standard_error:.4f} | {wanted.mean:.4f} ± {wanted.standard_error:.4f}"
    times = f"{mine.seconds:.0f} | {hf.seconds:.0f} | {hf.seconds / mine.seconds:.2f}"
    return f"| {task} ({metric}) | {mine.figures.num_items} | {identical} | {difference:.1e} | {shown} | {times} |"


def errors(num_items: int) -> str:
    """How far both are from the truth, which is transformers' in float64."""
    exact = theirs()
    exact.model.double()
    truth, *found = (ask(lm, "continuations", num_items).log_likelihoods for lm in (exact, ours(), theirs()))
    mine, hf = (max(abs(a - b) for a, b in zip(values, truth, strict=True)) for values in found)
    return f"Beside transformers in float64, at most, on {num_items} items: ours {mine:.1e} nats, hf {hf:.1e} nats."


def main() -> None:
    """Ask both models the same."""
    num_items = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    wanted = sys.argv[2:] or ["continuations", "leads", *BIG_BENCH]
    write("continuations", continuations())
    write("leads", ({"text": lead} for lead in leads()))
    if set(wanted) & BIG_BENCH.keys():
        fetch_big_bench()
    models = ours(), theirs()
    print(
        "| task | items | identical choices | largest difference, nats | ours | hf | ours, s | hf, s | times as fast |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for task in wanted:
        print(line(task, *(ask(lm, task, num_items) for lm in models)), flush=True)
    print(f"\n{errors(NUM_EXACT)}")


if __name__ == "__main__":
    main()
