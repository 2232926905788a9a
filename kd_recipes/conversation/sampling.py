"""A reply, a token after another, as text that grows."""

# V vocabulary

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kd_recipes import _torchtune
from kd_recipes.evaluation.generation import text_of

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer makes of the first bytes of a character


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: 0 for the likeliest; 1 for the model's own distribution.
        top_p: only the likeliest tokens that together have this probability are drawn from.
        max_new_tokens: at which a reply is cut off.
        seed: of what is drawn; every reply of every model begins with it.
    """

    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 256
    seed: int = 0

    def choose(self, logits_V: Tensor, generator: torch.Generator) -> int:
        """An id."""
        if self.temperature == 0:
            return int(logits_V.argmax())
        p_V, ids_V = (logits_V.double().cpu() / self.temperature).softmax(-1).sort(descending=True)
        p_V[(p_V.cumsum(-1) - p_V) >= self.top_p] = 0  # the first stays whatever it has
        return int(ids_V[torch.multinomial(p_V, 1, generator=generator)])


def stream(decoder: _torchtune.Decoding, prompt: Sequence[int], tokenizer: Any, sampling: Sampling) -> Iterator[str]:
    """The reply so far, after each token that adds to it.

    Args:
        decoder: of the model.
        prompt: ids.
        tokenizer: of torchtune's protocol.
        sampling: how tokens are chosen.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    stops = set(tokenizer.stop_tokens)
    logits_1V = decoder.start([prompt], sampling.max_new_tokens - 1)
    ids: list[int] = []
    while True:
        chosen = sampling.choose(logits_1V[0], generator)
        if chosen in stops:
            break
        ids.append(chosen)
        if len(ids) == sampling.max_new_tokens:
            break
        if not (text := text_of(tokenizer, ids)).endswith(_UNFINISHED):
            yield _visible(text)
        logits_1V = decoder.step(torch.tensor([chosen], device=logits_1V.device))
    yield _visible(text_of(tokenizer, ids))


def _visible(text: str) -> str:
    """Without what a terminal would take for commands."""
    return "".join(char for char in text if char.isprintable() or char in "\n\t")
