"""How servers are asked for the log-probabilities of a text that they are given, and where these stand in the answer.

llama.cpp's own server is not among them: it refuses ``echo`` and tells probabilities of what it writes alone
(github.com/ggml-org/llama.cpp/issues/27174).
"""

# n positions of a document of n + 1 ids, K ids that are named

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kd_recipes.errors import RunError
from kd_recipes.teachers.remote.client import Request
from kd_recipes.teachers.remote.pieces import Pieces
from kd_recipes.teachers.remote.rows import Rows

Ask = Callable[[Request], Any]
_COMPLETIONS = "completions"
_HOT = 5.0  # a temperature at which hardly any text ends
_DRAWS = 8


class Dialect(ABC):
    """A kind of server.

    Args:
        model: that it is asked for; None where it has one.
        k: likeliest ids that it is asked for.
        tokenizer: of torchtune's protocol.
    """

    def __init__(self, model: str | None, k: int, tokenizer: Any) -> None:
        self._model, self._k = {} if model is None else {"model": model}, k

    @property
    def width(self) -> int:
        """Most ids of a position: those asked for, and the document's own."""
        return self._k + 1

    @property
    def num_untold(self) -> int:
        """Ids that the server's answers do not tell apart, which count with all others."""
        return 0

    @abstractmethod
    def tokenize(self, text: str, ask: Ask) -> list[int]:
        """The ids that the server makes of a text, without any that it would put around it."""

    @abstractmethod
    def rows(self, ids: Sequence[int], ask: Ask) -> Rows:
        """What the server's model says of a document.

        Args:
            ids: of the document, 2 at least.
            ask: sends a question.

        Raises:
            RunError: the answer is of another document, or not in this dialect.
        """

    def _complete(self, ask: Ask, **content: Any) -> tuple[Mapping[str, Any], Any]:
        """The only choice of a completion of one token, and what it has used."""
        reply = ask(Request(_COMPLETIONS, {**self._model, "max_tokens": 1, **content}))
        try:
            return reply["choices"][0], reply.get("usage") or {}
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise _Unexpected("no choices", "a completion") from error


class _Unexpected(RunError):
    def __init__(self, got: str, wanted: str) -> None:
        super().__init__(f"remote teacher: the server sent {got} instead of {wanted}: does it speak this dialect?")


