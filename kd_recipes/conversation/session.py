"""A conversation: what is typed goes to every model, and each answers by what it has heard and said itself."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torchtune.modules import TransformerDecoder

from kd_recipes import _torchtune
from kd_recipes.conversation.partner import Partner, check_checkpoint, has_template, load_checkpoint, short_names
from kd_recipes.conversation.sampling import Sampling, stream
from kd_recipes.conversation.screen import show
from kd_recipes.errors import ConfigError, Problem
from kd_recipes.parts import build, find_device, load_model
from kd_recipes.training.precision import resolve_dtype

_HELP = """\
/reset   forget what was said
/help    this
/quit    the end; so does Ctrl-D. Ctrl-C ends a reply"""


@dataclass(frozen=True)
class Settings:
    """How to talk.

    Args:
        sampling: of the replies.
        system: what the models are told at the beginning; none if empty.
        device: of the models; a GPU if there is one, if None.
        dtype: ``auto``, ``bf16`` or ``fp32``.
        is_raw: whether models go on with what is typed, without a chat template.
    """

    sampling: Sampling
    system: str = ""
    device: str | None = None
    dtype: str = "auto"
    is_raw: bool = False


def converse(checkpoints: Sequence[Path], cfg: DictConfig | None, settings: Settings) -> None:
    """Talk to the models of some checkpoints, and to teacher and student of a distillation.

    Args:
        checkpoints: directories, and GGUF files.
        cfg: of a distillation that has run; None for none.
        settings: how.

    Raises:
        ConfigError: a checkpoint is none, or a setting is out of its range.
    """
    _check(settings.sampling)
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # torchtune's RMSNorm, on purpose
    device = find_device("--device", settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = resolve_dtype(settings.dtype, device)
    partners: list[Partner] = []
    if cfg is not None:
        checkpoints = [_student(Path(cfg.output_dir)), *checkpoints]
    if not checkpoints:
        raise ConfigError(Problem("CHECKPOINT", None, "a model's directory, a .gguf file, or --config FILE"))
    for path in checkpoints:
        check_checkpoint(path)
    if cfg is not None:
        partners.append(_teacher(cfg, dtype, device, settings))
    for name, path in zip(short_names(checkpoints), checkpoints, strict=True):
        model, tokenizer = load_checkpoint(path, dtype=dtype, device=device)
        partners.append(_partner(name, model, tokenizer, settings))
    for partner in partners:
        if partner.is_raw and not settings.is_raw:
            print(f"{partner.name} has no chat template: it goes on with what is typed", file=sys.stderr)
    _Session(partners, settings.sampling).run()


def _check(sampling: Sampling) -> None:
    problems = []
    if not 0 <= sampling.temperature < float("inf"):
        problems.append(Problem("--temperature", sampling.temperature, "0 for the likeliest, or a number above it"))
    if not 0 < sampling.top_p <= 1:
        problems.append(Problem("--top-p", sampling.top_p, "a number above 0, at most 1"))
    if sampling.max_new_tokens < 1:
        problems.append(Problem("--max-new-tokens", sampling.max_new_tokens, "a whole number above 0"))
    if problems:
        raise ConfigError(*problems)


def _student(output_dir: Path) -> Path:
    """The best student of a run, or its last one."""
    for name in ("best", "final"):
        if (output_dir / name).is_dir():
            return output_dir / name
    wanted = "the directory of a run, with best/ or final/ in it"
    raise ConfigError(Problem("output_dir", str(output_dir), wanted, "tune run kd_recipes.distill makes one"))


def _teacher(cfg: DictConfig, dtype: torch.dtype, device: torch.device, settings: Settings) -> Partner:
    if cfg.teacher_model is None or cfg.teacher_checkpointer is None:
        raise ConfigError(Problem("teacher_model", None, "a teacher to talk to", "Name directories instead"))
    tokenizer = build("tokenizer", cfg.tokenizer)
    loaded = load_model("teacher_model", cfg.teacher_model, cfg.teacher_checkpointer, dtype=dtype, device=device)
    return _partner("teacher", loaded.model.eval(), tokenizer, settings)


def _partner(name: str, model: TransformerDecoder, tokenizer: Any, settings: Settings) -> Partner:
    return Partner(name, model, tokenizer, settings.is_raw or not has_template(tokenizer), settings.system)


class _Session:
    def __init__(self, partners: Sequence[Partner], sampling: Sampling) -> None:
        self._partners, self._sampling = partners, sampling

    def run(self) -> None:
        """Until the input ends, or it is said so."""
        if sys.stdin.isatty():
            _remember_lines()
            print(f"{', '.join(partner.name for partner in self._partners)}; /help lists commands")
        commands: dict[str, Callable[[], None]] = {"/reset": self._reset, "/help": lambda: print(_HELP)}
        for line in _lines():
            if line == "/quit":
                return
            if line in commands:
                commands[line]()
            elif line.startswith("/") and line[1:].isalpha():
                print(f"{line} is no command\n{_HELP}")
            elif line:
                self._answer(line)

    def _reset(self) -> None:
        for partner in self._partners:
            partner.exchanges.clear()

    def _answer(self, asked: str) -> None:
        said = [""] * len(self._partners)

        def heard(index: int, text: str) -> None:
            said[index] = text

        try:
            prompts = [self._prompt(partner, asked) for partner in self._partners]
        except (ConfigError, ValueError) as error:
            print(error, file=sys.stderr)
            return
        try:
            with ExitStack() as stack:
                decoders = [stack.enter_context(_torchtune.decoding(partner.model)) for partner in self._partners]
                parts = zip(self._partners, decoders, prompts, strict=True)
                replies = [stream(decoder, ids, p.tokenizer, self._sampling) for p, decoder, ids in parts]
                show([partner.name for partner in self._partners], replies, heard)
        except KeyboardInterrupt:
            print("(interrupted)")
        for partner, text in zip(self._partners, said, strict=True):
            partner.exchanges.append((asked, text))

    def _prompt(self, partner: Partner, asked: str) -> list[int]:
        ids, left_out = partner.prompt(asked, self._sampling.max_new_tokens)
        if left_out:
            del partner.exchanges[:left_out]
            print(f"({partner.name} no longer knows the first {left_out} exchanges: there is no room)")
        return ids


def _remember_lines() -> None:
    """Let the arrow keys edit a line, and bring earlier ones back."""
    try:
        import readline  # noqa: F401  (not on Windows)
    except ImportError:
        return


def _lines() -> Iterator[str]:
    """What is typed; from a pipe, said again, so that the output is the whole conversation."""
    is_terminal = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
        except EOFError:
            if is_terminal:
                print()
            return
        except KeyboardInterrupt:
            print("\n/quit or Ctrl-D ends the conversation")
            continue
        if line and not is_terminal:
            print(f"> {line}")
        yield line
