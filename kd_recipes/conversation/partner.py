"""A model that one talks to, and what has been said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torchtune.data import Message
from torchtune.modules import TransformerDecoder

from kd_recipes.errors import ConfigError, Problem, renamed
from kd_recipes.evaluation.sources import find_source, is_gguf
from kd_recipes.importing.gguf import import_gguf, open_gguf
from kd_recipes.parts import load_model
from kd_recipes.tokenizers import HFTokenizer, hf_tokenizer

_KEY = "CHECKPOINT"  # as `kd-recipes chat` names them


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


def check_checkpoint(path: Path) -> None:
    """Look at a Hugging Face directory, as the recipes leave it, or a GGUF file, before anything is loaded.

    Raises:
        ConfigError: it is none.
    """
    if is_gguf(str(path)):
        renamed(_KEY, lambda: open_gguf(path))
        return
    if not all((path / name).is_file() for name in ("config.json", "tokenizer.json")):
        raise ConfigError(Problem(_KEY, str(path), "a directory with config.json and tokenizer.json, or a .gguf file"))
    find_source(_KEY, str(path))


def load_checkpoint(path: Path, *, dtype: torch.dtype, device: torch.device) -> tuple[TransformerDecoder, HFTokenizer]:
    """Model and tokenizer of what :func:`check_checkpoint` found to be right.

    Raises:
        ConfigError: it is not.
    """
    if is_gguf(str(path)):
        with TemporaryDirectory(prefix="kd-recipes-") as scratch:
            directory = Path(scratch) / "model"
            import_gguf(path, directory, dtype=dtype)
            return load_checkpoint(directory, dtype=dtype, device=device)
    found = find_source(_KEY, str(path))
    model = load_model("model", found.model, found.checkpointer, dtype=dtype, device=device).model.eval()
    return model, hf_tokenizer(str(path))


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer can write conversations: torchtune's own all can."""
    return not isinstance(tokenizer, HFTokenizer) or tokenizer.chat_template is not None


def short_names(checkpoints: Sequence[Path]) -> list[str]:
    """Of each path as much of its end as tells it from the others."""
    parts = [path.resolve().parts for path in checkpoints]
    for count in range(1, max(map(len, parts), default=0)):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in checkpoints]
