"""Write a finished student as the files that end devices load, and compare each with the student.

Each file is loaded by the program that it is for, in a process of its own, and asked the same prompts as the student:
logits, greedy text, speed, memory. The table is printed and written to ``output_dir`` as export.md and export.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from kd_recipes import __version__
from kd_recipes.compression import read_checkpoint, sections
from kd_recipes.compression.checkpoint import HFCheckpoint, companions, weight_files
from kd_recipes.config import Key, is_positive
from kd_recipes.errors import ConfigError, Problem, RunError, gather
from kd_recipes.exporting.formats import FORMATS, Format
from kd_recipes.exporting.probe import Answers, ProbeFailedError, Questions, ask, compare
from kd_recipes.exporting.record import Record, files_of
from kd_recipes.exporting.runtimes import Runtime, Student
from kd_recipes.storage import describe_files, explain_disk_errors
from kd_recipes.tokenizers import HFTokenizer, hf_tokenizer

PROMPTS = (
    "The Amazon rainforest is a moist broadleaf forest that covers most of the Amazon basin of South America. It is "
    "home to more than",
    "A prime number is a natural number greater than 1 that is not a product of two smaller natural numbers. For "
    "example, 5 is prime because",
    "To make bread, you need flour, water, salt and yeast. First, mix the flour and the salt in a large bowl. Then",
    "In 1969 the first people walked on the Moon. The mission was called Apollo 11, and its commander was",
    "def mean(values):\n    # The arithmetic mean of a list of numbers.\n    return",
    "Question: What is the capital of France, and on which river does it lie?\nAnswer:",
)
_HEAD = (
    *("", "size, MB", "KL", "largest difference", "agreement", "same texts", "same tokens"),
    *("load, s", "prefill, tokens/s", "decode, tokens/s", "peak, MB"),
)

KEYS = (
    Key("recipe", "str", wanted="`export`"),
    Key("checkpoint_dir", "path", required=True, wanted="the Hugging Face directory of the student"),
    Key("output_dir", "path", required=True, wanted="a directory for the files"),
    Key("formats", "list", required=True, wanted=f"some of {', '.join(FORMATS)}"),
    Key("prompts", "list", wanted="texts that student and files are asked; beginnings of six by default"),
    Key("num_new_tokens", "int", default=32, wanted="tokens of the greedy texts, above 1", check=lambda n: n > 1),
    Key("num_prompt_tokens", "int", default=128, wanted="tokens of the text whose reading is timed", check=is_positive),
    Key("max_seq_len", "int", default=2048, wanted="longest sequence of graphs and caches, above 0", check=is_positive),
)


def main(cfg: DictConfig) -> None:
    """Export ``cfg.checkpoint_dir`` in all of ``cfg.formats``.

    Raises:
        ConfigError: what cannot be written, and why; nothing has been then.
        RunError: a file that its program does not load, or that does not answer as the student does.
    """
    output_dir = Path(cfg.output_dir)
    source, tokenizer, formats, _ = gather(
        lambda: read_checkpoint(Path(cfg.checkpoint_dir)),
        lambda: hf_tokenizer(str(cfg.checkpoint_dir)),
        lambda: _formats(cfg.formats),
        lambda: sections(Path(cfg.checkpoint_dir)),  # whether it is a model that there is a builder for
    )
    problems = {str(problem): problem for form in formats for problem in form.problems(source)}
    if problems:  # the same tokenizer's is one, of however many formats
        raise ConfigError(*problems.values())
    max_seq_len = min(int(cfg.max_seq_len), int(source.config["max_position_embeddings"]))
    questions = _questions(cfg, tokenizer, max_seq_len)
    record = Record.read(output_dir, _made_of(source, max_seq_len), asdict(questions))
    ask_student = cache(lambda: _ask(Student, source.directory, questions, "student"))
    with explain_disk_errors(output_dir):
        record.settle()
        for form in (progress := tqdm(formats, "export", unit="format")):
            progress.set_postfix_str(form.name)
            path = output_dir / form.path
            if not record.holds(form):
                form.write(source, record.make_room(form), max_seq_len)
                record.add(form)
            if form.name not in record.results:
                answers = _ask(form.runtime, path, questions, form.name)
                alike = compare(ask_student(), answers, tokenizer.vocab_size)
                num_bytes = {"num_bytes": source.num_bytes}  # without the adapters that may lie beside
                student = {**_cost(source.directory, ask_student()), **num_bytes}
                record.measure(form, {**asdict(alike), **_cost(path, answers)}, student)
        table = _table(record.results)
        record.finish(table)
    print(table)
    _require_alike(record.results, source)


def _made_of(source: HFCheckpoint, max_seq_len: int) -> dict[str, Any]:
    directory = source.directory  # known by its content: a copy of it is the same student
    files = [directory / "config.json", *weight_files(directory), *companions(directory)]
    digests = {name: described["sha256"] for name, described in describe_files(directory, files).items()}
    return {"version": __version__, "student": digests, "max_seq_len": max_seq_len}


def _questions(cfg: DictConfig, tokenizer: HFTokenizer, max_seq_len: int) -> Questions:
    texts, num_new = [str(text) for text in cfg.prompts or PROMPTS], int(cfg.num_new_tokens)
    prompts = [tokenizer.encode(text, add_eos=False) for text in texts]
    longest = max(map(len, prompts)) + num_new
    if not all(prompts) or longest > max_seq_len:
        wanted = f"texts of one token or more, which with num_new_tokens are at most {max_seq_len}"
        raise ConfigError(Problem("prompts", f"{min(map(len, prompts))} to {longest - num_new} tokens", wanted))
    num_long = min(int(cfg.num_prompt_tokens), max_seq_len - num_new)
    long_prompt = list(islice(cycle(chain.from_iterable(prompts)), num_long))
    return Questions(texts, prompts, long_prompt, num_new, torch.get_num_threads())


def _formats(names: Sequence[str]) -> list[Format]:
    problems = [Problem("formats", name, f"some of {', '.join(FORMATS)}") for name in names if name not in FORMATS]
    if problems or not names:
        raise ConfigError(*problems or [Problem("formats", [], f"some of {', '.join(FORMATS)}")])
    return [FORMATS[name] for name in names]


def _ask(runtime: type[Runtime], path: Path, questions: Questions, name: str) -> Answers:
    try:
        return ask(runtime, path, questions)
    except ProbeFailedError as error:
        raise RunError(f"{name}: {path} cannot be loaded by the program it is for: {error}") from error


def _cost(path: Path, answers: Answers) -> dict[str, Any]:
    names = ("load_seconds", "prefill_tokens_per_second", "decode_tokens_per_second", "peak_memory_bytes")
    num_bytes = sum(file.stat().st_size for file in files_of(path))
    return {"num_bytes": num_bytes, **{name: getattr(answers, name) for name in names}}


def _table(done: Mapping[str, Any]) -> str:
    return "\n".join(["| " + " | ".join(_HEAD) + " |", "|---" + "|---:" * (len(_HEAD) - 1) + "|", *_rows(done)])


def _rows(done: Mapping[str, Any]) -> Iterator[str]:
    """Speeds are tokens a second, and in brackets how many times the student's."""
    reference = done["student"]
    for name, found in sorted(done.items(), key=lambda item: item[0] != "student"):
        speeds = [
            f"{found[key]:.1f} ({found[key] / reference[key]:.2f})"
            for key in ("prefill_tokens_per_second", "decode_tokens_per_second")
        ]
        alike = [""] * 5
        if "kl" in found:
            texts = f"{found['same_continuations']} of {found['num_continuations']}"
            tokens = {True: "yes", False: "NO", None: ""}[found["same_tokens"]]
            alike = [f"{found['kl']:.2g}", f"{found['max_difference']:.2g}", f"{found['agreement']:.1%}", texts, tokens]
        size, peak = (f"{found[key] / 1e6:.0f}" for key in ("num_bytes", "peak_memory_bytes"))
        yield "| " + " | ".join([name, size, *alike, f"{found['load_seconds']:.1f}", *speeds, peak]) + " |"


def _require_alike(done: Mapping[str, Any], source: HFCheckpoint) -> None:
    """Raise a RunError where a file is not the student's."""
    files = {name: (FORMATS[name].most_kl(source), found) for name, found in done.items() if name in FORMATS}
    wrong = [
        f"{name} (KL {found['kl']:.2g}, limit {most})"
        for name, (most, found) in files.items()
        if not found["kl"] < most
    ]
    remedy = "What is removed is written again by the next run"
    if wrong:
        what = "these are further from the student than their numbers can be, and do not answer as it does"
        raise RunError(f"{what}: {', '.join(wrong)}. {remedy}")
    if others := [name for name, (_, found) in files.items() if found["same_tokens"] is False]:
        raise RunError(f"the tokenizers in these make other tokens of the prompts: {', '.join(others)}. {remedy}")


if __name__ == "__main__":
    from kd_recipes.entry import run_recipe

    raise SystemExit(run_recipe("export"))
