"""What a run is known to need before it begins: room on the disk, and ids that mean the same to both models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import DictConfig

from kd_recipes.config import load_and_validate
from kd_recipes.errors import ConfigError
from kd_recipes.tensor_files import read_safetensors_header
from kd_recipes.tokenizers import token_ids
from kd_recipes.training import preflight
from toy import VOCABULARY, Toys, distill, lora_section

WriteConfig = Callable[..., Path]


@pytest.fixture
def needed(write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """``needed(*overrides)`` is the free space, in bytes, that preflight asks for."""
    asked: list[int] = []
    monkeypatch.setattr(preflight, "require_free_space", lambda path, num_bytes, *, key: asked.append(num_bytes))

    def run(*overrides: str, **settings: Any) -> int:
        cfg: DictConfig = load_and_validate(str(write_config(tmp_path, **settings)), overrides, "distill")
        preflight.preflight(cfg)
        return asked[-1]

    return run


def test_room_for_exports_and_checkpoints(needed: Callable[..., int], toys: Toys) -> None:
    file = toys.student / "model.safetensors"
    size, elements = file.stat().st_size, sum(s.num_bytes // 4 for s in read_safetensors_header(file).values())
    adam_fp32 = 4 + 8
    assert needed() == size + elements * adam_fp32  # final, and the checkpoint at the end
    assert needed("save_adapter_weights_only=True", model=lora_section(toys.student)) == 0
    held_out = {"_component_": "torchtune.datasets.text_completion_dataset", "source": "json"}
    assert needed(eval_dataset=held_out) == 2 * size + elements * adam_fp32  # and best
    assert needed("save_every_n_steps=1", "max_steps=1") == size + elements * adam_fp32
    assert needed("save_every_n_steps=1", "max_steps=9") == size + elements * adam_fp32 * 3  # two kept, one written
    assert needed("epochs=2") == size + elements * adam_fp32 * 2
    assert needed("dtype=bf16") == size + elements * (4 + 8)
    assert needed("dtype=bf16", "master_weights=False") == size + elements * (2 + 4)
    assert needed("optimizer=torch.optim.SGD") == size + elements * 4
    assert needed("epochs=2", model=lora_section(toys.student)) == size


def test_the_estimate_is_no_more_than_what_is_written(
    write_config: WriteConfig, needed: Callable[..., int], tmp_path: Path
) -> None:
    overrides = ("save_every_n_steps=1", "max_steps=3")
    estimate = needed(*overrides)
    distill(write_config(tmp_path), *overrides)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    written = sum(path.stat().st_size for path in files)
    checkpoint = sum(path.stat().st_size for path in files if path.parent.name == "step_00000003")
    assert estimate <= written + checkpoint  # one more while it is written
    assert estimate >= 0.8 * (written + checkpoint)


def test_token_ids_of_both_tokenizer_formats(toys: Toys, tmp_path: Path) -> None:
    content = json.loads((toys.student / "tokenizer.json").read_text())
    ids = token_ids(toys.student)
    assert ids is not None
    assert len(ids) == VOCABULARY
    assert ids["<|im_end|>"] == 2
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    (tmp_path / "vocab.json").write_text(json.dumps({t: i for t, i in ids.items() if t not in special}))
    added = {str(index): {"content": token} for token, index in special.items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    assert token_ids(tmp_path) == ids
    assert token_ids(tmp_path / "nowhere") is None


def test_token_ids_of_a_unigram_model(tmp_path: Path) -> None:
    content = {"model": {"vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": [{"content": "<s>", "id": 2}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert token_ids(tmp_path) == {"a": 0, "b": 1, "<s>": 2}


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({"vocab_size": 10, "max_seq_len": 8}, []),
        ({"vocab_size": 11, "max_seq_len": None}, ["tokenizer"]),
        ({"vocab_size": 9, "special_tokens": {"<s>": 10}, "max_seq_len": 9}, ["tokenizer", "tokenizer.max_seq_len"]),
    ],
)
def test_a_tokenizer_has_to_fit_the_model(settings: dict[str, Any], keys: list[str]) -> None:
    problems: tuple[Any, ...] = ()
    try:
        preflight.check_tokenizer(SimpleNamespace(**settings), 10, 8)
    except ConfigError as error:
        problems = error.problems
    assert [problem.key for problem in problems] == keys


@pytest.mark.parametrize("settings", [{"quantize_base": True}, {"use_dora": True}, {}])
def test_adapted_models_of_every_kind_can_be_measured(
    settings: dict[str, Any], toys: Toys, write_config: WriteConfig, tmp_path: Path
) -> None:
    config = write_config(tmp_path, model=lora_section(toys.wide, **settings))
    cfg = load_and_validate(str(config), [f"checkpointer.checkpoint_dir={toys.wide}"], "distill")
    tokenizer = SimpleNamespace(vocab_size=VOCABULARY, max_seq_len=None)
    (size,) = preflight.check_models(cfg, tokenizer, ["model"])
    assert (size.num_rows, size.embed_dim, size.num_layers, size.max_seq_len) == (VOCABULARY, 256, 2, 128)
