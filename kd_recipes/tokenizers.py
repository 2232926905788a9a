"""torchtune's tokenizer protocol over a checkpoint's own tokenizer.json and chat template.

torchtune 0.6.1 has a tokenizer class a model family, with the chat format written in Python; a model it does not know
(SmolLM2) or a changed template cannot be used. Here a conversation becomes exactly the tokens that transformers'
``apply_chat_template`` makes of it, and the loss mask follows from where each message lies in the rendered text.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torchtune.data import Message, truncate

from kd_recipes.chat_template import ChatTemplate, Span
from kd_recipes.errors import ConfigError, Problem, one_line

_SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class HFTokenizer:
    """A torchtune ``ModelTokenizer`` (and ``BaseTokenizer``) over tokenizer.json. See :func:`hf_tokenizer`.

    Args:
        backend: the tokenizer proper.
        special_tokens: text -> id of the tokens that are found in text before it is split.
        bos_id: id put before text, None for a model without.
        eos_id: id that ends a text or a turn.
        pad_id: id that fills up a batch.
        stop_tokens: ids at which generation ends.
        vocab_size: highest id + 1. The model's embedding may have more rows.
        add_bos_token: whether the model has seen text begin with BOS; ``encode`` adds none where it has not.
        chat_template: None for a model without.
        max_seq_len: tokens beyond are cut off; None for no limit.
    """

    backend: Tokenizer
    special_tokens: dict[str, int]
    bos_id: int | None
    eos_id: int
    pad_id: int
    stop_tokens: list[int]
    vocab_size: int
    add_bos_token: bool
    chat_template: ChatTemplate | None
    max_seq_len: int | None = None

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        """The ids of a text; special tokens written in it become their ids.

        Args:
            text: any text.
            add_bos: put BOS first, if this model uses one.
            add_eos: put EOS last.
        """
        bos = [self.bos_id] if add_bos and self.add_bos_token and self.bos_id is not None else []
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return [*bos, *ids, *([self.eos_id] if add_eos else [])]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids."""
        text: str = self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def tokenize_messages(self, messages: list[Message], *, add_eos: bool = True) -> tuple[list[int], list[bool]]:
        """The tokens of a conversation, and which of them are left out of the loss.

        Everything that the template writes for a message, its header and end of turn included, carries the message's
        ``masked``; a token with characters of two messages is masked if either is.

        Args:
            messages: the conversation.
            add_eos: end with EOS where the template itself does not.

        Returns:
            Ids and mask, of equal length, at most ``max_seq_len``; cut off, they end with a masked EOS if ``add_eos``.

        Raises:
            ValueError: no chat template, it refuses the conversation, or a message has content other than text.
        """
        text, spans = self._template().spans(messages)
        encoding = self.backend.encode(text, add_special_tokens=False)
        tokens, mask = list(encoding.ids), token_mask(encoding.offsets, spans)
        if add_eos and not text.rstrip().endswith(str(self.backend.id_to_token(self.eos_id))):
            tokens.append(self.eos_id)
            mask.append(mask[-1] if mask else True)
        # torchtune's truncate puts EOS at the end of what is short enough, too: after `<|im_end|>\n` that is wrong
        if self.max_seq_len is not None and len(tokens) > self.max_seq_len:
            tokens = truncate(tokens, self.max_seq_len, self.eos_id if add_eos else None)
            mask = truncate(mask, self.max_seq_len, True if add_eos else None)
        return tokens, mask

    def tokenize_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens after which the model writes the assistant's next message.

        A last assistant message without text, torchtune's sign for "answer here", is dropped; one with text is the
        beginning of the answer, and its end of turn is left away.

        Raises:
            ValueError: as :meth:`tokenize_messages`.
        """
        begun = messages[-1].text_content if messages and messages[-1].role == "assistant" else None
        asked = messages if begun is None else messages[:-1]
        text = self._template().render(asked, add_generation_prompt=True)
        return self.encode(text + (begun or ""), add_bos=False, add_eos=False)

    def __call__(self, sample: MutableMapping[str, Any], inference: bool = False) -> MutableMapping[str, Any]:
        """Replace ``messages`` in a sample by ``tokens`` and ``mask``: a prompt if ``inference``, else all of it."""
        messages = sample.pop("messages")
        if inference:
            sample["tokens"] = self.tokenize_prompt(messages)
            sample["mask"] = [True] * len(sample["tokens"])
        else:
            sample["tokens"], sample["mask"] = self.tokenize_messages(messages)
        return sample

    def _template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise ValueError("this tokenizer has no chat template: give hf_tokenizer `chat_template`, or train on text")
        return self.chat_template


def token_mask(offsets: Sequence[tuple[int, int]], spans: Sequence[Span]) -> list[bool]:
    """Which tokens are masked: those with a character of a masked span.

    Args:
        offsets: first character of each token, and the one after its last.
        spans: in order, covering the text.
    """
    ends = [span.end for span in spans]
    mask = []
    for start, end in offsets:
        first, last = bisect_right(ends, start), bisect_left(ends, end)
        mask.append(any(span.masked for span in spans[min(first, last) : last + 1]))
    return mask


def hf_tokenizer(path: str, max_seq_len: int | None = None, chat_template: str | None = None) -> HFTokenizer:
    """The tokenizer of a Hugging Face checkpoint directory, for torchtune's datasets and recipes.

    Args:
        path: directory of tokenizer.json, tokenizer_config.json, and where there are any special_tokens_map.json,
            generation_config.json and chat_template.jinja.
        max_seq_len: longest sequence, in tokens.
        chat_template: a Jinja file to use instead of the checkpoint's own template.

    Raises:
        ConfigError: a file is missing or damaged, or the checkpoint names no end-of-text token.
    """
    directory = Path(path)
    backend = _load_backend(directory / "tokenizer.json")
    config = _read_json(directory / "special_tokens_map.json") | _read_json(directory / "tokenizer_config.json")
    special = {name: _content(config[name]) for name in _SPECIAL_NAMES if config.get(name)}
    ids: dict[str, int | None] = {name: backend.token_to_id(text) for name, text in special.items()}
    bos_id, eos_id, pad_id = (ids.get(name) for name in ("bos_token", "eos_token", "pad_token"))
    if eos_id is None:
        wanted = "a tokenizer_config.json with an eos_token that the tokenizer has"
        raise ConfigError(Problem("tokenizer.path", path, wanted))
    stops = _read_json(directory / "generation_config.json").get("eos_token_id", [])
    source = _template_source(directory, config, chat_template)
    return HFTokenizer(
        backend=backend,
        special_tokens={token.content: index for index, token in backend.get_added_tokens_decoder().items()},
        bos_id=bos_id,
        eos_id=eos_id,
        pad_id=eos_id if pad_id is None else pad_id,  # padding never enters the loss: any id will do
        stop_tokens=list(dict.fromkeys([eos_id, *(stops if isinstance(stops, list) else [stops])])),
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        add_bos_token=_adds_bos(config, backend, bos_id),
        chat_template=None if source is None else ChatTemplate(source, special),
        max_seq_len=max_seq_len,
    )


def _load_backend(file: Path) -> Tokenizer:
    if not file.is_file():
        raise ConfigError(Problem("tokenizer.path", str(file.parent), "a directory with a tokenizer.json"))
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more special
        raise ConfigError(Problem("tokenizer.path", str(file), f"a readable tokenizer.json ({error})")) from error


def _read_json(file: Path) -> dict[str, Any]:
    """The file's content; nothing for a file that is not there."""
    if not file.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(Problem("tokenizer.path", str(file), f"readable JSON ({error})")) from error
    return content


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _adds_bos(config: dict[str, Any], backend: Tokenizer, bos_id: int | None) -> bool:
    """``add_bos_token`` of tokenizer_config.json; where it is silent (Llama 3), what tokenizer.json itself does."""
    if (configured := config.get("add_bos_token")) is not None:
        return bool(configured)
    ids: list[int] = backend.encode("", add_special_tokens=True).ids
    return bos_id is not None and ids[:1] == [bos_id]


