"""The texts that llama.cpp writes for the ids of a tokenizer.json, for servers that name ids by their text alone."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from kd_recipes.errors import ConfigError, Problem
from kd_recipes.tokenizers import HFTokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_LONGEST = 32  # bytes, of the buffer that llama-cpp-python has for a piece: of a longer one it makes nothing
_DEFAULT_BOS = (1, 11)  # llama.cpp's, for files that name none


@dataclass(frozen=True)
class Pieces:
    """Texts of ids.

    Args:
        content: id -> its bytes.
        written: id -> the texts that a server may write for it; empty bytes and half characters are left away.
        ids: text -> its id, where no other id has it.
        likely_bos: ids that a file of the model may have as its BOS.
        num_shared: ids whose text another one has, too.
    """

    content: Sequence[bytes]
    written: Sequence[frozenset[str]]
    ids: dict[str, int]
    likely_bos: Sequence[int]
    num_shared: int

    @classmethod
    def of(cls, tokenizer: object) -> Pieces:
        """Those of a tokenizer.

        Raises:
            ConfigError: it is not over a tokenizer.json.
        """
        if not isinstance(tokenizer, HFTokenizer):
            wanted = "kd_recipes.tokenizers.hf_tokenizer, which knows the bytes of its ids"
            remedy = "This server names ids by their text; one of dialect vllm takes any tokenizer"
            raise ConfigError(Problem("tokenizer", type(tokenizer).__name__, wanted, remedy))
        decoder = json.dumps(json.loads(tokenizer.backend.to_str()).get("decoder"))
        decode = _from_letters if "ByteLevel" in decoder else _from_spaces
        special = set(tokenizer.special_tokens.values())
        content, written = [], []
        for index in range(tokenizer.vocab_size):
            token = tokenizer.backend.id_to_token(index) or ""
            piece = token.encode() if index in special else decode(token)
            text = piece.decode(errors="ignore") if len(piece) <= _LONGEST else ""
            content.append(piece)
            # whether a special token is written depends on how the file was converted
            written.append(frozenset((text, "")) if index in special else frozenset((text,)))
        owners: dict[str, list[int]] = {}
        for index, texts in enumerate(written):
            for text in texts:
                owners.setdefault(text, []).append(index)
        ids = {text: found[0] for text, found in owners.items() if len(found) == 1 and text}
        named = set(ids.values()) - special
        ends = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, *tokenizer.stop_tokens, *_DEFAULT_BOS)
        likely = [number for number in dict.fromkeys(ends) if number is not None and number < len(content)]
        return cls(content, written, ids, likely, len(content) - len(named))

    def text(self, ids: Sequence[int]) -> str | None:
        """The text of some ids; None where it begins or ends inside a character."""
        try:
            return b"".join(self.content[index] for index in ids).decode()
        except UnicodeDecodeError:
            return None


@lru_cache(maxsize=1)
def _bytes_of_letters() -> dict[str, int]:
    """GPT-2's alphabet for bytes: those that print are themselves, the others follow from U+0100 on."""
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in prints]
    return {chr(byte): byte for byte in prints} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def _from_letters(token: str) -> bytes:
    letters = _bytes_of_letters()
    return b"".join(bytes((letters[char],)) if char in letters else char.encode() for char in token)


def _from_spaces(token: str) -> bytes:
    """SentencePiece's: a low line for a space, and single bytes in angle brackets."""
    if match := _BYTE.fullmatch(token):
        return bytes.fromhex(match.group(1))
    return token.replace("▁", " ").encode()
