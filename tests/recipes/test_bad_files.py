"""Checkpoints, tokenizers and data that cannot be used: one clear message before weights load, and nothing touched."""

from __future__ import annotations

import json
import re
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input import SAVING, Rejected, WriteConfig, problems, use
from safetensors.torch import load_file, save_file

from kd_recipes.entry import EXIT_BAD_INPUT, run_recipe
from toy import MAX_SEQ_LEN, VOCABULARY, Toys, distill, lora_section, save_model, save_tokenizer, write_jsonl


# ------------------------------------------------------------------------------------------------------ checkpoints
@pytest.mark.parametrize("key", ["checkpointer", "teacher_checkpointer"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("checkpoint_dir", "nowhere", "checkpoint_dir: got 'nowhere', wanted a directory that exists"),
        ("checkpoint_dir", "null", "checkpoint_dir: got None, wanted a directory that exists"),
        ("checkpoint_files", "[a.safetensors]", "got 'a.safetensors', wanted files that are in"),
        ("checkpoint_files", "[a.safetensors]", "There: ['model.safetensors']"),
        ("checkpoint_files", "model.safetensors", "got 'model.safetensors', wanted a list of files"),
        ("checkpoint_files", "[]", "checkpoint_files: got [], wanted a list of files"),
        ("model_type", "BANANA", "wanted one that can be built"),
    ],
)
def test_a_checkpoint_that_is_not_there(key: str, name: str, value: str, message: str, rejected: Rejected) -> None:
    got = rejected(f"{key}.{name}={value}")
    assert f"  - {key}" in got
    assert message in got


@pytest.mark.parametrize("num_bytes", [0, 5, 100, -1])
def test_a_truncated_checkpoint(num_bytes: int, checkpoint: Path, rejected: Rejected) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:num_bytes])
    message = rejected(use(checkpoint))
    assert "checkpointer.checkpoint_files: got 'model.safetensors', wanted a whole safetensors file" in message


def test_a_checkpoint_without_its_config_json(checkpoint: Path, rejected: Rejected) -> None:
    (checkpoint / "config.json").unlink()
    message = rejected(use(checkpoint))
    assert "checkpointer: got 'torchtune.training.FullModelHFCheckpointer', wanted one that can be built" in message
    assert "config.json" in message


def test_a_truncated_pickle_checkpoint(checkpoint: Path, rejected: Rejected) -> None:
    (checkpoint / "model.safetensors").unlink()
    torch.save({"weights": torch.zeros(1000)}, checkpoint / "model.bin")
    (checkpoint / "model.bin").write_bytes((checkpoint / "model.bin").read_bytes()[:2000])
    message = rejected(use(checkpoint), "checkpointer.checkpoint_files=[model.bin]", loads=True)
    assert f"checkpointer: got '{checkpoint}', wanted a checkpoint that can be read. Unable to load" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_layers=3", "Its layers: 2 in the file, 3 in `model`"),
        ("model.embed_dim=128", "Its embedding: (320, 64) in the file, (320, 128) in `model`"),
        ("model.vocab_size=400", "Its embedding: (320, 64) in the file, (400, 64) in `model`"),
        ("teacher_model.num_layers=2", "Its layers: 3 in the file, 2 in `teacher_model`"),
    ],
)
def test_a_checkpoint_of_another_model_is_known_by_its_header(override: str, message: str, rejected: Rejected) -> None:
    got = rejected(override)
    assert message in got
    assert "wanted the model in" in got


def test_shapes_that_the_header_does_not_tell_are_found_while_loading(rejected: Rejected) -> None:
    message = rejected("model.intermediate_dim=128", loads=True)
    assert "model: got 'kd_recipes.models.llama', wanted the model that the checkpoint holds" in message
    assert "[64, 96] in the file and [64, 128] in the model" in message


def test_missing_weights(checkpoint: Path, rejected: Rejected) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    assert "layers.1.mlp.w3.weight is not in the file" in rejected(use(checkpoint), loads=True)


@pytest.mark.parametrize("override", ["model.num_heads=5", "model.num_layers=2.5", "model.num_kv_heads=3"])
def test_a_model_that_cannot_be_built(override: str, rejected: Rejected) -> None:
    assert "model: got 'kd_recipes.models.llama', wanted a model that can be built" in rejected(override)


def test_an_adapter_on_no_such_layer(toys: Toys, rejected: Rejected) -> None:
    message = rejected(model=lora_section(toys.student, apply_lora_to_output=True))
    assert "model.apply_lora_to_output: got True, wanted False for a Llama" in message


# -------------------------------------------------------------------------------------- tokenizer and vocabularies
def test_a_missing_tokenizer(rejected: Rejected) -> None:
    message = rejected("tokenizer.path=nowhere")
    assert "tokenizer.path: got 'nowhere', wanted a directory with a tokenizer.json" in message


