"""`kd-recipes chat` through a pipe and in a terminal."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torchtune.data import Message

from kd_recipes.compression import read_checkpoint
from kd_recipes.config import load_and_validate
from kd_recipes.conversation import session
from kd_recipes.conversation.partner import Partner, short_names
from kd_recipes.conversation.sampling import Sampling
from kd_recipes.errors import ConfigError
from kd_recipes.evaluation.generation import generate, text_of
from kd_recipes.exporting.gguf import write_gguf
from kd_recipes.tokenizers import HFTokenizer, hf_tokenizer
from toy import Toys, load_sections

CHAT = [sys.executable, "-m", "kd_recipes.cli", "chat"]
GREEDY = ["--temperature", "0", "--max-new-tokens", "12", "--dtype", "fp32", "--device", "cpu"]
QUESTIONS = ["the cat sat", "on a mat"]


def _piped(*words: str, text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CHAT, *words], input=text, capture_output=True, text=True, check=False, timeout=240)


def _visible(text: str) -> str:
    return "".join(char for char in text if char.isprintable() or char in "\n\t")


def _answers(directory: Path, questions: list[str]) -> list[str]:
    """What a model says greedily, with all that was said before, by the code that evaluates."""
    model, tokenizer = load_sections(directory), hf_tokenizer(str(directory))
    messages: list[Message] = []
    found = []
    for question in questions:
        messages.append(Message(role="user", content=question))
        prompt = tokenizer.tokenize_prompt(messages)
        stops = tokenizer.stop_tokens
        ids = generate(model, [prompt], max_new_tokens=12, stop_ids=stops)[0].ids
        found.append(_visible(text_of(tokenizer, ids)))
        messages.append(Message(role="assistant", content=found[-1]))
    return found


def test_a_pipe_says_what_generation_says_with_all_that_was_said(toys: Toys) -> None:
    text = "\n".join([*QUESTIONS, "/reset", QUESTIONS[0], "/nothing", "/help", "/quit", "never read"])
    said = _piped(str(toys.teacher), str(toys.student), *GREEDY, text=text)
    assert said.returncode == 0, said.stderr
    expected = ""
    both = {"teacher": _answers(toys.teacher, QUESTIONS), "student": _answers(toys.student, QUESTIONS)}
    for index, question in enumerate([*QUESTIONS, QUESTIONS[0]]):
        expected += f"> {question}\n" if index < 2 else f"> /reset\n> {question}\n"
        expected += "".join(f"{name}:\n{answers[index % 2]}\n\n" for name, answers in both.items())
    assert said.stdout.startswith(expected)
    assert "/nothing is no command" in said.stdout
    assert "never read" not in said.stdout


def test_a_config_brings_its_teacher_and_its_best_student(
    write_config: Callable[..., Path], toys: Toys, tmp_path: Path
) -> None:
    config = str(write_config(tmp_path))
    said = _piped("--config", config, "batch_size=1", text="hi\n")
    assert said.returncode == 2
    assert "wanted the directory of a run, with best/ or final/ in it" in said.stderr
    shutil.copytree(toys.student, tmp_path / "run" / "best")
    said = _piped("--config", config, "batch_size=1", *GREEDY, text="the cat sat\n")
    assert said.returncode == 0, said.stderr
    assert f"teacher:\n{_answers(toys.teacher, QUESTIONS)[0]}\n" in said.stdout
    assert f"best:\n{_answers(toys.student, QUESTIONS)[0]}\n" in said.stdout


def test_a_gguf_file_says_what_its_model_says(toys: Toys, tmp_path: Path) -> None:
    write_gguf(read_checkpoint(toys.teacher), tmp_path / "teacher.gguf", "f32")
    said = _piped(str(tmp_path / "teacher.gguf"), *GREEDY, text="the cat sat\n")
    assert said.returncode == 0, said.stderr
    assert f"teacher.gguf:\n{_answers(toys.teacher, QUESTIONS)[0]}\n" in said.stdout


def test_all_are_looked_at_before_one_is_loaded(
    write_config: Callable[..., Path], toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(toys.student, tmp_path / "run" / "best")
    (tmp_path / "run" / "best" / "tokenizer.json").unlink()
    monkeypatch.setattr(session, "load_model", None)
    cfg = load_and_validate(str(write_config(tmp_path)), [], "distill")
    with pytest.raises(ConfigError, match=r"best', wanted a directory with config.json and tokenizer.json"):
        session.converse([], cfg, session.Settings(Sampling(0.0, 1.0, 12, 0), dtype="fp32"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "CHECKPOINT: got None, wanted a model's directory, a .gguf file, or --config FILE"),
        (["nowhere"], "CHECKPOINT: got 'nowhere', wanted a directory with config.json and tokenizer.json"),
        (["nowhere.gguf"], "CHECKPOINT: got 'nowhere.gguf', wanted a file that exists"),
        (["nowhere", "--top-p", "0"], "--top-p: got 0.0, wanted a number above 0, at most 1"),
        (["nowhere", "--device", "mars"], "--device: got 'mars', wanted a device"),
    ],
)
def test_nobody_to_talk_to(words: list[str], message: str) -> None:
    said = _piped(*words, text="hi\n")
    assert said.returncode == 2
    assert message in said.stderr
    assert "Traceback" not in said.stderr


_COMMANDS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")  # to a terminal: colours, places


class _Terminal:
    """The command in a terminal of its own."""

    def __init__(self, *words: str, columns: int) -> None:
        self._end, other = os.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns), "LINES": "40"}
        self.process = subprocess.Popen(
            [*CHAT, *words], stdin=other, stdout=other, stderr=other, env=environment, start_new_session=True
        )
        os.close(other)
        self.text = ""

    def wait_for(self, pattern: str, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not re.search(pattern, self.text):
            assert time.monotonic() < end, self.text
            if select.select([self._end], [], [], 0.2)[0]:
                try:
                    self.text += _COMMANDS.sub("", os.read(self._end, 65536).decode(errors="replace"))
                except OSError:  # the other end is closed
                    assert re.search(pattern, self.text), self.text

    def type(self, text: str) -> None:
        self.text = ""
        os.write(self._end, text.encode())

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._end)


def test_a_wide_terminal_shows_them_side_by_side_and_ctrl_c_ends_a_reply(toys: Toys) -> None:
    pytest.importorskip("rich")
    terminal = _Terminal(str(toys.teacher), str(toys.student), "--max-new-tokens", "100", columns=100)
    try:
        terminal.wait_for(r"teacher, student; /help lists commands")
        terminal.type("the cat sat\n")
        terminal.wait_for(r"teacher +student")
        os.kill(terminal.process.pid, signal.SIGINT)
        terminal.wait_for(r"\n> ")
        terminal.type("/reset\n")  # it is still there
        terminal.wait_for(r"\n> ")
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.close()


# ---------------------------------------------------------------------------------------------------------- the parts
def test_what_is_drawn_is_among_the_likeliest() -> None:
    logits_V = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = [Sampling(1.0, top_p=0.7).choose(logits_V, generator) for _ in range(400)]
    assert set(drawn) == {0, 1}
    assert drawn.count(0) / 400 == pytest.approx(0.5 / 0.8, abs=0.08)
    assert {Sampling(1.0, top_p=1e-9).choose(logits_V, generator) for _ in range(20)} == {0}
    assert {Sampling(0.0).choose(logits_V, generator) for _ in range(3)} == {0}
    assert {Sampling(5.0, top_p=1.0).choose(logits_V, generator) for _ in range(400)} == {0, 1, 2, 3}


def _partner(directory: Path, *, is_raw: bool = False, system: str = "") -> Partner:
    return Partner("it", load_sections(directory), hf_tokenizer(str(directory)), is_raw, system)


def test_what_a_model_hears(toys: Toys) -> None:
    told = _partner(toys.student, system="be brief")
    told.exchanges.append(("the cat", "sat"))
    tokenizer: HFTokenizer = told.tokenizer
    heard = tokenizer.decode(told.prompt("and", 4)[0], skip_special_tokens=False)
    turns = [("system", "be brief"), ("user", "the cat"), ("assistant", "sat"), ("user", "and")]
    written = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
    assert heard == f"{written}<|im_start|>assistant\n"
    raw = _partner(toys.student, is_raw=True)
    raw.exchanges.append(("the cat", " sat"))
    assert tokenizer.decode(raw.prompt(" on", 4)[0]) == "the cat sat on"


def test_what_has_no_room_is_forgotten_from_the_beginning(toys: Toys) -> None:
    partner = _partner(toys.student)
    partner.exchanges += [("the cat " * 8, "sat on " * 8), ("a mat", "while")]
    ids, left_out = partner.prompt("rain", 20)
    assert left_out == 1
    assert len(ids) <= partner.model.max_seq_len - 20
    with pytest.raises(ConfigError, match="the question: got"):
        partner.prompt("the cat sat " * 60, 20)


def test_names_are_as_short_as_tells_them_apart() -> None:
    assert short_names([Path("runs/a/best"), Path("runs/teacher")]) == ["best", "teacher"]
    assert short_names([Path("runs/a/best"), Path("runs/b/best")]) == ["a/best", "b/best"]
