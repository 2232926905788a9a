"""How fast text is generated, beside transformers' `generate` on the same checkpoint.

    python -m kd_recipes.quickstart && OMP_NUM_THREADS=1 python tests/benchmarks/generation_speed.py

Both continue the same prompts by as many tokens, greedily, and take turns in one process; what reading the prompts
costs is taken off. On one thread it is the processor's time that counts, which other programs change less. Also checks
that prompts of different lengths are continued together as they are alone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from kd_recipes.compression import sections
from kd_recipes.evaluation.generation import generate
from kd_recipes.parts import load_model

TEACHER = Path("runs/quickstart/teacher")
PROMPT_LENGTH, NUM_TOKENS, ROUNDS = 32, 32, 5


def seconds(action: Callable[[], object]) -> float:
    """That it takes."""
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = now()
    action()
    return now() - start


def load(directory: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Ours and theirs."""
    found = sections(directory)
    ours = load_model("model", found.model, found.checkpointer, dtype=dtype, device=torch.device("cpu")).model.eval()
    return ours, AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def compare(ours: Any, theirs: Any, batch_size: int) -> str:
    """A row of the table."""
    prompts = torch.randint(100, 10_000, (batch_size, PROMPT_LENGTH), generator=torch.Generator().manual_seed(0))
    theirs.generation_config.eos_token_id = None  # nothing is to stop it early

    def our_time(num_tokens: int) -> float:
        return seconds(lambda: generate(ours, prompts.tolist(), max_new_tokens=num_tokens, batch_size=batch_size))

    def their_time(num_tokens: int) -> float:
        settings = {"max_new_tokens": num_tokens, "do_sample": False, "attention_mask": torch.ones_like(prompts)}
        return seconds(lambda: theirs.generate(prompts, **settings))

    times: dict[tuple[str, int], list[float]] = {}
    for turn in range(ROUNDS + 1):
        for num_tokens in (1, NUM_TOKENS + 1):
            for name, measure in (("ours", our_time), ("theirs", their_time)):
                found = measure(num_tokens)
                if turn:  # the first is to warm up
                    times.setdefault((name, num_tokens), []).append(found)
    prefill = {name: min(times[name, 1]) for name in ("ours", "theirs")}
    decode = {name: min(times[name, NUM_TOKENS + 1]) - prefill[name] for name in prefill}
    cells = []
    for spent, num_tokens in ((prefill, PROMPT_LENGTH), (decode, NUM_TOKENS)):
        speeds = {name: batch_size * num_tokens / spent[name] for name in spent}
        cells.append(f"{speeds['ours']:.1f} | {speeds['theirs']:.1f} | {speeds['ours'] / speeds['theirs']:.2f}")
    return " | ".join(cells)


def is_the_same_alone(ours: Any) -> bool:
    """Whether prompts of different lengths are continued in a batch as they are one by one."""
    generator = torch.Generator().manual_seed(1)
    lengths = (1, 3, 8, 17, 30, 31, 64, 100)
    prompts = [torch.randint(100, 10_000, (length,), generator=generator).tolist() for length in lengths]
    together = generate(ours, prompts, max_new_tokens=NUM_TOKENS)
    return together == [generate(ours, [prompt], max_new_tokens=NUM_TOKENS)[0] for prompt in prompts]


def main() -> None:
    """Print the table."""
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else TEACHER
    print(f"{directory}, {torch.get_num_threads()} threads, {PROMPT_LENGTH} + {NUM_TOKENS} tokens, tokens a second")
    print("\n| dtype | batch | prefill, ours | transformers' | ratio | decode, ours | transformers' | ratio |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = load(directory, dtype)
        for batch_size in (1, 8):
            print(f"| {str(dtype)[6:]} | {batch_size} | {compare(ours, theirs, batch_size)} |", flush=True)
        if dtype == torch.float32:
            print(f"8 ragged prompts, together as one by one: {is_the_same_alone(ours)}", file=sys.stderr)


if __name__ == "__main__":
    main()
