"""What it takes to run a model: size, memory, and speed of reading a prompt and of writing after it."""

# P positions of the prompt, N new tokens

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torchtune.modules import TransformerDecoder

from kd_recipes import _torchtune

_INTERVAL = 0.005  # seconds between two looks at the process's memory


@dataclass(frozen=True)
class Cost:
    """Of one model, in this process, in the dtype that it was loaded in.

    Args:
        num_parameters: tied ones counted once.
        num_bytes: of its files.
        peak_memory_bytes: that it takes to generate: of the weights, and of the most that was added to them. On a CPU
            by the process's resident memory, in which a library may keep what it had before.
        prefill_tokens_per_second: of a prompt, one sequence.
        decode_tokens_per_second: of new tokens, one sequence.
        num_threads: of the CPU that computed; 0 on another device.
    """

    num_parameters: int
    num_bytes: int
    peak_memory_bytes: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    num_threads: int = 0


def measure_cost(
    model: TransformerDecoder,
    *,
    num_bytes: int,
    prompt_length: int = 128,
    num_new_tokens: int = 32,
    repeats: int = 3,
    seed: int = 0,
) -> Cost:
    """Generate greedily from a random prompt, several times after a first one; speeds are medians.

    Args:
        model: with or without its head; left as it was.
        num_bytes: of its files.
        prompt_length: P, at most as many as the model has positions for, with N.
        num_new_tokens: N.
        repeats: that are timed.
        seed: of the prompt.
    """
    size = _torchtune.model_size(model)
    device = next(model.parameters()).device
    num_new_tokens = max(1, min(num_new_tokens, size.max_seq_len // 2))
    prompt_length = max(1, min(prompt_length, size.max_seq_len - num_new_tokens))
    ids = torch.randint(size.num_rows, (prompt_length,), generator=torch.Generator().manual_seed(seed)).tolist()
    prefills, decodes = [], []
    with _peak_memory(device) as grown:
        for index in range(repeats + 1):
            times = _time(model, ids, num_new_tokens, device)
            if index:  # the first one allocates, and chooses kernels
                prefills.append(times[0])
                decodes.append(times[1])
    weights = {
        parameter.untyped_storage().data_ptr(): parameter.untyped_storage().nbytes() for parameter in model.parameters()
    }
    return Cost(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_bytes=num_bytes,
        peak_memory_bytes=sum(weights.values()) + grown[0],
        prefill_tokens_per_second=prompt_length / median(prefills),
        decode_tokens_per_second=num_new_tokens / median(decodes),
        num_threads=torch.get_num_threads() if device.type == "cpu" else 0,
    )


def _time(
    model: TransformerDecoder, prompt: list[int], num_new_tokens: int, device: torch.device
) -> tuple[float, float]:
    """Seconds of the prompt, and of the new tokens."""
    with _torchtune.decoding(model) as decoder:
        start = _now(device)
        ids_B = decoder.start([prompt], num_new_tokens).argmax(-1)
        middle = _now(device)
        for _ in range(num_new_tokens):
            ids_B = decoder.step(ids_B).argmax(-1)
        return middle - start, _now(device) - middle


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[list[float]]:
    """The bytes that memory grows by while this is entered, known when it is left."""
    grown = [0.0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield grown
        grown[0] = torch.cuda.max_memory_allocated(device) - before
        return
    import psutil

    process, is_done = psutil.Process(), threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not is_done.wait(_INTERVAL):
            grown[0] = max(grown[0], process.memory_info().rss - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield grown
    finally:
        is_done.set()
        watcher.join()
