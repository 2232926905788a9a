"""A tokenizer.json as GGUF's metadata.

llama.cpp knows how text is split before merging by a name alone; which name is right is found by splitting text: a
tokenizer that splits all of the probe as llama.cpp's of that name does gets it, and one that none equals is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from kd_recipes.errors import ConfigError, Problem
from kd_recipes.gguf_format.splitting import PRE_TOKENIZERS, byte_level_tokenizer
from kd_recipes.tokenizers import hf_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # GGUF's token types
# The name that llama.cpp calls a family by.
_NAMES = {family: name for name, family in reversed(PRE_TOKENIZERS.items()) if name != "default"}
_PROBE = (
    "It's 2024, and WE'LL have 1234567 reasons\n\n\n  to\tre-read   naïve café notes… don't you?\r\n"
    " \n \n3.14159 x²  =  10⁵ + ½; 0x1F600 😀👩‍👩‍👧 \u00a0 Ünïcödé ﬁne e\u0301\n"
    "日本語のテキスト、中文文本。한국어 العربية हिन्दी ไทย Ελληνικά русский 'Re 'tIS\n"
    "def f(x):\n    return [x**2 for _ in range(10)]  # ok!!!\n!!??--__@@ {}[]<> 'll've\u3000"
)


def tokenizer_metadata(directory: Path, num_rows: int) -> dict[str, Any]:
    """The ``tokenizer.*`` keys of a checkpoint's tokenizer and chat template.

    Args:
        directory: with tokenizer.json, and tokenizer_config.json, generation_config.json and chat_template.jinja as far
            as there are any.
        num_rows: of the embedding; ids beyond the tokens become padding.

    Raises:
        ConfigError: there is no tokenizer.json, or it is of a kind that llama.cpp has no name for.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(Problem("checkpoint_dir", f"{directory} without tokenizer.json", "a tokenizer beside it"))
    backend, content = Tokenizer.from_file(str(path)), json.loads(path.read_text(encoding="utf-8"))
    model = content["model"]
    if model.get("type") != "BPE":
        raise ConfigError(Problem(str(path), model.get("type"), "a BPE tokenizer, byte-level or SentencePiece's"))
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    tokens, types = _tokens(backend, num_rows)
    metadata: dict[str, Any] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    if model.get("byte_fallback"):
        metadata |= _sentencepiece(tokens, types, merges, content)
    else:
        metadata |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": _family_name(backend, model["vocab"], merges),
            "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        }
    return metadata | _special(directory)


def _tokens(backend: Tokenizer, num_rows: int) -> tuple[list[str], list[int]]:
    by_id = {index: token for token, index in backend.get_vocab(with_added_tokens=True).items()}
    added = backend.get_added_tokens_decoder()
    tokens, types = [], []
    for index in range(num_rows):
        tokens.append(by_id.get(index, f"[PAD{index}]"))
        if index not in by_id:
            types.append(UNUSED)
        elif index in added:
            types.append(CONTROL if added[index].special else USER_DEFINED)
        else:
            types.append(NORMAL)
    return tokens, types


def _family_name(backend: Tokenizer, vocab: dict[str, int], merges: list[list[str]]) -> str:
    wanted = backend.encode(_PROBE, add_special_tokens=False).ids
    for family, name in _NAMES.items():
        ours = byte_level_tokenizer(dict(vocab), [(left, right) for left, right in merges], family)
        if ours.encode(_PROBE, add_special_tokens=False).ids == wanted:
            return name
    remedy = "Its text would be split in another way than it was trained with"
    raise ConfigError(Problem("tokenizer.json", "another way to split text", f"that of {', '.join(_NAMES)}", remedy))


def _sentencepiece(
    tokens: list[str], types: list[int], merges: list[list[str]], content: Mapping[str, Any]
) -> dict[str, Any]:
    """Scores in the order of the merges: of two that are possible, llama.cpp takes the one with the higher score."""
    ranks: dict[str, int] = {}
    special: dict[str, Any] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    for index, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[index] = BYTE
        elif token == content["model"].get("unk_token"):
            types[index] = UNKNOWN
            special["tokenizer.ggml.unknown_token_id"] = index
    return {
        **special,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [-float(ranks.get(token, len(merges))) for token in tokens],
        "tokenizer.ggml.add_space_prefix": "Prepend" in json.dumps(content.get("normalizer")),
    }


def _special(directory: Path) -> dict[str, Any]:
    tokenizer = hf_tokenizer(str(directory))
    others = [index for index in tokenizer.stop_tokens if index != tokenizer.eos_id]
    named: dict[str, int | None] = {
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "eot": others[0] if others else None,  # a turn's end beside a text's; of further ones llama.cpp knows the names
        "padding": tokenizer.pad_id,
    }
    metadata: dict[str, Any] = {
        f"tokenizer.ggml.{name}_token_id": index for name, index in named.items() if index is not None
    }
    metadata["tokenizer.ggml.add_bos_token"] = tokenizer.add_bos_token
    metadata["tokenizer.ggml.add_eos_token"] = False  # of a prompt, which is to go on
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template.source
    return metadata
