"""Toy models, data and configs that the tests make themselves: real files of real formats, only small.

The models are written by transformers and the tokenizer by tokenizers, so that what the package reads is what users
have, and none of the package's own code has a hand in it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torchtune.training.metric_logging import DiskLogger

from kd_recipes.compression import Text, sections
from kd_recipes.config import load_and_validate
from kd_recipes.distill import DistillRecipe
from kd_recipes.models import checkpointer_model_type, model_section
from kd_recipes.parts import load_model
from kd_recipes.training.checkpoint import WEIGHTS
from kd_recipes.training.sharded import read_shapes, read_tensors

TUNE = Path(sys.executable).with_name("tune")
VOCABULARY = 320
MAX_SEQ_LEN = 128
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = """the cat sat on a mat while rain fell over quiet hills and nobody at the station knew when the last train
would leave for the coast where lamps burn all night"""
WORDS = TEXT.split()


@dataclass(frozen=True)
class Toys:
    """Where the toy files are.

    Args:
        student: llama checkpoint directory, 2 blocks of width 64.
        teacher: llama checkpoint directory, 3 blocks of width 96, the same tokenizer.
        wide: llama checkpoint directory, 2 blocks of width 256, which NF4 quantization divides.
        data: directory of text.jsonl, held_out.jsonl, instruct.jsonl and chat.jsonl.
    """

    student: Path
    teacher: Path
    wide: Path
    data: Path


# ------------------------------------------------------------------------------------------------------------ text
def sentence(index: int, num_words: int | None = None) -> str:
    """Some words; their number differs from one index to the next, so that batches are ragged."""
    num_words = 3 + index * 5 % 11 if num_words is None else num_words
    return " ".join(WORDS[(index * 7 + k * (1 + index % 3)) % len(WORDS)] for k in range(num_words)) + "."


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def save_data(directory: Path) -> Path:
    """The jsonl files of :attr:`Toys.data`."""
    directory.mkdir(parents=True, exist_ok=True)
    write_jsonl(directory / "text.jsonl", [{"text": sentence(i)} for i in range(24)])
    write_jsonl(directory / "held_out.jsonl", [{"text": sentence(100 + i)} for i in range(6)])
    instruct = [{"instruction": sentence(i), "input": "", "output": sentence(i + 1)} for i in range(16)]
    write_jsonl(directory / "instruct.jsonl", instruct)
    chats = [[("user", i), ("assistant", i + 1), ("user", i + 2), ("assistant", i + 3)] for i in range(16)]
    rows = [{"messages": [{"role": role, "content": sentence(i, 2 + i % 4)} for role, i in chat]} for chat in chats]
    write_jsonl(directory / "chat.jsonl", rows)
    return directory


def save_tokenizer(directory: Path, vocab_size: int = VOCABULARY) -> Tokenizer:
    """A trained byte-level BPE tokenizer with a ChatML template, as a Hugging Face checkpoint has it."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sentence(i) for i in range(50)], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {"eos_token": SPECIAL_TOKENS[0], "pad_token": SPECIAL_TOKENS[0], "bos_token": None}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps({**special, **settings}))
    return tokenizer


def calibration(batches: list[tuple[Tensor, Tensor | None]]) -> Text:
    """Batches of ids ``[B, S]``, and which count, as calibration text in float32."""
    windows = [
        (tokens_S[None], torch.ones(1, len(tokens_S), dtype=torch.bool) if valid_BS is None else valid_BS[row][None])
        for tokens_BS, valid_BS in batches
        for row, tokens_S in enumerate(tokens_BS)
    ]
    return Text(windows, torch.device("cpu"), torch.float32)


# ---------------------------------------------------------------------------------------------------------- models
def load_sections(directory: Path) -> Any:
    """A model as its model.yaml says; of a directory that has none, as it should."""
    found = OmegaConf.load(directory / "model.yaml") if (directory / "model.yaml").exists() else sections(directory)
    settings: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
    return load_model("model", found.model, found.checkpointer, **settings).model.eval()


def save_model(directory: Path, model_type: str = "llama", *, seed: int = 0, **settings: Any) -> Any:
    """A random model written by transformers; its weights are large enough for predictions that differ by context."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_SEQ_LEN,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
        "dtype": "float32",
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**sizes, **settings}))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    return model.eval()


def save_toys(root: Path) -> Toys:
    """All the toy files."""
    toys = Toys(root / "student", root / "teacher", root / "wide", save_data(root / "data"))
    save_model(toys.student)
    save_model(toys.teacher, seed=1, num_hidden_layers=3, hidden_size=96, intermediate_size=144)
    save_model(toys.wide, seed=2, hidden_size=256, intermediate_size=512)
    for directory in (toys.student, toys.teacher, toys.wide):
        save_tokenizer(directory)
    return toys


def hf_config(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's config.json."""
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    return config


