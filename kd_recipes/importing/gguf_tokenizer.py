"""The tokenizer inside a GGUF file, as tokenizer.json and the small files around it.

A GGUF keeps tokens, their types, merges or scores, and a *name* for the pre-tokenizer; the regular expression behind
that name lives in llama.cpp's source, and is written down here for the names we support. A guess would change how text
splits, which raises the perplexity a little and is noticed by nobody: so an unknown name is an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from kd_recipes.errors import ConfigError, Problem
from kd_recipes.gguf_format.splitting import PRE_TOKENIZERS, byte_level_tokenizer
from kd_recipes.storage import write_json

# GGUF's token types
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5


@dataclass(frozen=True)
class ImportedTokenizer:
    """A tokenizer taken from a GGUF file.

    Args:
        tokenizer: what becomes tokenizer.json.
        merges: pairs in order of priority.
        special: ``bos_token``, ``eos_token``, ``unk_token``, ``pad_token`` as far as there are any.
        add_bos_token: whether text begins with BOS.
        add_eos_token: whether text ends with EOS.
        max_length: the model's context.
        chat_template: a Jinja template, if the file has one.
    """

    tokenizer: Tokenizer
    merges: Sequence[tuple[str, str]]
    special: Mapping[str, str]
    add_bos_token: bool
    add_eos_token: bool
    max_length: int
    chat_template: str | None


def read_tokenizer(metadata: Mapping[str, Any]) -> ImportedTokenizer:
    """Build the tokenizer that a GGUF file's metadata describe.

    Raises:
        ConfigError: no tokenizer, one of another kind, an unknown pre-tokenizer, or two tokens with one text.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama") or "tokenizer.ggml.tokens" not in metadata:
        wanted = "gpt2 (byte-level BPE) or llama (SentencePiece BPE)"
        raise ConfigError(Problem("gguf_file: tokenizer.ggml.model", kind, wanted))
    tokens: list[str] = list(metadata["tokenizer.ggml.tokens"])
    special = _special_tokens(metadata, tokens)
    vocab = _vocabulary(tokens, metadata)
    family = _family(metadata) if kind == "gpt2" else "sentencepiece"
    if kind == "gpt2":
        merges = _stored_merges(metadata)
        tokenizer = byte_level_tokenizer(vocab, merges, family)
    else:
        merges = merges_from_scores(vocab, metadata["tokenizer.ggml.scores"])
        has_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        tokenizer = sentencepiece_tokenizer(vocab, merges, special.get("unk_token"), add_space_prefix=has_prefix)
    tokenizer.add_tokens(_added_tokens(tokens, metadata, set(special.values())))
    # llama.cpp's defaults where the file is silent
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", family in ("llama3", "sentencepiece")))
    add_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    _set_post_processor(tokenizer, special, add_bos=add_bos, add_eos=add_eos)
    arch = metadata.get("general.architecture")
    length = int(metadata.get(f"{arch}.context_length", 0))
    template = metadata.get("tokenizer.chat_template")
    return ImportedTokenizer(tokenizer, merges, special, add_bos, add_eos, length, template)


def _family(metadata: Mapping[str, Any]) -> str:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        raise ConfigError(Problem("gguf_file: tokenizer.ggml.pre", name, f"one of {', '.join(PRE_TOKENIZERS)}"))
    if name == "default":
        warnings.warn("the GGUF does not name its pre-tokenizer: GPT-2's is used, which may be wrong", stacklevel=3)
    return PRE_TOKENIZERS[name]


def _vocabulary(tokens: Sequence[str], metadata: Mapping[str, Any]) -> dict[str, int]:
    types = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    # Rows that pad the embedding to a round number: converters name them so, the original tokenizer has none.
    padding = {i for i, text in enumerate(tokens) if types[i] == _UNUSED and text == f"[PAD{i}]"}
    vocab = {text: i for i, text in enumerate(tokens) if i not in padding}
    if len(vocab) + len(padding) != len(tokens):
        raise ConfigError(Problem("gguf_file: tokenizer.ggml.tokens", "one text twice", "each token once"))
    return vocab


