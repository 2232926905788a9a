"""What it takes to run a model: size, memory, and speed of reading a prompt and of writing after it."""

# P positions of the prompt, N new tokens

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torchtune.modules import TransformerDecoder

from kd_recipes import _torchtune
from kd_recipes.tally import Tally


@dataclass(frozen=True)
class Cost:
    """Of one model, in this process, in the dtype that it was loaded in.

    Args:
        num_parameters: tied ones counted once.
        num_bytes: of its files.
        peak_memory_bytes: that it takes to generate: of the weights, and the most that tensors add to them. What
            libraries keep for themselves is not in it: on a CPU that depends on what the process did before.
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
    """Generate greedily from a random prompt, several times after a first one.

    Speeds are the best of them, since whatever else a machine does only slows it down.

    Args:
        model: with or without its head; left as it was.
        num_bytes: of its files.
        prompt_length: P, at most as many as the model has positions for, with N.
        num_new_tokens: N.
        repeats: that are timed.
        seed: of the prompt.
    """
    device = next(model.parameters()).device
    num_new_tokens = max(1, min(num_new_tokens, model.max_seq_len // 2))
    prompt_length = max(1, min(prompt_length, model.max_seq_len - num_new_tokens))
    num_ids = model.tok_embeddings.num_embeddings
    ids = torch.randint(num_ids, (prompt_length,), generator=torch.Generator().manual_seed(seed)).tolist()
    with _torchtune.decoding(model) as decoder:
        # the first one allocates, chooses kernels, and rounds weights that are rounded when they are used
        times = [_time(decoder, ids, num_new_tokens, device) for _ in range(repeats + 1)][1:]
    parameters = list(model.parameters())
    weights = sum(parameter.nbytes for parameter in parameters)
    return Cost(
        num_parameters=sum(parameter.numel() for parameter in parameters),
        num_bytes=num_bytes,
        peak_memory_bytes=weights + _growth(model, ids, num_new_tokens, device),
        prefill_tokens_per_second=prompt_length / min(prefill for prefill, _ in times),
        decode_tokens_per_second=num_new_tokens / min(decode for _, decode in times),
        num_threads=torch.get_num_threads() if device.type == "cpu" else 0,
    )


def _time(
    decoder: _torchtune.Decoding, prompt: Sequence[int], num_new_tokens: int, device: torch.device
) -> tuple[float, float]:
    """Seconds of the prompt, and of the new tokens."""
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


def _growth(model: TransformerDecoder, prompt: Sequence[int], num_new_tokens: int, device: torch.device) -> int:
    """The most bytes of tensors that there are at a time while a model generates, beside what was there before."""

    def run() -> None:
        with _torchtune.decoding(model) as decoder:
            ids_B = decoder.start([prompt], num_new_tokens).argmax(-1)  # makes room for all new tokens
            decoder.step(ids_B)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = int(torch.cuda.memory_allocated(device))
        run()
        return int(torch.cuda.max_memory_allocated(device)) - before
    tally = Tally()
    with tally:
        run()
    return tally.peak