def lora_section(checkpoint: Path, **settings: Any) -> dict[str, Any]:
    """The ``model:`` section of a checkpoint with adapters on it."""
    lora = {"lora_attn_modules": ["q_proj", "v_proj", "output_proj"], "apply_lora_to_mlp": True}
    sizes = {"lora_rank": 4, "lora_alpha": 8}
    section = {**model_section(hf_config(checkpoint)), **lora, **sizes, **settings}
    return {**section, "_component_": "kd_recipes.models.lora_llama"}


# --------------------------------------------------------------------------------------------------------- configs
def checkpointer_section(checkpoint: Path) -> dict[str, Any]:
    """The ``checkpointer:`` section of a checkpoint directory."""
    return {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpoint_dir": str(checkpoint),
        "checkpoint_files": ["model.safetensors"],
        "output_dir": "${output_dir}",
        "model_type": checkpointer_model_type(hf_config(checkpoint)),
    }


def text_section(file: Path, cache_dir: Path, **settings: Any) -> dict[str, Any]:
    """A ``dataset:`` section of texts."""
    section = {"_component_": "torchtune.datasets.text_completion_dataset", "source": "json", "split": "train"}
    return {**section, "data_files": str(file), "packed": False, "cache_dir": str(cache_dir), **settings}


def toy_config(toys: Toys, tmp_path: Path) -> DictConfig:
    """A full fine-tuning run on text, of two steps, in float32 on the CPU."""
    return OmegaConf.create(
        {
            "recipe": "distill",
            "output_dir": str(tmp_path / "run"),
            "model": model_section(hf_config(toys.student)),
            "checkpointer": checkpointer_section(toys.student),
            "teacher_model": model_section(hf_config(toys.teacher)),
            "teacher_checkpointer": checkpointer_section(toys.teacher),
            "tokenizer": {
                "_component_": "kd_recipes.tokenizers.hf_tokenizer",
                "path": str(toys.student),
                "max_seq_len": MAX_SEQ_LEN,
            },
            "dataset": text_section(toys.data / "text.jsonl", toys.data / "cache"),
            "eval_dataset": None,
            "batch_size": 2,
            "shuffle": True,
            "seed": 1,
            "kd_ratio": 0.5,
            "temperature": 1.0,
            "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-3},
            "lr_scheduler": None,
            "gradient_accumulation_steps": 1,
            "epochs": 1,
            "max_steps": 2,
            "device": "cpu",
            "dtype": "fp32",
            "health": {  # texts as short as can be: a run that is cut off at every step makes them many times
                "_component_": "kd_recipes.monitoring.Health",
                "num_prompts": 2,
                "prompt_length": 2,
                "max_new_tokens": 4,
            },
            "metric_logger": {
                "_component_": "torchtune.training.metric_logging.DiskLogger",
                "log_dir": "${output_dir}/logs",
            },
        }
    )


def save_config(cfg: DictConfig, path: Path, **overrides: Any) -> Path:
    """Write a config with some keys replaced; dots in a key lead into sections (``**{"model.num_layers": 1}``)."""
    for key, value in overrides.items():
        OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    OmegaConf.save(cfg, path)
    return path


# ------------------------------------------------------------------------------------------------------------ runs
def run_tune(*words: str, cwd: Path, timeout: float = 240, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the real ``tune`` command from another directory than the repository's."""
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), **variables}
    options: dict[str, Any] = {"capture_output": True, "text": True, "check": False, "timeout": timeout}
    return subprocess.run([str(TUNE), *words], cwd=cwd, env=environment, **options)


def prepare(config: Path, *overrides: str) -> DistillRecipe:
    """A distillation that is set up, not begun."""
    cfg = load_and_validate(str(config), list(overrides), "distill")
    recipe = DistillRecipe(cfg)
    recipe.setup(cfg)
    return recipe


def distill(config: Path, *overrides: str) -> DistillRecipe:
    """A distillation that has run to its end, to be looked into."""
    recipe = prepare(config, *overrides)
    try:
        recipe.train()
    finally:
        recipe.cleanup()
    return recipe