def _stored_merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", [])]
    return [(left, right) for left, right in pairs]


def merges_from_scores(vocab: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges of a SentencePiece BPE model, which keeps scores instead.

    SentencePiece joins the neighbours whose union has the highest score; so every way to cut a token in two tokens
    is a merge, in order of the token's score.
    """
    merges = []
    for text, index in vocab.items():
        cuts = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        known = [(left, right) for left, right in cuts if left in vocab and right in vocab]
        known.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [(-scores[index], pair) for pair in known]
    merges.sort(key=lambda item: item[0])  # stable: equal scores stay in order of id
    return [pair for _, pair in merges]


def sentencepiece_tokenizer(
    vocab: dict[str, int], merges: list[tuple[str, str]], unk_token: str | None, *, add_space_prefix: bool
) -> Tokenizer:
    """A SentencePiece-like BPE tokenizer: spaces become ``▁``, what no token covers becomes byte tokens."""
    model = models.BPE(vocab=vocab, merges=merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    prefix = [normalizers.Prepend("▁")] if add_space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if add_space_prefix else []
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _special_tokens(metadata: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, str]:
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    ids = {hf: metadata.get(f"tokenizer.ggml.{ggml}_token_id") for ggml, hf in names.items()}
    return {hf: tokens[int(index)] for hf, index in ids.items() if index is not None}


def _added_tokens(tokens: Sequence[str], metadata: Mapping[str, Any], special: set[str]) -> list[AddedToken]:
    """The tokens that are found in text before it is split; ``special`` ones are dropped on decoding."""
    types = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    added = []
    for text, kind in zip(tokens, types, strict=True):
        is_special = kind in (_CONTROL, _UNKNOWN) or text in special
        if is_special or kind == _USER_DEFINED:
            added.append(AddedToken(text, normalized=False, special=is_special))
    return added


def _set_post_processor(tokenizer: Tokenizer, special: Mapping[str, str], *, add_bos: bool, add_eos: bool) -> None:
    bos = [special["bos_token"]] if add_bos and "bos_token" in special else []
    eos = [special["eos_token"]] if add_eos and "eos_token" in special else []
    if bos or eos:
        pieces = [*bos, "$A", *eos]
        pair = [*pieces, *(f"{piece}:1" for piece in (*bos, "$B", *eos))]
        ids = [(text, tokenizer.token_to_id(text)) for text in (*bos, *eos)]
        tokenizer.post_processor = processors.TemplateProcessing(single=pieces, pair=pair, special_tokens=ids)


def write_tokenizer(directory: Path, imported: ImportedTokenizer) -> None:
    """Write tokenizer.json and tokenizer_config.json, special_tokens_map.json, chat_template.jinja beside it.

    And vocab.json and merges.txt, for torchtune's own Qwen2 tokenizer.
    """
    tokenizer = imported.tokenizer
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(directory / "special_tokens_map.json", dict(imported.special))
    write_json(directory / "tokenizer_config.json", _tokenizer_config(imported))
    by_id = sorted(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    write_json(directory / "vocab.json", dict(by_id))
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in imported.merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if imported.chat_template is not None:
        (directory / "chat_template.jinja").write_text(imported.chat_template, encoding="utf-8")


def _tokenizer_config(imported: ImportedTokenizer) -> dict[str, Any]:
    added = imported.tokenizer.get_added_tokens_decoder()
    attributes = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    config: dict[str, Any] = {
        # The class that takes tokenizer.json as it is; those named after a model rebuild parts of it.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": imported.add_bos_token,
        "add_eos_token": imported.add_eos_token,
        "added_tokens_decoder": {str(i): {a: getattr(t, a) for a in attributes} for i, t in sorted(added.items())},
        "clean_up_tokenization_spaces": False,
        "model_max_length": imported.max_length,
        **imported.special,
    }
    if imported.chat_template is not None:
        config["chat_template"] = imported.chat_template
    return config
