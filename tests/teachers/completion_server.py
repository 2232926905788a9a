"""A server that speaks vLLM's protocol for prompts, with a llama behind it: real answers of a process of its own.

The model is written here in numpy, so that the server starts at once and shares no code with what it is asked by.

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

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

Floats = NDArray[np.float32]


class Model:
    """A llama checkpoint in the Hugging Face format, one question at a time."""

    def __init__(self, checkpoint: Path) -> None:
        self._config = json.loads((checkpoint / "config.json").read_text())
        self.max_length = int(self._config["max_position_embeddings"])
        self._weights = _read(checkpoint / "model.safetensors")
        self._tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        self._lock = threading.Lock()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens around them."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def log_probabilities(self, ids: list[int]) -> Floats:
        """After each token ``[S, V]``."""
        w = self._weights
        x_SD = w["model.embed_tokens.weight"][ids]
        for layer in range(self._config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            x_SD = x_SD + self._attend(self._norm(x_SD, f"{name}.input_layernorm"), f"{name}.self_attn")
            y_SD = self._norm(x_SD, f"{name}.post_attention_layernorm")
            gate = y_SD @ w[f"{name}.mlp.gate_proj.weight"].T
            up = y_SD @ w[f"{name}.mlp.up_proj.weight"].T
            x_SD = x_SD + (gate / (1 + np.exp(-gate)) * up) @ w[f"{name}.mlp.down_proj.weight"].T
        head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
        z_SV = self._norm(x_SD, "model.norm") @ head.T
        z_SV = z_SV - z_SV.max(-1, keepdims=True)
        log_p_SV: Floats = z_SV - np.log(np.exp(z_SV).sum(-1, keepdims=True))
        return log_p_SV

    def _norm(self, x_SD: Floats, name: str) -> Floats:
        scale = np.sqrt((x_SD**2).mean(-1, keepdims=True) + self._config["rms_norm_eps"])
        normed: Floats = x_SD / scale * self._weights[f"{name}.weight"]
        return normed

    def _attend(self, x_SD: Floats, name: str) -> Floats:
        num_heads, num_kv_heads = self._config["num_attention_heads"], self._config["num_key_value_heads"]
        length = len(x_SD)
        q, k, v = (
            (x_SD @ self._weights[f"{name}.{part}_proj.weight"].T).reshape(length, heads, -1).swapaxes(0, 1)
            for part, heads in (("q", num_heads), ("k", num_kv_heads), ("v", num_kv_heads))
        )
        q, k = self._rotate(q), self._rotate(k)
        k, v = (np.repeat(part, num_heads // num_kv_heads, 0) for part in (k, v))
        scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
        scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (p / p.sum(-1, keepdims=True)) @ v
        out: Floats = mixed.swapaxes(0, 1).reshape(length, -1) @ self._weights[f"{name}.o_proj.weight"].T
        return out

    def _rotate(self, x_HSD: Floats) -> Floats:
        half = x_HSD.shape[-1] // 2
        base = self._config.get("rope_theta") or self._config["rope_parameters"]["rope_theta"]
        angles = np.outer(np.arange(x_HSD.shape[1]), base ** -(np.arange(half) / half)).astype(np.float32)
        first, second = x_HSD[..., :half], x_HSD[..., half:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate((first * cos - second * sin, second * cos + first * sin), -1)

    def prompt_logprobs(self, ids: list[int], k: int) -> list[dict[str, Any] | None]:
        """As vLLM's: None for the first token; of each other one, its own and the k likeliest in its place."""
        with self._lock:
            log_p_SV = self.log_probabilities(ids)
        entries: list[dict[str, Any] | None] = [None]
        for own, log_p_V in zip(ids[1:], log_p_SV, strict=False):
            likeliest = np.argpartition(-log_p_V, min(k, len(log_p_V) - 1))[:k].tolist()
            ranks = {i: int((log_p_V > log_p_V[i]).sum()) + 1 for i in dict.fromkeys([own, *likeliest])}
            entries.append({str(i): {"logprob": float(log_p_V[i]), "rank": rank} for i, rank in ranks.items()})
        return entries


def _read(file: Path) -> dict[str, Floats]:
    """The tensors of a safetensors file in float32 or bf16, which numpy does not have."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    tensors = {}
    for name, spec in json.loads(content[8:start]).items():
        if name != "__metadata__":
            first, last = (start + offset for offset in spec["data_offsets"])
            if spec["dtype"] == "BF16":
                values = (np.frombuffer(content[first:last], "<u2").astype(np.uint32) << 16).view(np.float32)
            else:
                assert spec["dtype"] == "F32"
                values = np.frombuffer(content[first:last], "<f4")
            tensors[name] = values.reshape(spec["shape"])
    return tensors


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
        if not isinstance(question["prompt"], str) and len(question["prompt"]) > self.model.max_length:
            return self._send(400, {"error": {"message": f"maximum context length is {self.model.max_length} tokens"}})
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
    Handler.model, Handler.log, Handler.faults = Model(Path(checkpoint)), Path(log), json.loads(faults)
    ThreadingHTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
