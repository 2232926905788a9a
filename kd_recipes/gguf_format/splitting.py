"""How byte-level tokenizers split text before they merge, by the names that llama.cpp has for it."""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

_LETTERS_AND_SPACE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# llama.cpp's name -> family; names in one family share one regular expression there.
PRE_TOKENIZERS = {
    "gpt-2": "gpt2",
    "default": "gpt2",
    "smollm": "smollm",
    "starcoder": "smollm",
    "refact": "smollm",
    "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
    "llama-bpe": "llama3",
    "llama3": "llama3",
    "llama-v3": "llama3",
}


def byte_level_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]], family: str) -> Tokenizer:
    """A byte-level BPE tokenizer.

    Args:
        vocab: token text (in GPT-2's byte alphabet) -> id.
        merges: pairs in order of priority.
        family: ``gpt2``, ``smollm``, ``qwen2`` or ``llama3``: how text is split before merging.
    """
    # Llama 3 takes a word that is a token as it is, even where no sequence of merges leads to it.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=family == "llama3"))
    if family == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif family == "smollm":
        steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    else:
        digits = r"\p{N}" if family == "qwen2" else r"\p{N}{1,3}"
        split = pre_tokenizers.Split(Regex(_LETTERS_AND_SPACE % digits), "isolated")
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if family == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