class Vllm(Dialect):
    """vLLM, and what speaks like it: a prompt of ids, and ``prompt_logprobs`` by id, the prompt's own among them."""

    def tokenize(self, text: str, ask: Ask) -> list[int]:
        """From ``prompt_token_ids``, which vLLM has since 0.10.2."""
        extras = {"add_special_tokens": False, "return_token_ids": True}
        choice, _ = self._complete(ask, prompt=text, **extras)
        ids = choice.get("prompt_token_ids")
        if not isinstance(ids, list):
            raise _Unexpected("no prompt_token_ids", "the ids of a text (vLLM 0.10.2 or newer)")
        return [int(index) for index in ids]

    def rows(self, ids: Sequence[int], ask: Ask) -> Rows:
        """One question; the entry of a token says what might have stood in its place."""
        choice, _ = self._complete(ask, prompt=list(ids), prompt_logprobs=self._k, temperature=1.0)
        entries = choice.get("prompt_logprobs")
        if not isinstance(entries, list) or len(entries) != len(ids):
            got = f"{len(entries)} prompt_logprobs" if isinstance(entries, list) else "no prompt_logprobs"
            raise _Unexpected(got, f"those of {len(ids)} tokens")
        named = [self._named(entry) for entry in entries[1:]]
        for place, (label, known) in enumerate(zip(ids[1:], named, strict=True), start=1):
            if label not in known:
                raise _Unexpected(f"entry {place} without id {label}, the prompt's own", "prompt_logprobs")
        return Rows.of(named, ids[1:], self.width)

    @staticmethod
    def _named(entry: Any) -> dict[int, float]:
        try:
            return {int(index): float(found["logprob"]) for index, found in entry.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise _Unexpected(repr(entry)[:80], "{id: {logprob: number}}") from error


class LlamaCppPython(Dialect):
    """llama-cpp-python's server, as of 0.3.36: text in, text out, and one position aside.

    ``python -m llama_cpp.server --model FILE.gguf --logits_all true``. It takes texts alone, and tokenizes them itself;
    how many tokens it has seen, and the text of each, is compared with ours in every answer. With ``echo`` and
    ``logprobs``, its i-th entry is what comes after token i; where a text begins with the model's BOS, which it leaves
    away, it is what comes before. There is none for the first token, and none for a BOS; what comes there is asked for
    with the text up to there as a prompt. Ids are named by their text: those that share one are not named.
    """

    def __init__(self, model: str | None, k: int, tokenizer: Any) -> None:
        super().__init__(model, k, tokenizer)
        self._pieces = Pieces.of(tokenizer)
        self._bos: list[int] = []  # what the server puts before a text
        self._bos_id: int | None = None  # that it leaves away, wherever it stands

    @property
    def num_untold(self) -> int:
        """Special tokens, and those that are parts of characters, for the most part."""
        return self._pieces.num_shared

    def tokenize(self, text: str, ask: Ask) -> list[int]:
        """With its own endpoint for it, which puts BOS first where the model's file says so."""
        self._bos = self._tokenize("", ask)
        self._bos_id = self._bos[0] if self._bos else self._find_bos(ask)
        ids = self._tokenize(text, ask)
        return ids[len(self._bos) :] if ids[: len(self._bos)] == self._bos else ids

    def _tokenize(self, text: str, ask: Ask) -> list[int]:
        reply = ask(Request("/extras/tokenize", {**self._model, "input": text}))
        try:
            return [int(index) for index in reply["tokens"]]
        except (KeyError, TypeError) as error:
            raise _Unexpected("no tokens", "those of a text") from error

    def _find_bos(self, ask: Ask) -> int | None:
        """The BOS of the model's file, which need not be the tokenizer's: of two tokens, it is not echoed."""
        for index in self._pieces.likely_bos:
            text = self._pieces.text([index])
            if text:
                choice, usage = self._complete(ask, prompt=f"a{text}", echo=True, logprobs=1, temperature=0.0)
                if usage.get("prompt_tokens") == 2 and len(_logprobs(choice)["tokens"]) == 1:
                    return index
        return None

    def rows(self, ids: Sequence[int], ask: Ask) -> Rows:
        """One question, and one more for each position that its answer leaves out."""
        choice, usage = self._complete(ask, prompt=self._text(ids), echo=True, logprobs=self._k, temperature=0.0)
        self._compare_count(ids, usage)
        shift = int(ids[0] == self._bos_id)
        places = [place for place in range(len(ids) - shift) if ids[place + shift] != self._bos_id]
        found: dict[int, dict[int, float]] = {}
        logprobs = _logprobs(choice)
        if len(logprobs["tokens"]) < len(places):
            raise self._difference(f"has {len(places)} tokens that are no BOS here, and fewer there", ids)
        for entry, place in enumerate(places):
            own = ids[place + shift]
            self._compare_text(ids, place + shift, logprobs["tokens"][entry])
            if entry > 0:
                found[place] = self._named(logprobs["top_logprobs"][entry])
                found[place][own] = float(logprobs["token_logprobs"][entry])
        named = [
            found[place] if place in found else self._after(ids[: place + 1], ask) for place in range(len(ids) - 1)
        ]
        return Rows.of(named, ids[1:], self.width)

    def _after(self, ids: Sequence[int], ask: Ask) -> dict[int, float]:
        """What comes after a text: drawn, since a text that ends at once has no entry, and then drawn again."""
        for seed in range(_DRAWS):
            hot = {"temperature": _HOT, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": seed}
            choice, usage = self._complete(ask, prompt=self._text(ids), logprobs=self._k, **hot)
            self._compare_count(ids, usage)
            tokens = _logprobs(choice)["tokens"]
            if tokens and len(tokens) == usage.get("completion_tokens"):
                return self._named(_logprobs(choice)["top_logprobs"][0])
        raise _Unexpected(f"no entry after {len(ids)} tokens, {_DRAWS} times", "logprobs of what it writes")

    def _named(self, by_text: Mapping[str, float]) -> dict[int, float]:
        ids = self._pieces.ids
        return {ids[text]: float(log_p) for text, log_p in by_text.items() if text in ids}

    def _text(self, ids: Sequence[int]) -> str:
        """The text that the server makes these ids of."""
        if list(ids[: len(self._bos)]) != self._bos:
            remedy = (
                "The data have to, too, or the server's file not: add_bos_token in tokenizer_config.json says which"
            )
            raise RunError(f"remote teacher: the server's model begins a text with {self._bos}. {remedy}")
        text = self._pieces.text(ids[len(self._bos) :])
        if text is None:
            raise self._difference("begins or ends inside a character", ids)
        return text

    def _compare_count(self, ids: Sequence[int], usage: Mapping[str, Any]) -> None:
        if (count := usage.get("prompt_tokens")) != len(ids):
            raise self._difference(f"has {len(ids)} tokens here, and {count} there", ids)

    def _compare_text(self, ids: Sequence[int], place: int, text: str) -> None:
        if text not in self._pieces.written[ids[place]]:
            here = self._pieces.content[ids[place]].decode(errors="replace")
            raise self._difference(f"has {here!r} as token {place} here, and {text!r} there", ids)

    def _difference(self, what: str, ids: Sequence[int]) -> RunError:
        text = b"".join(self._pieces.content[index] for index in ids).decode(errors="replace")
        return RunError(
            f"remote teacher: a document {what}: {text[:80]!r}. This server takes text, and makes other tokens of it "
            "than the data have. Packing that cuts documents does that (dataset.split_across_pack=False does not cut), "
            "or another tokenizer; a server of dialect vllm takes the ids themselves"
        )


def _logprobs(choice: Mapping[str, Any]) -> Mapping[str, Any]:
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, Mapping):
        raise _Unexpected("no logprobs", "those of a prompt (its --logits_all true)")
    return logprobs


DIALECTS: Mapping[str, type[Dialect]] = {"vllm": Vllm, "llama_cpp_python": LlamaCppPython}
