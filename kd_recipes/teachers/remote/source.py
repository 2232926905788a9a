"""A teacher on another machine: a server of completions that tells the likeliest ids at each position of a text."""

# B sequences, S positions, T = B * S, n positions of a document, K ids that are named

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from torchtune.modules import TransformerDecoder
from urllib3.exceptions import HTTPError
from urllib3.util import parse_url

from kd_recipes.batch import Batch
from kd_recipes.errors import ConfigError, Problem, RunError
from kd_recipes.parts import build
from kd_recipes.signals import Exact, SparseSignal
from kd_recipes.teachers.cache.content import Document, documents
from kd_recipes.teachers.limits import loss_problems, temperature_problems
from kd_recipes.teachers.online import OnlineTeacher
from kd_recipes.teachers.remote.client import Client, Request, Workers, redacted
from kd_recipes.teachers.remote.dialects import DIALECTS, Dialect
from kd_recipes.teachers.remote.rows import Rows, with_tail
from kd_recipes.teachers.teacher import CacheableSource, ProbedTeacher, Surroundings

MAX_K = 4096
_FIRST_WAIT_S = 15.0  # for a server before a run: what is not there then is more likely misspelt than restarted
_SECONDS_BETWEEN_LOOKS = 0.5
_PROBE_LENGTH = 32  # tokens of it that the teacher is known by again
_PROBE = """The year 1984 (a novel by G. Orwell) isn't over: "Qu'est-ce que c'est?", 3.14159 naïve cafés.

def square(x):
    return x ** 2  # Größe, Ελλάδα, 東京
"""


