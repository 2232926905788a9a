"""torchtune's own knowledge-distillation configs run here as they are, but for paths and sizes."""

from __future__ import annotations

import base64
import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from torchtune.models.llama3._tokenizer import SPECIAL_TOKENS
from torchtune.modules.loss import CEWithChunkedOutputLoss, ForwardKLWithChunkedOutputLoss

from kd_recipes.config import load
from toy import VOCABULARY, distill, logged, prepare, run_tune, save_model, save_tokenizer, sentence, write_jsonl

CONFIGS = [
    "qwen2/1.5_to_0.5B_KD_lora_single_device",
    "qwen2/1.5_to_0.5B_KD_lora_distributed",
    "llama3_2/8B_to_1B_KD_lora_single_device",
    "llama3_2/8B_to_1B_KD_lora_distributed",
]
STUDENT = {"embed_dim": 64, "intermediate_dim": 96, "num_layers": 2}
TEACHER = {"embed_dim": 96, "intermediate_dim": 144, "num_layers": 3}
HEADS = {"vocab_size": VOCABULARY, "num_heads": 4, "num_kv_heads": 2, "max_seq_len": 512}


@pytest.fixture(scope="session")
def recipes() -> Path:
    """Where torchtune's recipes are; the package refuses to be imported."""
    spec = importlib.util.find_spec("recipes")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


@dataclass(frozen=True)
class Family:
    """A toy pair of a family that torchtune ships a config for, and the overrides that lead to it."""

    student: Path
    teacher: Path
    data: Path
    models: list[str]
    tokenizer: list[str]

    def overrides(self, output_dir: Path) -> list[str]:
        """Paths and sizes, and what a CPU needs."""
        return [
            *self.models,
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
    qwen2 = "torchtune.models.qwen2"
    return Family(
        student,
        teacher,
        data,
        [
            *_sizes("model", f"{qwen2}.lora_qwen2", **STUDENT, tie_word_embeddings=True),
            *_sizes("teacher_model", f"{qwen2}.qwen2", **TEACHER, tie_word_embeddings=True),
        ],
        [
            f"tokenizer.path={student / 'vocab.json'}",
            f"tokenizer.merges_file={student / 'merges.txt'}",
            f"tokenizer.special_tokens_path={student / 'tokenizer.json'}",
        ],
    )


def _llama3(root: Path, data: Path) -> Family:
    student = _save(root / "student", "llama", STUDENT)
    teacher = _save(root / "teacher", "llama", TEACHER, seed=1, tie_word_embeddings=False)
    _shard(teacher, 4)
    # a tiktoken file of the 256 bytes, no merges
    lines = (f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
    (root / "tokenizer.model").write_text("".join(lines))
    special = [{"content": token, "id": 256 + index} for index, token in enumerate(SPECIAL_TOKENS)]
    (root / "special_tokens.json").write_text(json.dumps({"added_tokens": special}))
    return Family(
        student,
        teacher,
        data,
        [
            *_sizes("model", "torchtune.models.llama3_2.lora_llama3_2", **STUDENT),
            *_sizes("teacher_model", "torchtune.models.llama3_1.llama3_1", **TEACHER),
        ],
        [f"tokenizer.path={root / 'tokenizer.model'}", f"tokenizer.special_tokens_path={root / 'special_tokens.json'}"],
    )


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    root = tmp_path_factory.mktemp("drop_in")
    rows = [{"instruction": sentence(i, 3), "input": "", "output": sentence(i + 1)} for i in range(16)]
    data = write_jsonl(root / "alpaca.jsonl", rows)
    return {"qwen2": _qwen2(root / "qwen2", data), "llama3_2": _llama3(root / "llama3_2", data)}


def _check_run(run: Path) -> None:
    steps = logged(run)
    assert set(steps) == {1, 2}
    assert all(math.isfinite(step["loss/total"]) and step["optimizer/grad_norm"] > 0 for step in steps.values())
    assert list((run / "final").glob("*.safetensors"))


def test_by_name_through_tune(families: dict[str, Family], tmp_path: Path) -> None:
    overrides = families["qwen2"].overrides(tmp_path / "run")
    result = run_tune("run", "kd_recipes.distill", "--config", CONFIGS[0], *overrides, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    _check_run(tmp_path / "run")


@pytest.mark.parametrize("name", CONFIGS)
def test_its_own_loss_classes_train_the_student(
    name: str, recipes: Path, families: dict[str, Family], tmp_path: Path
) -> None:
    overrides = families[name.partition("/")[0]].overrides(tmp_path / "run")
    recipe = distill(recipes / "configs" / f"{name}.yaml", *overrides)
    assert type(recipe._objective.loss) is CEWithChunkedOutputLoss
    assert type(recipe._objective.kd_loss) is ForwardKLWithChunkedOutputLoss
    assert recipe.student.is_adapted
    _check_run(tmp_path / "run")


def _torchtune_recipe(recipes: Path) -> Callable[..., Any]:
    file = recipes / "knowledge_distillation_single_device.py"
    spec = importlib.util.spec_from_file_location("knowledge_distillation_single_device", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    recipe: Callable[..., Any] = module.KDRecipeSingleDevice
    return recipe


@pytest.mark.parametrize("kd_ratio", [0.3, 1.0])
def test_a_step_equals_torchtune_s_but_for_its_second_division(
    kd_ratio: float, recipes: Path, families: dict[str, Family], tmp_path: Path
) -> None:
    config = recipes / "configs" / f"{CONFIGS[0]}.yaml"
    overrides = [*families["qwen2"].overrides(tmp_path / "theirs"), f"kd_ratio={kd_ratio}", "shuffle=False"]
    overrides += ["max_steps_per_epoch=1", "batch_size=4", "gradient_accumulation_steps=1"]
    overrides += ["lr_scheduler.num_warmup_steps=0", "~optimizer.weight_decay", "optimizer._component_=torch.optim.SGD"]
    ours = prepare(config, *overrides, f"output_dir={tmp_path / 'ours'}")
    cfg = load(str(config), overrides)
    theirs = _torchtune_recipe(recipes)(cfg)
    theirs.setup(cfg)
    theirs._model.load_state_dict(ours.student.weights(), strict=False)  # adapters begin at random
    labels = next(iter(theirs._dataloader))["labels"]
    for recipe in (ours, theirs):
        recipe.train()
        recipe.cleanup()
    # their mean is divided by the number of tokens once more, counted before the labels are shifted
    num_tokens = int((labels != CROSS_ENTROPY_IGNORE_IDX).sum())
    trained = {name: p.detach() for name, p in theirs._model.named_parameters() if "lora_b" in name}
    assert trained
    worst = 0.0
    for name, tensor in trained.items():  # all zeros at the start, so what is there is the update
        expected = ours.student.weights()[name]
        assert expected.abs().max() > 0
        worst = max(worst, ((tensor * num_tokens - expected).norm() / expected.norm()).item())
    print(f"\nkd_ratio {kd_ratio}: largest relative difference from torchtune's gradient {worst:.1e}")
    assert worst < 1e-5