class Interrupted(Exception):
    """What ends a run that is to be resumed."""


class InterruptingLogger(DiskLogger):
    """A metric logger at which a run breaks off, as it would if the machine did: after an update, before it is saved.

    Args:
        stop_at: the step.
    """

    def __init__(self, log_dir: str, stop_at: int) -> None:
        super().__init__(log_dir)
        self._stop_at = stop_at

    def log_dict(self, payload: Any, step: int) -> None:
        super().log_dict(payload, step)
        if step == self._stop_at and "loss/total" in payload:
            raise Interrupted


class SignallingLogger(DiskLogger):
    """A metric logger that sends the process a signal once.

    Args:
        at: the step whose metrics it is sent with.
        tag: a metric that has to be among them.
        number: of the signal.
    """

    def __init__(self, log_dir: str, at: int, tag: str = "loss/total", number: int = signal.SIGTERM) -> None:
        super().__init__(log_dir)
        self._at, self._tag, self._number = at, tag, number

    def log_dict(self, payload: Any, step: int) -> None:
        super().log_dict(payload, step)
        if step == self._at and self._tag in payload:
            os.kill(os.getpid(), self._number)


class FullDiskLogger(DiskLogger):
    """A metric logger after which, from a step on, the process can write no file of more than a few bytes.

    Args:
        full_at: the step.
        max_bytes: of a file. The limit is the process's: whoever uses this lifts it.
    """

    def __init__(self, log_dir: str, full_at: int, max_bytes: int) -> None:
        super().__init__(log_dir)
        self._full_at, self._max_bytes = full_at, max_bytes

    def log_dict(self, payload: Any, step: int) -> None:
        super().log_dict(payload, step)
        if step == self._full_at:
            import resource  # not on Windows

            resource.setrlimit(resource.RLIMIT_FSIZE, (self._max_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def fail(batch: Any, how: str, rank: int, at: int, marker: str, times: int = 1) -> torch.Tensor:
    """Weights of tokens, all 1, at whose n-th call the process of a rank is killed or hangs, the first times it runs.

    Args:
        batch: to be weighed.
        how: ``kill`` or ``hang``; ``nap`` only takes its time, at each call.
        rank: of the process.
        at: the call.
        marker: a file that remembers how often it has happened.
        times: how often it is to happen.
    """
    calls = _CALLS[marker] = _CALLS.get(marker, 0) + 1
    if how == "nap":
        time.sleep(0.2)
    file = Path(marker)
    count = len(file.read_text()) if file.exists() else 0
    if calls == at and int(os.environ.get("RANK", 0)) == rank and count < times:
        file.write_text("x" * (count + 1))
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun need not wait half a minute to kill it
        time.sleep(300)
    return torch.ones(batch.labels_BS.shape)


_CALLS: dict[str, int] = {}


def saved_weights(run: Path) -> dict[str, torch.Tensor]:
    """The trained weights in a run's newest checkpoint, whole."""
    newest = max((run / "checkpoints").glob("step_*"))
    shapes = {name: entry for name, entry in read_shapes(newest).items() if name.startswith(WEIGHTS)}
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    read_tensors(newest, tensors, None)
    return {name.removeprefix(WEIGHTS): tensor for name, tensor in tensors.items()}


def logged(run: Path) -> dict[int, dict[str, float]]:
    """What a DiskLogger wrote, by step; what is logged twice at a step is merged."""
    steps: dict[int, dict[str, float]] = {}
    for file in sorted((run / "logs").glob("log_*.txt"), key=lambda path: path.stat().st_mtime_ns):
        for line in file.read_text().splitlines():
            head, _, rest = line.partition(" | ")
            pairs = (word.rpartition(":") for word in rest.split())
            values = {name: float(value) for name, _, value in pairs if name}
            steps.setdefault(int(head.removeprefix("Step ")), {}).update(values)
    return steps


def tensorboard_scalars(run: Path) -> dict[str, dict[int, float]]:
    """What a TensorBoardLogger wrote: tag -> step -> value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((run / "logs").rglob("events.out.tfevents.*")).parent)).Reload()
    # torchtune writes scalars as tensors of one element, which TensorBoard shows as the scalars that they are
    # and texts and settings as tensors of other types
    values = {tag: events.Tensors(tag) for tag in events.Tags()["tensors"]}
    return {
        tag: {event.step: event.tensor_proto.float_val[0] for event in of}
        for tag, of in values.items()
        if of[0].tensor_proto.float_val
    }