class RemoteTeacher(CacheableSource):
    """A teacher that a server runs: vLLM, or llama-cpp-python.

    Each document is asked about by itself, some batches before it is needed. A server that is restarted, or is
    busy, is asked again until it answers.

    Args:
        url: of the API, such as ``http://host:8000/v1``.
        model: by the name that the server has for it; None where it has one alone.
        k: likeliest ids of a position that are asked for; what all others have together is known, too.
        dialect: ``vllm`` or ``llama_cpp_python``.
        api_key_env: name of the environment variable with the key that the server wants.
        timeout_s: seconds that the server may be silent before and within an answer.
        max_wait_s: seconds that it may give none; no try begins after them, and the run ends.
        max_concurrency: questions that it is asked at a time, by each process.
        num_ahead: batches that are asked about before they are needed.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        k: int = 64,
        dialect: str = "vllm",
        api_key_env: str | None = None,
        timeout_s: float = 120.0,
        max_wait_s: float = 300.0,
        max_concurrency: int = 8,
        num_ahead: int = 4,
    ) -> None:
        self.url, self.model, self.k, self._dialect = url, model, k, dialect
        self._api_key_env, self._timeout_s, self._max_wait_s = api_key_env, timeout_s, max_wait_s
        self._max_concurrency, self._num_ahead = max_concurrency, num_ahead
        self._found: tuple[Client, Dialect] | None = None
        if problems := [*self._setting_problems()]:
            raise ConfigError(*problems)

    def _setting_problems(self) -> Iterator[Problem]:
        yield from _url_problems(self.url)
        if self._dialect not in DIALECTS:
            yield Problem(".dialect", self._dialect, f"one of {', '.join(DIALECTS)}")
        for name, value, least in (
            ("k", self.k, 1),
            ("max_concurrency", self._max_concurrency, 1),
            ("num_ahead", self._num_ahead, 0),
        ):
            if not isinstance(value, int) or not least <= value <= MAX_K:
                yield Problem(f".{name}", value, f"a whole number from {least} to {MAX_K}")
        for name, seconds in (("timeout_s", self._timeout_s), ("max_wait_s", self._max_wait_s)):
            if not 0 < seconds < float("inf"):
                yield Problem(f".{name}", seconds, "seconds, above 0")

    def problems(self, cfg: DictConfig) -> Iterator[Problem]:
        """What of the config it does not suit; that it does not answer, or has another tokenizer."""
        found = [*temperature_problems(cfg, 1.0, "at which servers tell probabilities"), *loss_problems(cfg)]
        found += _key_problems(self._api_key_env)
        yield from found
        if found:
            return
        tokenizer = build("tokenizer", cfg.tokenizer)
        try:
            self._connect(tokenizer)
        except ConfigError as error:
            yield from error.problems
        except RunError as error:
            yield Problem(".url", self.url, "a server that answers", str(error).removeprefix("remote teacher: "))

    def _connect(self, tokenizer: Any) -> tuple[Client, Dialect]:
        """Client and dialect, once the server has made the same ids of a text as the tokenizer does."""
        if self._found is None:
            settings = {"timeout_s": self._timeout_s, "max_wait_s": self._max_wait_s}
            key = os.environ[self._api_key_env].strip() if self._api_key_env else None
            client = Client(self.url, key=key, max_concurrency=self._max_concurrency, **settings)
            dialect = DIALECTS[self._dialect](self.model, self.k, tokenizer)

            def ask(request: Request) -> Any:
                return client.ask(request, min(self._max_wait_s, _FIRST_WAIT_S))

            here = tokenizer.encode(_PROBE, add_bos=False, add_eos=False)
            _compare(here, dialect.tokenize(_PROBE, ask), tokenizer)
            dialect.rows(tokenizer.encode(_PROBE, add_bos=True, add_eos=False)[:4], ask)  # or why it tells none
            self._found = client, dialect
        return self._found

    def describe(self) -> dict[str, Any]:
        """Its name; not where it is, which may change."""
        return {"_component_": "kd_recipes.teachers.RemoteTeacher", "model": self.model}

    def open(self, around: Surroundings) -> Remote:
        """The teacher, ready to be asked.

        Raises:
            ConfigError: its tokenizer is another one.
            RunError: it does not answer.
        """
        tokenizer: Any = around.tokenizer
        client, dialect = self._connect(tokenizer)
        if dialect.num_untold:
            print(
                f"remote teacher: {dialect.num_untold:,} ids have no text of their own in the server's answers; "
                "what it gives them counts with all others"
            )
        probe = tokenizer.encode(_PROBE, add_bos=True, add_eos=False)
        return Remote(
            client,
            dialect,
            Workers(self._max_concurrency),
            num_ids=around.num_ids,
            num_ahead=self._num_ahead,
            probe=probe[:_PROBE_LENGTH],
            look_up=around.look_up,
        )


def _url_problems(url: str) -> Iterator[Problem]:
    wanted = "an address such as http://host:8000/v1, without a key in it"
    try:
        parts = parse_url(url)
    except HTTPError:
        yield Problem(".url", "an address that cannot be read", wanted)
        return
    if parts.scheme not in ("http", "https") or not parts.host or parts.auth or parts.query or parts.fragment:
        remedy = "api_key_env names the environment variable with a key"
        yield Problem(".url", redacted(url), wanted, remedy)


def _key_problems(name: str | None) -> Iterator[Problem]:
    """Nothing of the value is shown, and not the name: it may be the key itself."""
    if name is None:
        return
    key = os.environ.get(name, "").strip() if name else ""
    if not key:
        remedy = "export it in the shell that starts the run; the key itself stands in no config"
        yield Problem(".api_key_env", "(not shown)", "the name of an environment variable that is set", remedy)
    elif not (key.isascii() and key.isprintable() and " " not in key):
        yield Problem(".api_key_env", name, "a variable with a key of one printable word")


def _compare(here: list[int], there: list[int], tokenizer: Any) -> None:
    """Refuse a server that makes other ids of a text.

    Raises:
        ConfigError: naming the first.
    """
    if here == there:
        return
    place = next((i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), min(len(here), len(there)))
    said = f"id {there[place]}" if place < len(there) else "nothing"
    ours = f"id {here[place]}, {tokenizer.decode([here[place]])!r}" if place < len(here) else "nothing"
    got = f"token {place} of a text is {said} for the server and {ours} for the tokenizer"
    remedy = "Distillation compares probabilities id by id: serve the model whose tokenizer this is, or use its own"
    raise ConfigError(Problem("tokenizer.path", got, "the tokenizer of the server's model", remedy))


class Remote(ProbedTeacher):
    """A server, asked about each document of a batch.

    Args:
        client: of the server.
        dialect: that it speaks.
        workers: that ask.
        num_ids: that student and teacher share.
        num_ahead: batches that are asked about before they are needed.
        probe: ids of a text that tells this teacher from others.
        look_up: called while an answer is waited for; raises where the run is to end.
    """

    def __init__(
        self,
        client: Client,
        dialect: Dialect,
        workers: Workers,
        *,
        num_ids: int,
        num_ahead: int,
        probe: list[int],
        look_up: Callable[[], None],
    ) -> None:
        self._client, self._dialect, self._workers, self._look_up = client, dialect, workers, look_up
        self._num_ids, self._num_ahead, self._probe = num_ids, num_ahead, probe
        # what is asked about a batch lives as long as the batch, and is shared by batches with the same document
        self._of_batch: WeakKeyDictionary[Batch, list[Future[Rows]]] = WeakKeyDictionary()
        self._of_key: WeakValueDictionary[bytes, Future[Rows]] = WeakValueDictionary()

    @property
    def online(self) -> OnlineTeacher | None:
        """None: no model is here."""
        return None

    @property
    def models(self) -> Sequence[TransformerDecoder]:
        """None are here."""
        return ()

    def ahead(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, each asked about while those before it are used."""
        waiting: deque[Batch] = deque()
        try:
            for batch in batches:
                self._ask(batch)
                waiting.append(batch)
                if len(waiting) > self._num_ahead:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:  # what nobody will use need not be asked
            for future in chain.from_iterable(self._of_batch.pop(batch, []) for batch in waiting):
                future.cancel()

    def signal(self, batch: Batch) -> SparseSignal:
        """What the teacher says of a batch; waits for it.

        Raises:
            RunError: the server refuses, or has been away too long.
        """
        futures = self._ask(batch)
        answers = [self._wait(future).first(self._num_ids) for future in futures]
        return self._signal(batch, documents(batch), answers).to(batch.tokens_BS.device)

    def _wait(self, future: Future[Rows]) -> Rows:
        while True:
            try:
                return future.result(timeout=_SECONDS_BETWEEN_LOOKS)
            except TimeoutError:
                if future.done():  # then it is the answer's own
                    raise
                self._look_up()

    def _ask(self, batch: Batch) -> list[Future[Rows]]:
        futures = self._of_batch.get(batch)
        if futures is None or any(future.cancelled() for future in futures):  # by a batch with the same document
            futures = self._of_batch[batch] = [self._submit(document) for document in documents(batch)]
        return futures

    def _submit(self, document: Document) -> Future[Rows]:
        key, ids = document.key, document.ids.tolist()
        future = self._of_key.get(key)
        if future is None or future.cancelled():
            future = self._workers.submit(lambda: self._dialect.rows(ids, self._client.ask))
            self._of_key[key] = future
        return future

    def probe(self) -> dict[str, list[float]]:
        """The likeliest ids after each token of a fixed text, and their log-probabilities."""
        rows = self._dialect.rows(self._probe, self._client.ask).first(self._num_ids)
        known = _known(*map(torch.from_numpy, (rows.ids_nK, rows.log_p_nK, rows.log_p_label_n)))
        log_p = [round(value, 4) for value in known.log_p_likeliest_T.tolist()]
        return {"likeliest": known.likeliest_T.tolist(), "log_p": log_p}

    def _signal(self, batch: Batch, found: list[Document], answers: list[Rows]) -> SparseSignal:
        """At all positions of the documents, whether they have a label or not."""
        num_tokens, width = batch.tokens_BS.numel(), self._dialect.width
        ids_TK = np.zeros((num_tokens, width), np.int64)
        log_p_TK = np.full((num_tokens, width), -np.inf, np.float32)
        log_tail_T, log_p_label_T = np.zeros(num_tokens, np.float32), np.full(num_tokens, np.nan, np.float32)
        for document, rows in zip(found, answers, strict=True):
            here = slice(document.start, document.start + len(rows.ids_nK))
            ids_TK[here] = rows.ids_nK
            log_p_TK[here], log_tail_T[here] = with_tail(rows.log_p_nK, self._num_ids)
            log_p_label_T[here] = rows.log_p_label_n
        named = torch.from_numpy(ids_TK), torch.from_numpy(log_p_TK)
        known = _known(*named, torch.from_numpy(log_p_label_T))
        return SparseSignal(*named, torch.from_numpy(log_tail_T), unsoftened=known)


def _known(ids_TK: Tensor, log_p_TK: Tensor, log_p_label_T: Tensor) -> Exact:
    highest_T, place_T = log_p_TK.max(-1)
    likeliest_T = ids_TK.gather(1, place_T.unsqueeze(1))[:, 0]
    return Exact(likeliest_T, highest_T, log_p_label_T, torch.full_like(highest_T, torch.nan))
