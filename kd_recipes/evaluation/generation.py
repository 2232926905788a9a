"""What models say: continuations of many prompts at a time, the likeliest or drawn."""

# B sequences, N new tokens, V vocabulary

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder

from kd_recipes import _torchtune
from kd_recipes.errors import ConfigError, Problem
from kd_recipes.evaluation.diversity import Generated


@dataclass(frozen=True)
class Continuation:
    """What came after a prompt.

    Args:
        ids: the new ids, without the one that ended them.
        is_ended: whether a stop id ended them, and not the limit of new tokens.
    """

    ids: tuple[int, ...]
    is_ended: bool


def generate(
    model: TransformerDecoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
    batch_size: int = 16,
    num_ids: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[Continuation]:
    """Continue each prompt, token by token. Equals, without the cache and the batches,

        while len(new) < max_new_tokens:
            logits_V = model(torch.tensor([[*prompt, *new]]))[0, -1]
            new.append(logits_V.argmax() or a draw from (logits_V / temperature).softmax(-1))

    up to rounding: which other prompts are in the batch changes neither what is likeliest nor what is drawn. The model
    may be in training, have lost its head to a loss, or be compiled; it is left as it was.

    Args:
        model: any decoder, on its device.
        prompts: ids, at least one each.
        max_new_tokens: at which a continuation is cut off.
        temperature: 0 for the likeliest id each time; 1 for the model's own distribution.
        stop_ids: ids that end a continuation.
        seed: of what is drawn.
        batch_size: prompts at a time.
        num_ids: only the first so many ids are chosen from, as without the padding of a vocabulary; None for all.
        progress: called with a number of prompts when they are done, as ``tqdm.update`` is.

    Returns:
        In the order of the prompts.

    Raises:
        ConfigError: a prompt that is empty, too long or has ids that the model lacks; a setting out of its range.
    """
    _check(model, prompts, max_new_tokens, temperature, batch_size)
    # a number for each token of each prompt, however they are batched, and the same on every device
    generator = torch.Generator().manual_seed(seed)
    shape = (len(prompts), max_new_tokens)
    draws_PN = torch.rand(shape, generator=generator, dtype=torch.float64) if temperature else None
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))  # little padding, and the worst first
    found: dict[int, Continuation] = {}
    with _torchtune.decoding(model) as decoder:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            draws_BN = draws_PN[batch].to(model.tok_embeddings.weight.device) if draws_PN is not None else None
            choice = _Choice(temperature, draws_BN, num_ids)
            ids_BN = _continue(decoder, [prompts[i] for i in batch], max_new_tokens, choice, stop_ids)
            found |= {index: _cut(ids, stop_ids) for index, ids in zip(batch, ids_BN.tolist(), strict=True)}
            if progress is not None:
                progress(len(batch))
    return [found[index] for index in range(len(prompts))]


@dataclass(frozen=True)
class _Choice:
    """How the next ids are chosen.

    Args:
        temperature: of the distribution.
        draws_BN: a number in [0, 1) for each of them; None for the likeliest.
        num_ids: from the first so many; None for all.
    """

    temperature: float
    draws_BN: Tensor | None
    num_ids: int | None

    def __call__(self, logits_BV: Tensor, index: int) -> Tensor:
        logits_BV = logits_BV[:, : self.num_ids]
        if self.draws_BN is None:
            return logits_BV.argmax(-1)
        return _draw(logits_BV / self.temperature, self.draws_BN[:, index])


def _continue(
    decoder: _torchtune.Decoding,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    choose: _Choice,
    stop_ids: Sequence[int],
) -> Tensor:
    """New ids ``[B, N]``, until all have come to a stop id; what a row has after its own is of no use."""
    logits_BV = decoder.start(prompts, max_new_tokens - 1)
    stops = torch.tensor([*stop_ids], device=logits_BV.device)
    is_ended_B = torch.zeros(len(prompts), dtype=torch.bool, device=logits_BV.device)
    ids: list[Tensor] = []
    while True:
        ids_B = choose(logits_BV, len(ids))
        ids.append(ids_B)
        is_ended_B |= torch.isin(ids_B, stops)
        # the one time that the host waits for the device
        if len(ids) == max_new_tokens or (stop_ids and is_ended_B.all()):
            return torch.stack(ids, 1)
        logits_BV = decoder.step(ids_B)


def _draw(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The id at which the cumulative probability passes a number in [0, 1)."""
    # float32 would lose the tail of a large vocabulary
    cumulative_BV = logits_BV.softmax(-1).cumsum(-1, dtype=torch.float64)
    wanted_B1 = (uniform_B * cumulative_BV[:, -1])[:, None]
    return torch.searchsorted(cumulative_BV, wanted_B1, right=True)[:, 0].clamp_(max=logits_BV.shape[1] - 1)


def _cut(ids: list[int], stop_ids: Sequence[int]) -> Continuation:
    end = next((index for index, token in enumerate(ids) if token in stop_ids), None)
    return Continuation(tuple(ids[:end]), end is not None)


def _check(
    model: TransformerDecoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
) -> None:
    problems = [
        Problem(key, value, "a whole number above 0")
        for key, value in {"max_new_tokens": max_new_tokens, "batch_size": batch_size}.items()
        if value < 1
    ]
    if not 0 <= temperature < math.inf:
        problems.append(Problem("temperature", temperature, "0 for the likeliest, or a number above it"))
    most, num_ids = model.max_seq_len - max_new_tokens, model.tok_embeddings.num_embeddings
    for index, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= most:
            wanted = f"1 to {most}, which with {max_new_tokens} new ones are the model's {model.max_seq_len}"
            problems.append(Problem(f"prompts[{index}]", f"{len(prompt)} tokens", wanted))
        if unknown := [token for token in prompt if not 0 <= token < num_ids]:
            problems.append(Problem(f"prompts[{index}]", f"ids {unknown[:3]}", f"ids from 0 to {num_ids - 1}"))
    if problems:
        raise ConfigError(*problems)


def with_texts(tokenizer: Any, continuations: Sequence[Continuation]) -> list[Generated]:
    """Continuations with what they say."""
    return [Generated(found.ids, text_of(tokenizer, found.ids), found.is_ended) for found in continuations]


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of ids that a model has drawn: those that the tokenizer does not know, as of padding, have none."""
    try:
        return str(tokenizer.decode(list(ids)))
    except (KeyError, IndexError, OverflowError, ValueError):  # of tiktoken, sentencepiece, tokenizers
        return "".join(text_of(tokenizer, [one]) for one in ids) if len(ids) > 1 else ""