@pytest.mark.parametrize(
    ("component", "path"),
    [
        ("torchtune.models.llama3.llama3_tokenizer", "tokenizer.path=nowhere/tokenizer.model"),
        ("torchtune.models.llama2.llama2_tokenizer", "tokenizer.path=nowhere/tokenizer.model"),
        ("kd_recipes.tokenizers.hf_tokenizer", "tokenizer.path=null"),
    ],
)
def test_a_missing_tokenizer_of_torchtune(component: str, path: str, rejected: Rejected) -> None:
    message = rejected(f"tokenizer._component_={component}", path)
    assert f"tokenizer: got '{component}', wanted one that can be built" in message


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"model": {"vocab": 3}}'])
def test_a_damaged_tokenizer(text: str, checkpoint: Path, rejected: Rejected) -> None:
    (checkpoint / "tokenizer.json").write_text(text)
    assert f"{checkpoint / 'tokenizer.json'}: got" in rejected(use(checkpoint))
    assert "tokenizer.json" in rejected(f"tokenizer.path={checkpoint}")


def test_a_tokenizer_with_ids_beyond_the_rows(tmp_path: Path, toys: Toys, rejected: Rejected) -> None:
    save_tokenizer(tmp_path / "large")
    content = json.loads((tmp_path / "large" / "tokenizer.json").read_text())
    extra = {"content": "<extra>", "id": VOCABULARY, "special": True, "normalized": False}
    extra |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    content["added_tokens"].append(extra)
    (tmp_path / "large" / "tokenizer.json").write_text(json.dumps(content))
    message = rejected(f"tokenizer.path={tmp_path / 'large'}")
    assert "tokenizer: got 'ids up to 320', wanted ids below 320, the rows of `model`" in message
    assert "wanted ids below 320, the rows of `teacher_model`" in message


def swap_ids(directory: Path, first: str, second: str) -> None:
    """Exchange the ids of two tokens of a checkpoint."""
    content = json.loads((directory / "tokenizer.json").read_text())
    ids = content["model"]["vocab"]
    ids[first], ids[second] = ids[second], ids[first]
    (directory / "tokenizer.json").write_text(json.dumps(content))


def test_vocabularies_that_differ(toys: Toys, tmp_path: Path, rejected: Rejected) -> None:
    other = Path(shutil.copytree(toys.teacher, tmp_path / "other"))
    swap_ids(other, "!", "$")
    message = rejected(f"teacher_checkpointer.checkpoint_dir={other}")
    ids = json.loads((toys.student / "tokenizer.json").read_text())["model"]["vocab"]
    difference = f"'!' is {ids['!']} for the student and {ids['$']} for the teacher"
    assert f'teacher_checkpointer.checkpoint_dir: got "{difference}", wanted the same token-to-id map' in message
    assert len(message.splitlines()) == 1


def test_the_tokenizer_of_another_model(toys: Toys, tmp_path: Path, rejected: Rejected) -> None:
    other = Path(shutil.copytree(toys.student, tmp_path / "other"))
    swap_ids(other, "!", "$")
    message = rejected(f"tokenizer.path={other}")
    assert "tokenizer.path: got" in message
    assert "wanted the tokenizer of the student" in message


def test_heads_of_different_padded_size_are_fine(toys: Toys, tmp_path: Path, write_config: WriteConfig) -> None:
    padded = tmp_path / "padded"
    save_model(padded, vocab_size=VOCABULARY + 16)
    save_tokenizer(padded)
    config = write_config(tmp_path, **{"teacher_model.vocab_size": VOCABULARY + 16, "teacher_model.embed_dim": 64})
    sizes = {"num_layers": 2, "intermediate_dim": 96}
    overrides = [f"teacher_model.{key}={value}" for key, value in sizes.items()]
    recipe = distill(config, *overrides, f"teacher_checkpointer.checkpoint_dir={padded}")
    assert recipe.step == 2


# ------------------------------------------------------------------------------------------------------------- data
def test_a_missing_data_file(rejected: Rejected) -> None:
    message = rejected("dataset.data_files=nowhere.jsonl")
    assert "dataset: got 'torchtune.datasets.text_completion_dataset', wanted a data set that can be read" in message
    assert "nowhere.jsonl" in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataset.split=train[:0]"], "wanted a data set that can be read"),
        (["dataset.column=words"], "wanted a data set that can be read. KeyError"),
        (["dataset.split=banana"], "wanted a data set that can be read. Unknown split"),
        (["dataset.sourc=json"], "wanted a data set that can be read"),
        (["dataset.packed=True", "tokenizer.max_seq_len=null"], "PackedDataset requires a max_seq_len"),
        (["gradient_accumulation_steps=13"], "dataset: got '12 micro-batches', wanted at least 13"),
        (["batch_size=25"], "dataset: got '0 micro-batches', wanted at least 1"),
        (["tokenizer.max_seq_len=129"], "got 129, wanted at most 128, the max_seq_len of `model`"),
        (["lr_scheduler._component_=torchtune.training.get_cosine_schedule_with_warmup"], "lr_scheduler: "),
    ],
)
def test_data_that_cannot_be_trained_on(overrides: list[str], message: str, rejected: Rejected) -> None:
    assert message in rejected(*overrides)


