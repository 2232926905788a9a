"""Questions to a server over HTTP that outlast a restart of it, and tell nobody the key that they carry."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from queue import SimpleQueue
from typing import Any, TypeVar

import urllib3
from tqdm import tqdm
from urllib3.exceptions import HTTPError
from urllib3.util import Timeout, parse_url

from kd_recipes.errors import RunError, TeacherAwayError, one_line

T = TypeVar("T")
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.5, 20.0
_CONNECT_S = 10.0
_PASSING = {408, 425, 429, 500, 502, 503, 504}  # of a server that may answer the same question later
_HINTS = {
    401: "api_key_env names the environment variable that holds the key",
    403: "api_key_env names the environment variable that holds the key",
    404: "Look at url, which ends in /v1, and model",
}
_SHOWN = 300  # characters of a server's own words


@dataclass(frozen=True)
class Request:
    """A question.

    Args:
        path: below the address of the API; one that begins with a slash, below that of the server.
        content: of the JSON body.
    """

    path: str
    content: Mapping[str, Any]


class _PassingError(Exception):
    """Why a question has no answer yet.

    Args:
        reason: in words.
        delay_s: that the server asks for.
    """

    def __init__(self, reason: str, delay_s: float = 0.0) -> None:
        super().__init__(reason)
        self.delay_s = delay_s


class Client:
    """A connection pool to one server.

    Args:
        url: of the API, such as ``http://host:8000/v1``.
        key: that it wants; None for none. It stands in no message.
        timeout_s: that it may be silent before and within an answer.
        max_wait_s: that it may be away: no try begins after them.
        max_concurrency: questions at a time.
    """

    def __init__(self, url: str, *, key: str | None, timeout_s: float, max_wait_s: float, max_concurrency: int) -> None:
        self.url = url.rstrip("/")
        self._key, self._max_wait_s, self._timeout_s = key, max_wait_s, timeout_s
        self._headers = {"Content-Type": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        # no retries of urllib3's: they count tries, and a restart takes time; no redirects: the key stays here
        timeout = Timeout(connect=min(timeout_s, _CONNECT_S), read=timeout_s)
        self._pool = urllib3.PoolManager(maxsize=max_concurrency, retries=False, timeout=timeout)
        self._is_away, self._lock = False, threading.Lock()

    def ask(self, request: Request, max_wait_s: float | None = None) -> Any:
        """The answer's JSON; waits for a server that is away, longer from time to time, and each client differently.

        Args:
            request: the question.
            max_wait_s: instead of the client's own.

        Raises:
            RunError: the server refuses.
            TeacherAwayError: it has been away too long.
        """
        limit = self._max_wait_s if max_wait_s is None else max_wait_s
        begun = time.monotonic()
        for number in count():
            try:
                answer = self._try(request)
            except _PassingError as error:
                delay = min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2**number) * random.uniform(0.5, 1.0)
                delay = max(delay, error.delay_s)
                if time.monotonic() - begun + delay > limit:
                    seconds = time.monotonic() - begun
                    raise TeacherAwayError(self._given_up(request, number + 1, seconds, error)) from error
                self._tell(f"{error}; asking again for up to {limit:.0f} s (max_wait_s)", is_away=True)
                time.sleep(delay)
            else:
                self._tell("it answers again", is_away=False)
                return answer
        raise AssertionError

    def _try(self, request: Request) -> Any:
        url = f"{self._root}{request.path}" if request.path.startswith("/") else f"{self.url}/{request.path}"
        body = json.dumps(request.content).encode()
        try:
            response = self._pool.request("POST", url, body=body, headers=self._headers, redirect=False)
            status, data = response.status, response.data
        except HTTPError as error:
            raise _PassingError(self._clean(_why(error))) from None  # its cause names the headers' object
        if status == 200:
            try:
                return json.loads(data)
            except ValueError as error:  # cut off on the way
                raise _PassingError("it answers what is no JSON") from error
        words = self._clean(" ".join(data[: 4 * _SHOWN].decode(errors="replace").split())[:_SHOWN])
        if status in _PASSING:
            delay = response.headers.get("Retry-After", "")
            raise _PassingError(f"it answers {status}: {words}", float(delay) if delay.isdecimal() else 0.0)
        hint = f". {_HINTS[status]}" if status in _HINTS else ""
        raise RunError(f"remote teacher: {self._clean(url)} answers {status}: {words}{hint}")

    @property
    def _root(self) -> str:
        return self.url.removesuffix("/v1")

    def _given_up(self, request: Request, tries: int, seconds: float, error: Exception) -> str:
        return (
            f"remote teacher: {self.url} gave no answer to {request.path} in {seconds:.0f} s (max_wait_s) and {tries} "
            f"tries, each given up after {self._timeout_s:.0f} s of silence (timeout_s); the last: {error}. Start it "
            "again; a run goes on from its last checkpoint with resume_from_checkpoint=True"
        )

    def _tell(self, text: str, *, is_away: bool) -> None:
        """Once when the server goes, and once when it is back, whoever of the threads sees it."""
        if is_away == self._is_away:
            return
        with self._lock:
            if is_away != self._is_away:
                self._is_away = is_away
                tqdm.write(f"remote teacher {self.url}: {text}")

    def _clean(self, text: str) -> str:
        """Without the key, which some servers repeat in what they refuse."""
        return text.replace(self._key, "(the key)") if self._key else text


def _why(error: HTTPError) -> str:
    """The innermost reason, without the objects that urllib3 names in front of it."""
    inner = getattr(error, "reason", None)
    return one_line(inner if isinstance(inner, Exception) else error).rpartition(">: ")[2]


def redacted(url: str) -> str:
    """An address without what may be secret in it: a user's name and password, and what stands behind ``?``."""
    try:
        parts = parse_url(url)
    except HTTPError:
        return "an address that cannot be read"
    secret = {"auth": None, "query": None, "fragment": None}
    return parts._replace(**secret).url + (" with more in it" if any(getattr(parts, name) for name in secret) else "")


class Workers:
    """Threads that do what they are given, in that order; none of them keeps the program from ending.

    Args:
        count: threads.
    """

    def __init__(self, count: int) -> None:
        self._queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        for index in range(count):
            threading.Thread(target=self._work, name=f"remote teacher {index}", daemon=True).start()

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """What it returns, some time."""
        future: Future[T] = Future()
        self._queue.put((future, function))
        return future

    def _work(self) -> None:
        while True:
            future, function = self._queue.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except BaseException as error:  # raised again where the result is asked for
                future.set_exception(error)
            del future, function  # or the last answer would live until the next question
