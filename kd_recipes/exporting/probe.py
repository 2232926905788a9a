"""A file at work, in a process of its own: what it answers, how fast, and in how much memory."""

# S positions of a prompt, V vocabulary

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
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
        encodings: the ids of each prompt's text by the file's own tokenizer; None where it has none.
        continuations: the greedy ids after each.
        load_seconds: until it could be asked, without importing the program.
        prefill_tokens_per_second: of a long text.
        decode_tokens_per_second: after it.
        peak_memory_bytes: of the process above what the imported program takes.
    """

    logits: list[Logits]
    encodings: list[list[int]] | None
    continuations: list[list[int]]
    load_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Questions:
    """What student and files are asked.

    Args:
        texts: of the prompts.
        prompts: their ids.
        long_prompt: ids of a text whose reading is timed, and what follows it.
        num_new: tokens of a continuation.
        num_threads: that each program computes with.
    """

    texts: list[str]
    prompts: list[list[int]]
    long_prompt: list[int]
    num_new: int
    num_threads: int


@dataclass(frozen=True)
class Likeness:
    """How near a file is to the student.

    Args:
        max_difference: of logits that are not far below the likeliest.
        kl: KL(student || file), nats a token, mean.
        agreement: share of positions with the same likeliest id.
        same_continuations: how many of the greedy continuations are the same from end to end.
        num_continuations: of how many.
        same_tokens: whether its tokenizer makes the same ids of the prompts; None where it has none.
    """

    max_difference: float
    kl: float
    agreement: float
    same_continuations: int
    num_continuations: int
    same_tokens: bool | None


class ProbeFailedError(RuntimeError):
    """The program could not load the file, or not compute with it."""


def ask(runtime: type[Runtime], path: Path, questions: Questions) -> Answers:
    """Load a file in a new process, and ask it.

    Raises:
        ProbeFailedError: with the last lines of what the process has said.
    """
    with TemporaryDirectory() as directory:
        task = {"runtime": runtime.__name__, "path": str(path.absolute()), "questions": asdict(questions)}
        Path(directory, "task.json").write_text(json.dumps(task), encoding="utf-8")
        command = [sys.executable, "-m", "kd_recipes.exporting.probe", directory]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ProbeFailedError("\n".join(done.stderr.strip().splitlines()[-4:]) or f"status {done.returncode}")
        found = json.loads(Path(directory, "answers.json").read_text(encoding="utf-8"))
        logits = [np.load(Path(directory, f"{index}.npy")) for index in range(len(questions.prompts))]
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
        same_tokens=None if file.encodings is None else file.encodings == student.encodings,
    )


def _log_softmax(logits_SV: Logits) -> np.ndarray:
    shifted_SV = logits_SV.astype(np.float64) - logits_SV.max(-1, keepdims=True)
    found: np.ndarray = shifted_SV - np.log(np.exp(shifted_SV).sum(-1, keepdims=True))
    return found


def main(directory: Path) -> None:
    """What :func:`ask` starts."""
    from kd_recipes.exporting import runtimes

    task = json.loads((directory / "task.json").read_text(encoding="utf-8"))
    questions = Questions(**task["questions"])
    kind = getattr(runtimes, task["runtime"])
    kind.prepare()
    _forget_peak()
    before, start = _peak_bytes(), time.perf_counter()
    longest = max(map(len, [*questions.prompts, questions.long_prompt]))
    runtime = kind(Path(task["path"]), longest + questions.num_new, questions.num_threads)
    loaded = time.perf_counter() - start
    prefill, decode = _speeds(runtime, questions)
    peak = _peak_bytes() - before
    continuations = [list(islice(runtime.greedy(prompt), questions.num_new)) for prompt in questions.prompts]
    for index, prompt in enumerate(questions.prompts):
        np.save(directory / f"{index}.npy", runtime.logits(prompt))
    encodings = [runtime.encode(text) for text in questions.texts]
    answers = Answers([], None if None in encodings else encodings, continuations, loaded, prefill, decode, peak)
    found = {name: value for name, value in asdict(answers).items() if name != "logits"}
    (directory / "answers.json").write_text(json.dumps(found), encoding="utf-8")


def _speeds(runtime: Runtime, questions: Questions) -> tuple[float, float]:
    """Tokens a second of reading and of writing, after a short run that warms up."""
    next(runtime.greedy(questions.prompts[0]))
    prefills, decodes = [], []
    for _ in range(runtime.num_timings):
        start = time.perf_counter()
        new: Iterator[int] = runtime.greedy(questions.long_prompt)
        next(new)
        prefills.append(time.perf_counter() - start)
        start = time.perf_counter()
        for _ in islice(new, questions.num_new - 1):
            pass
        decodes.append(time.perf_counter() - start)
    return len(questions.long_prompt) / min(prefills), (questions.num_new - 1) / min(decodes)


def _peak_bytes() -> int:
    """The most memory that this process has had."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage's peak begins with that of the process that started this one
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _forget_peak() -> None:
    """Let the peak begin with what this process has now, where the system can do that."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