@pytest.mark.parametrize(
    ("key", "component", "message"),
    [
        ("kd_loss", "torch.nn.CrossEntropyLoss", "called with (student logits, teacher logits, labels)"),
        ("kd_loss", "builtins.object", "kd_loss: got 'object', wanted a Divergence, a function of (log_p, log_q)"),
        ("loss", "kd_recipes.losses.ForwardKL", "loss: got 'ForwardKL', wanted a loss that is called with (logits"),
    ],
)
def test_a_part_of_the_wrong_kind(key: str, component: str, message: str, rejected: Rejected) -> None:
    assert message in rejected(**{key: {"_component_": component}})


def test_a_profiler_that_cannot_be_built(rejected: Rejected) -> None:
    section = {"_component_": "torchtune.training.setup_torch_profiler", "enabled": True, "output_dir": "/dev/null/x"}
    assert "profiler: got 'torchtune.training.setup_torch_profiler', wanted" in rejected(profiler=section, loads=True)


def test_an_empty_data_set(monkeypatch: pytest.MonkeyPatch, rejected: Rejected) -> None:
    monkeypatch.setitem(sys.modules, "nothing", types.ModuleType("nothing"))
    sys.modules["nothing"].data = lambda tokenizer: []
    message = rejected(dataset={"_component_": "nothing.data"})
    assert "dataset: got '0 samples', wanted at least one sample. Look at its source, split and filter" in message


def test_an_empty_data_file(tmp_path: Path, rejected: Rejected) -> None:
    (tmp_path / "empty.jsonl").touch()
    assert "dataset: got" in rejected(f"dataset.data_files={tmp_path / 'empty.jsonl'}")


def test_packed_and_unpacked_data_do_not_mix(toys: Toys, write_config: WriteConfig, rejected: Rejected) -> None:
    section = {"_component_": "torchtune.datasets.text_completion_dataset", "source": "json", "split": "train"}
    section |= {"data_files": str(toys.data / "text.jsonl"), "cache_dir": str(toys.data / "cache")}
    message = rejected(dataset=[{**section, "packed": True}, {**section, "packed": False}])
    assert "wanted a data set that can be read. ConcatDataset can't process a mix" in message


def chat(toys: Toys) -> dict[str, Any]:
    """Conversations of which only the assistant's part is learnt."""
    section = {"_component_": "torchtune.datasets.chat_dataset", "source": "json", "split": "train"}
    section |= {"conversation_column": "messages", "conversation_style": "openai", "packed": False}
    return {**section, "data_files": str(toys.data / "chat.jsonl"), "cache_dir": str(toys.data / "cache")}


def test_all_labels_masked(toys: Toys, rejected: Rejected) -> None:
    message = rejected("tokenizer.max_seq_len=4", dataset=chat(toys))  # cut off before any answer
    assert "dataset: got '16 samples, all labels masked', wanted at least one label that is not masked" in message
    assert "max_seq_len" in message


def test_all_labels_of_the_held_out_data_masked(toys: Toys, rejected: Rejected) -> None:
    message = rejected("tokenizer.max_seq_len=4", eval_dataset=chat(toys))
    assert "eval_dataset: got '16 samples, all labels masked'" in message


def test_one_label_is_enough(toys: Toys, tmp_path: Path, write_config: WriteConfig) -> None:
    turns = [("user", "hello " * 40), ("assistant", "yes")], [("user", "a"), ("assistant", "b")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in turns]
    data = write_jsonl(tmp_path / "sorted.jsonl", [rows[0]] * 80 + [rows[1]])  # only the last has an answer
    section = {**chat(toys), "data_files": str(data), "cache_dir": str(tmp_path / "cache")}
    recipe = distill(write_config(tmp_path, dataset=section), "tokenizer.max_seq_len=32", "shuffle=False")
    assert recipe.step == 2


def test_a_sequence_that_no_limit_cuts_stops_the_run_with_a_remedy(
    tmp_path: Path, write_config: WriteConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl(tmp_path / "long.jsonl", [{"text": "the cat"}, {"text": "sat " * 2 * MAX_SEQ_LEN}])
    settings = {"dataset.data_files": str(data), "dataset.cache_dir": str(tmp_path / "cache"), "batch_size": 1}
    config = write_config(tmp_path, **settings, **{"tokenizer.max_seq_len": None})
    argv = ["--config", str(config), "shuffle=False", *SAVING]
    assert run_recipe("distill", argv) == EXIT_BAD_INPUT
    message = problems(capfd.readouterr().err)
    assert re.search(r"dataset: got 'a sequence of \d+ tokens', wanted at most 128", message)
    assert "Set tokenizer.max_seq_len=128 to cut longer ones" in message
    # what was trained before is there, and goes on under the remedy
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000001"]
    assert run_recipe("distill", [*argv, "resume_from_checkpoint=True", "tokenizer.max_seq_len=128"]) == 0


def test_the_shorter_of_both_models_counts(toys: Toys, rejected: Rejected) -> None:
    message = rejected("teacher_model.max_seq_len=64")
    assert "tokenizer.max_seq_len: got 128, wanted at most 64, the max_seq_len of `teacher_model`" in message
