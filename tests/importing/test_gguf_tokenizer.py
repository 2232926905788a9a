"""The tokenizer in a GGUF's metadata splits and merges as the program that trained it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import regex
from tokenizers import pre_tokenizers

from kd_recipes.errors import ConfigError
from kd_recipes.importing.gguf_tokenizer import (
    ImportedTokenizer,
    byte_level_tokenizer,
    merges_from_scores,
    read_tokenizer,
    write_tokenizer,
)
from kd_recipes.tokenizers import hf_tokenizer

# llama.cpp's expressions (src/llama-vocab.cpp), applied one after another to the pieces of the one before.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA3 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
EXPRESSIONS = {
    "gpt2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "qwen2": [LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")],
    "llama3": [LLAMA3],
}
TEXT = "I'll SAY'S 12345 x²7 naïve日本語 ½  \t two\r\n\n  three…!!\n(end)?  "
SENTENCES = ["Hello world, hello there.", "No rhyme in this world.", "the other thing", "naïve"] * 20


def split_as_llama_cpp(text: str, expressions: list[str]) -> list[str]:
    pieces = [text]
    for expression in expressions:
        pieces = [part for piece in pieces for part in split_once(piece, expression)]
    return pieces


def split_once(text: str, expression: str) -> list[str]:
    parts, position = [], 0
    for match in regex.finditer(expression, text):
        parts += [text[position : match.start()], match.group()]
        position = match.end()
    return [part for part in (*parts, text[position:]) if part]


@pytest.mark.parametrize("family", EXPRESSIONS)
def test_text_is_split_as_in_llama_cpp(family: str) -> None:
    tokenizer = byte_level_tokenizer({"a": 0}, [], family)
    pieces = [TEXT[start:end] for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)]
    assert pieces == split_as_llama_cpp(TEXT, EXPRESSIONS[family])


def byte_level_metadata(**changes: Any) -> dict[str, Any]:
    merges = ["h e", "l l", "he ll", "hell o"]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in merges)]
    tokens += ["<|end|>", "<tool>", "[PAD262]"]
    return {
        "general.architecture": "llama",
        "llama.context_length": 64,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [*[1] * 260, 3, 4, 5],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": 260,
        "tokenizer.ggml.bos_token_id": 260,
    } | changes


def test_kinds_of_tokens() -> None:
    imported = read_tokenizer(byte_level_metadata())
    tokenizer = imported.tokenizer
    encoding = tokenizer.encode("hello<tool><|end|>")
    assert encoding.tokens == ["hello", "<tool>", "<|end|>"]
    assert tokenizer.decode(encoding.ids) == "hello<tool>"
    assert tokenizer.token_to_id("[PAD262]") is None
    assert tokenizer.get_vocab_size() == 262


@pytest.mark.parametrize(
    ("changes", "begins"),
    [
        ({}, False),
        ({"tokenizer.ggml.add_bos_token": True}, True),
        ({"tokenizer.ggml.pre": "llama-bpe"}, True),
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}, False),
    ],
)
def test_beginning_of_text(tmp_path: Path, changes: dict[str, Any], begins: bool) -> None:
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path, read_tokenizer(byte_level_metadata(**changes)))
    ours = hf_tokenizer(str(tmp_path)).encode("hello", add_eos=False)
    assert ours == AutoTokenizer.from_pretrained(tmp_path)("hello")["input_ids"]
    assert (ours[0] == 260) == begins


def test_llama3_takes_a_known_word_whole() -> None:
    tokens = {"a": 0, "b": 1, "c": 2, "abc": 3}
    assert byte_level_tokenizer(dict(tokens), [], "llama3").encode("abc").ids == [3]
    assert byte_level_tokenizer(dict(tokens), [], "qwen2").encode("abc").ids == [0, 1, 2]


def test_torchtunes_qwen2_tokenizer_reads_the_files(tmp_path: Path) -> None:
    from torchtune.models.qwen2 import Qwen2Tokenizer

    imported = read_tokenizer(byte_level_metadata(**{"tokenizer.ggml.pre": "qwen2"}))
    write_tokenizer(tmp_path, imported)
    special = {"<|im_start|>": 259, "<|im_end|>": 260, "<|endoftext|>": 260}
    theirs = Qwen2Tokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), special_tokens=special)
    text = "hello, 12 hells\n\n naïve"
    assert theirs.encode(text, add_bos=False, add_eos=False) == imported.tokenizer.encode(text).ids


def sentencepiece_metadata(folder: Path) -> tuple[dict[str, Any], Any]:
    """A small SentencePiece BPE model as llama.cpp's converter writes it, and the processor it came from."""
    import sentencepiece

    (folder / "text").write_text("\n".join(SENTENCES))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "spm"),
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    ids = range(processor.vocab_size())
    kinds = [2 if processor.IsUnknown(i) else 3 if processor.IsControl(i) else 1 for i in ids]
    kinds = [6 if processor.IsByte(i) else kind for i, kind in zip(ids, kinds, strict=True)]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [processor.IdToPiece(i) for i in ids],
        "tokenizer.ggml.scores": [processor.GetScore(i) for i in ids],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": processor.bos_id(),
        "tokenizer.ggml.eos_token_id": processor.eos_id(),
        "tokenizer.ggml.unknown_token_id": processor.unk_id(),
    }
    return metadata, processor


def test_sentencepiece_model(tmp_path: Path) -> None:
    metadata, processor = sentencepiece_metadata(tmp_path)
    tokenizer = read_tokenizer(metadata).tokenizer
    for text in (*SENTENCES[:4], "other worlds  think", "日本 é\n", " leading"):
        ids = tokenizer.encode(text).ids
        assert ids == [processor.bos_id(), *processor.encode(text)]
        assert tokenizer.decode(ids) == text


def test_merges_are_in_order_of_score() -> None:
    vocab = {text: i for i, text in enumerate(["a", "b", "c", "ab", "bc", "abc"])}
    merges = merges_from_scores(vocab, [0.0, 0.0, 0.0, -3.0, -1.0, -2.0])
    assert merges == [("b", "c"), ("a", "bc"), ("ab", "c"), ("a", "b")]


def test_chat_template_and_config_are_written(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    write_tokenizer(tmp_path, read_tokenizer(byte_level_metadata(**{"tokenizer.chat_template": template})))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (tmp_path / "chat_template.jinja").read_text() == config["chat_template"] == template
    assert (config["eos_token"], config["model_max_length"]) == ("<|end|>", 64)
    assert config["added_tokens_decoder"]["261"]["special"] is False


def test_unnamed_pre_tokenizer_warns() -> None:
    metadata = byte_level_metadata()
    del metadata["tokenizer.ggml.pre"]
    with pytest.warns(UserWarning, match="pre-tokenizer"):
        assert isinstance(read_tokenizer(metadata), ImportedTokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "byte-level BPE"),
        ({"tokenizer.ggml.pre": "tekken"}, "smollm"),
        ({"tokenizer.ggml.tokens": ["a"] * 263}, "twice"),
    ],
)
def test_unknown_tokenizers_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_tokenizer(byte_level_metadata(**changes))
