"""Toy pairs of the families that configs are shipped for, and the overrides that lead a config to them."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torchtune.models.llama3._tokenizer import SPECIAL_TOKENS
from torchtune.models.qwen2_5._tokenizer import QWEN2_5_SPECIAL_TOKENS

from toy import VOCABULARY, save_model, save_tokenizer, sentence, write_jsonl

STUDENT = {"embed_dim": 64, "intermediate_dim": 96, "num_layers": 2}
TEACHER = {"embed_dim": 96, "intermediate_dim": 144, "num_layers": 3}
HEADS = {"vocab_size": VOCABULARY, "num_heads": 4, "num_kv_heads": 2, "max_seq_len": 1024}


@dataclass(frozen=True)
class Family:
    """A toy pair of a family that torchtune ships a config for, and the overrides that lead to it."""

    student: Path
    teacher: Path
    data: Path
    full: list[str]
    lora: list[str]
    tokenizer: list[str]

    def overrides(self, output_dir: Path, models: list[str]) -> list[str]:
        """Paths and sizes, and what a CPU needs; ``models`` is :attr:`full` or :attr:`lora`."""
        return [
            *models,
            *self.tokenizer,
            f"output_dir={output_dir}",
            f"checkpointer.checkpoint_dir={self.student}",
            f"teacher_checkpointer.checkpoint_dir={self.teacher}",
            "dataset.source=json",
            f"dataset.data_files={self.data}",
            f"dataset.cache_dir={self.data.parent / 'cache'}",
            *("device=cpu", "dtype=fp32", "seed=1"),
            *("max_steps_per_epoch=2", "batch_size=2", "gradient_accumulation_steps=2"),
        ]


def _sizes(section: str, component: str, **sizes: Any) -> list[str]:
    return [f"{section}._component_={component}", *(f"{section}.{k}={v}" for k, v in {**sizes, **HEADS}.items())]


def _save(directory: Path, model_type: str, sizes: dict[str, int], **settings: Any) -> Path:
    widths = {"hidden_size": sizes["embed_dim"], "intermediate_size": sizes["intermediate_dim"]}
    save_model(directory, model_type, **widths, num_hidden_layers=sizes["num_layers"], **settings)
    return directory


def _shard(directory: Path, num_files: int) -> None:
    """Spread a checkpoint over the files that the real one has."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = [f"model-{i:05}-of-{num_files:05}.safetensors" for i in range(1, num_files + 1)]
    for index, name in enumerate(names):
        part = {key: tensors[key] for key in sorted(tensors)[index::num_files]}
        save_file(part, directory / name, metadata={"format": "pt"})


def _qwen2(root: Path, data: Path) -> Family:
    student, teacher = _save(root / "student", "qwen2", STUDENT), _save(root / "teacher", "qwen2", TEACHER, seed=1)
    for directory in (student, teacher):
        tokenizer: Tokenizer = save_tokenizer(directory)
        tokenizer.model.save(str(directory))  # vocab.json, merges.txt
    # Qwen2.5 has special tokens that the toy tokenizer lacks: they get the ids of ordinary ones, which no test uses
    added = json.loads((student / "tokenizer.json").read_text())["added_tokens"]
    lacking = [token for token in QWEN2_5_SPECIAL_TOKENS if token not in {entry["content"] for entry in added}]
    added += [{"content": token, "id": VOCABULARY - 1 - index} for index, token in enumerate(lacking)]
    special = root / "special_tokens.json"
    special.write_text(json.dumps({"added_tokens": added}))
    qwen2 = "torchtune.models.qwen2"
    big = _sizes("teacher_model", f"{qwen2}.qwen2", **TEACHER, tie_word_embeddings=True)
    return Family(
        student,
        teacher,
        data,
        [*_sizes("model", f"{qwen2}.qwen2", **STUDENT, tie_word_embeddings=True), *big],
        [*_sizes("model", f"{qwen2}.lora_qwen2", **STUDENT, tie_word_embeddings=True), *big],
        [
            f"tokenizer.path={student / 'vocab.json'}",
            f"tokenizer.merges_file={student / 'merges.txt'}",
            f"tokenizer.special_tokens_path={special}",
        ],
    )


def _llama3(root: Path, data: Path) -> Family:
    student = _save(root / "student", "llama", STUDENT)
    teacher = _save(root / "teacher", "llama", TEACHER, seed=1, tie_word_embeddings=False)
    _shard(teacher, 4)
    # a tiktoken file of the 256 bytes, no merges
    lines = (f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
    (root / "tokenizer.model").write_text("".join(lines))
    big = _sizes("teacher_model", "torchtune.models.llama3_1.llama3_1", **TEACHER)
    special = [{"content": token, "id": 256 + index} for index, token in enumerate(SPECIAL_TOKENS)]
    (root / "special_tokens.json").write_text(json.dumps({"added_tokens": special}))
    return Family(
        student,
        teacher,
        data,
        [*_sizes("model", "torchtune.models.llama3_2.llama3_2", **STUDENT), *big],
        [*_sizes("model", "torchtune.models.llama3_2.lora_llama3_2", **STUDENT), *big],
        [f"tokenizer.path={root / 'tokenizer.model'}", f"tokenizer.special_tokens_path={root / 'special_tokens.json'}"],
    )


def save_families(root: Path) -> dict[str, Family]:
    """All of them, by the prefix of their configs' names."""
    rows = [{"instruction": sentence(i, 3), "input": "", "output": sentence(i + 1)} for i in range(40)]
    data = write_jsonl(root / "alpaca.jsonl", rows)
    return {"qwen": _qwen2(root / "qwen2", data), "llama3_2": _llama3(root / "llama3_2", data)}
