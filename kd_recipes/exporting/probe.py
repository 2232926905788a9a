"""A file at work, in a process of its own: what it answers, how fast, and in how much memory."""

# S positions of a prompt, V vocabulary

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from kd_recipes.exporting.runtimes import Logits, Runtime


@dataclass(frozen=True)
class Answers:
    """What a loaded file says of some prompts.

    Args:
        logits: of each prompt, ``[S, V]``.
        continuations: the greedy ids after each.
        load_seconds: until it could be asked, without importing the program.
        prefill_tokens_per_second: of the longest prompt.
        decode_tokens_per_second: after it.
        peak_memory_bytes: of the process above what the imported program takes.
    """

    logits: list[Logits]
    continuations: list[list[int]]
    load_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Likeness:
    """How near a file is to the student.

    Args:
        max_difference: of logits that are not far below the likeliest.
        kl: KL(student || file), nats a token, mean.
        agreement: share of positions with the same likeliest id.
        same_continuations: how many of the greedy continuations are the same from end to end.
        num_continuations: of how many.
    """

    max_difference: float
    kl: float
    agreement: float
    same_continuations: int
    num_continuations: int


class ProbeFailedError(RuntimeError):
    """The program could not load the file, or not compute with it."""


def ask(runtime: type[Runtime], path: Path, prompts: Sequence[Sequence[int]], num_new: int) -> Answers:
    """Load a file in a new process, and ask it.

    Raises:
        ProbeFailedError: with the last lines of what the process has said.
    """
    with TemporaryDirectory() as directory:
        task = {
            "runtime": runtime.__name__,
            "path": str(path.absolute()),
            "prompts": prompts,
            "num_new": num_new,
        }
        Path(directory, "task.json").write_text(json.dumps(task), encoding="utf-8")
        command = [sys.executable, "-m", "kd_recipes.exporting.probe", directory]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ProbeFailedError("\n".join(done.stderr.strip().splitlines()[-4:]))
        found = json.loads(Path(directory, "answers.json").read_text(encoding="utf-8"))
        logits = [np.load(Path(directory, f"{index}.npy")) for index in range(len(prompts))]
    return Answers(logits=logits, **found)


def compare(student: Answers, file: Answers, num_ids: int) -> Likeness:
    """A file beside the student that it was made of, on the same prompts.

    Args:
        student: in float32.
        file: the other.
        num_ids: ids that count; those beyond are padding.
    """
    differences, kls, agreements = [], [], []
    for p, q in zip(student.logits, file.logits, strict=True):
        log_p_SV, log_q_SV = _log_softmax(p[:, :num_ids]), _log_softmax(q[:, :num_ids])
        differences.append(np.abs(log_p_SV - log_q_SV)[log_p_SV > np.log(1e-4)].max())
        kls.append((np.exp(log_p_SV) * (log_p_SV - log_q_SV)).sum(-1))
        agreements.append(log_p_SV.argmax(-1) == log_q_SV.argmax(-1))
    pairs = zip(student.continuations, file.continuations, strict=True)
    return Likeness(
        max_difference=float(max(differences)),
        kl=float(np.concatenate(kls).mean()),
        agreement=float(np.concatenate(agreements).mean()),
        same_continuations=sum(mine == theirs for mine, theirs in pairs),
        num_continuations=len(student.continuations),
    )


def _log_softmax(logits_SV: Logits) -> np.ndarray:
    shifted_SV = logits_SV.astype(np.float64) - logits_SV.max(-1, keepdims=True)
    found: np.ndarray = shifted_SV - np.log(np.exp(shifted_SV).sum(-1, keepdims=True))
    return found


def main(directory: Path) -> None:
    """What :func:`ask` starts."""
    from kd_recipes.exporting import runtimes

    task = json.loads((directory / "task.json").read_text(encoding="utf-8"))
    prompts, num_new = task["prompts"], task["num_new"]
    kind = getattr(runtimes, task["runtime"])
    kind.prepare()
    before, start = _peak_bytes(), time.perf_counter()
    runtime = kind(Path(task["path"]), max(map(len, prompts)) + num_new)
    loaded = time.perf_counter() - start
    continuations = [list(islice(runtime.greedy(prompt), num_new)) for prompt in prompts]
    prefill, decode = _speeds(runtime, max(prompts, key=len), num_new)
    peak = _peak_bytes() - before
    for index, prompt in enumerate(prompts):
        np.save(directory / f"{index}.npy", runtime.logits(prompt))
    answers = Answers([], continuations, loaded, prefill, decode, peak)
    found = {name: value for name, value in asdict(answers).items() if name != "logits"}
    (directory / "answers.json").write_text(json.dumps(found), encoding="utf-8")


def _speeds(runtime: Runtime, prompt: Sequence[int], num_new: int) -> tuple[float, float]:
    prefills, decodes = [], []
    for _ in range(runtime.num_timings):
        start = time.perf_counter()
        new: Iterator[int] = runtime.greedy(prompt)
        next(new)
        prefills.append(time.perf_counter() - start)
        start = time.perf_counter()
        for _ in islice(new, num_new - 1):
            pass
        decodes.append(time.perf_counter() - start)
    return len(prompt) / min(prefills), (num_new - 1) / min(decodes)


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main(Path(sys.argv[1]))
