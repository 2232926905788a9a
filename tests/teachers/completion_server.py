"""A server that speaks vLLM's protocol for prompts, with a toy model behind it: real answers of a process of its own.

    python completion_server.py PORT CHECKPOINT LOG [FAULTS as JSON]

Every question is a line of LOG: its number, and the ids that it was about. Faults by the number of a question, from 0:
``{"500": [3], "hang": [4], "429": [5], "cut": [6]}``; ``"nap"``: seconds that each takes; ``"max_logprobs"`` and
``"key"``, as vLLM's own settings; ``"shift"``: added to every id of a text, as another tokenizer would.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from toy import MAX_SEQ_LEN, load_sections


class Model:
    """A toy checkpoint, one question at a time."""

    def __init__(self, checkpoint: Path) -> None:
        self._model = load_sections(checkpoint)
        self._tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        self._lock = threading.Lock()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens around them."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def prompt_logprobs(self, ids: list[int], k: int) -> list[dict[str, Any] | None]:
        """As vLLM's: None for the first token; of each other one, its own and the k likeliest in its place."""
        with self._lock, torch.no_grad():
            log_p_nV = self._model(torch.tensor([ids]))[0, :-1].float().log_softmax(-1)
        entries: list[dict[str, Any] | None] = [None]
        for own, log_p_V in zip(ids[1:], log_p_nV, strict=True):
            wanted = dict.fromkeys([own, *log_p_V.topk(min(k, len(log_p_V))).indices.tolist()])
            ranks = {i: int((log_p_V > log_p_V[i]).sum()) + 1 for i in wanted}
            entries.append({str(i): {"logprob": float(log_p_V[i]), "rank": ranks[i]} for i in wanted})
        return entries


class Handler(BaseHTTPRequestHandler):
    """One question."""

    protocol_version = "HTTP/1.1"
    model: Model
    log: Path
    faults: dict[str, Any]
    count = 0
    lock = threading.Lock()

    def do_POST(self) -> None:
        """Answer it, or do what the faults say."""
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with Handler.lock:
            number, Handler.count = Handler.count, Handler.count + 1
            with self.log.open("a") as file:
                file.write(json.dumps([number, question["prompt"]]) + "\n")
        time.sleep(self.faults.get("nap", 0))
        if number in self.faults.get("hang", []):
            time.sleep(60)
        for status in (429, 500):
            if number in self.faults.get(str(status), []):
                return self._send(status, {"error": {"message": "not now"}})
        if (key := self.faults.get("key")) and self.headers.get("Authorization") != f"Bearer {key}":
            return self._send(401, {"error": {"message": f"wrong key: {self.headers.get('Authorization')}"}})
        if question.get("prompt_logprobs", 0) > self.faults.get("max_logprobs", 20):
            message = f"Requested prompt logprobs of {question['prompt_logprobs']}, which is greater than allowed"
            return self._send(400, {"error": {"message": message}})
        if not isinstance(question["prompt"], str) and len(question["prompt"]) > MAX_SEQ_LEN:
            return self._send(400, {"error": {"message": f"maximum context length is {MAX_SEQ_LEN} tokens"}})
        return self._send(200, self._complete(question), is_cut=number in self.faults.get("cut", []))

    def _complete(self, question: dict[str, Any]) -> dict[str, Any]:
        prompt = question["prompt"]
        ids = self.model.encode(prompt) if isinstance(prompt, str) else prompt
        choice: dict[str, Any] = {"index": 0, "text": "", "prompt_logprobs": None}
        if question.get("return_token_ids"):
            choice["prompt_token_ids"] = [index + self.faults.get("shift", 0) for index in ids]
        if "prompt_logprobs" in question:
            choice["prompt_logprobs"] = self.model.prompt_logprobs(ids, question["prompt_logprobs"])
        return {"object": "text_completion", "choices": [choice], "usage": {"prompt_tokens": len(ids)}}

    def _send(self, status: int, content: Any, *, is_cut: bool = False) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if is_cut else body)
        self.close_connection = is_cut

    def log_message(self, *_: Any) -> None:
        """Nothing: the log is written above."""


def main(port: str, checkpoint: str, log: str, faults: str = "{}") -> None:
    """Serve until killed."""
    torch.set_num_threads(1)
    Handler.model, Handler.log, Handler.faults = Model(Path(checkpoint)), Path(log), json.loads(faults)
    ThreadingHTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