def _template_source(directory: Path, config: dict[str, Any], chat_template: str | None) -> str | None:
    file = directory / "chat_template.jinja" if chat_template is None else Path(chat_template)
    if file.is_file():
        return file.read_text(encoding="utf-8")
    if chat_template is not None:
        raise ConfigError(Problem("tokenizer.chat_template", chat_template, "a Jinja file that exists"))
    source = config.get("chat_template")
    if isinstance(source, list):  # several by name
        source = {item["name"]: item["template"] for item in source}.get("default")
    return source


def token_ids(directory: Path) -> dict[str, int] | None:
    """The token-to-id map that stands beside a checkpoint, special tokens included; None where no known file does.

    Raises:
        ConfigError: the file is there and cannot be read.
    """
    for name, read in (("tokenizer.json", _tokenizer_json), ("vocab.json", _vocab_json)):
        file = directory / name
        if file.is_file():
            try:
                return read(file)
            except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
                raise ConfigError(Problem(str(file), one_line(error), f"a {name} that can be read")) from error
    return None


def _tokenizer_json(file: Path) -> dict[str, int]:
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: [[token, score], …] in the order of the ids
        vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
    return {**vocabulary, **{added["content"]: added["id"] for added in content.get("added_tokens", [])}}


def _vocab_json(file: Path) -> dict[str, int]:
    vocabulary = dict(json.loads(file.read_text(encoding="utf-8")))
    config = file.with_name("tokenizer_config.json")
    if config.is_file():  # special tokens are not in vocab.json
        added = json.loads(config.read_text(encoding="utf-8")).get("added_tokens_decoder", {})
        vocabulary |= {token["content"]: int(index) for index, token in added.items()}
    return vocabulary
