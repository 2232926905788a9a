"""A model that one talks to, and what has been said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torchtune.data import Message
from torchtune.modules import TransformerDecoder

from kd_recipes.errors import ConfigError, Problem
from kd_recipes.evaluation.sources import find_source
from kd_recipes.parts import load_model
from kd_recipes.tokenizers import HFTokenizer, hf_tokenizer


@dataclass
class Partner:
    """A model and its side of the conversation.

    Args:
        name: for the screen.
        model: with its weights.
        tokenizer: of torchtune's protocol.
        is_raw: whether it goes on with what is typed, as a base model does.
        system: what it is told at the beginning; none if empty.
        exchanges: what was asked and what it answered.
    """

    name: str
    model: TransformerDecoder
    tokenizer: Any
    is_raw: bool
    system: str = ""
    exchanges: list[tuple[str, str]] = field(default_factory=list)

    def prompt(self, asked: str, max_new_tokens: int) -> tuple[list[int], int]:
        """The ids that a reply comes after, and how many exchanges had to be left out of them.

        Raises:
            ConfigError: what is asked alone is too long for the model.
            ValueError: the chat template refuses the conversation.
        """
        room = self.model.max_seq_len - max_new_tokens
        for left_out in range(len(self.exchanges) + 1):
            ids = self._ids(self.exchanges[left_out:], asked)
            if len(ids) <= room:
                return ids, left_out
        wanted = f"at most {room}, which with --max-new-tokens are the {self.model.max_seq_len} of {self.name}"
        raise ConfigError(Problem("the question", f"{len(ids)} tokens", wanted))

    def _ids(self, exchanges: Sequence[tuple[str, str]], asked: str) -> list[int]:
        if self.is_raw:
            text = "".join(part for exchange in exchanges for part in exchange) + asked
            return list(self.tokenizer.encode(text, add_bos=True, add_eos=False))
        messages = [Message(role="system", content=self.system)] if self.system else []
        for question, answer in exchanges:
            messages += [Message(role="user", content=question), Message(role="assistant", content=answer)]
        messages += [Message(role="user", content=asked), Message(role="assistant", content="")]
        return list(self.tokenizer({"messages": messages}, inference=True)["tokens"])


def load_directory(
    directory: Path, *, dtype: torch.dtype, device: torch.device
) -> tuple[TransformerDecoder, HFTokenizer]:
    """Model and tokenizer of a Hugging Face directory, as the recipes leave it.

    Raises:
        ConfigError: it is none.
    """
    found = find_source("CHECKPOINT", str(directory))
    if not (directory / "tokenizer.json").is_file():
        raise ConfigError(Problem("CHECKPOINT", str(directory), "a directory with its tokenizer.json"))
    tokenizer = hf_tokenizer(str(directory))
    model = load_model("model", found.model, found.checkpointer, dtype=dtype, device=device).model.eval()
    return model, tokenizer


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer can write conversations: torchtune's own all can."""
    return not isinstance(tokenizer, HFTokenizer) or tokenizer.chat_template is not None


def short_names(directories: Sequence[Path]) -> list[str]:
    """Of each path as much of its end as tells it from the others."""
    parts = [path.resolve().parts for path in directories]
    for count in range(1, max(map(len, parts), default=0)):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in directories]
