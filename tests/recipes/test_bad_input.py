"""Wrong input to the distill recipe: one clear message, exit code 2, before weights load, and nothing touched."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kd_recipes import _torchtune
from kd_recipes.entry import EXIT_BAD_INPUT, EXIT_STOPPED, run_recipe
from toy import MAX_SEQ_LEN, VOCABULARY, Toys, distill, lora_section, save_model, save_tokenizer, write_jsonl

WriteConfig = Callable[..., Path]
Rejected = Callable[..., str]
SAVING = ("save_every_n_steps=1", "max_steps=2")


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """Modification time and size of a directory and all that is in it."""
    found = [directory, *directory.rglob("*")] if directory.exists() else []
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in found}


@pytest.fixture
def rejected(
    toys: Toys,
    write_config: WriteConfig,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Rejected:
    """``rejected(*overrides, **settings)`` runs into bad input and returns the problems, one a line.

    Nothing that was there is touched, nothing new is made, and no weights are loaded unless ``loads`` says that the
    mistake shows only then.
    """
    loaded: list[str] = []
    load_checkpoint = _torchtune.load_checkpoint

    def spy(section: Any) -> Any:
        loaded.append(section.checkpoint_dir)
        return load_checkpoint(section)

    monkeypatch.setattr(_torchtune, "load_checkpoint", spy)

    def run(*overrides: str, loads: bool = False, **settings: Any) -> str:
        config = write_config(tmp_path, **settings)
        run_before, checkpoints = snapshot(tmp_path / "run"), (toys.student, toys.teacher)
        before = [snapshot(path) for path in checkpoints]
        loaded.clear()
        assert run_recipe("distill", ["--config", str(config), *overrides]) == EXIT_BAD_INPUT
        assert snapshot(tmp_path / "run") == run_before
        assert [snapshot(path) for path in checkpoints] == before
        assert not list(tmp_path.glob(".run*"))
        assert bool(loaded) == loads
        return problems(capfd.readouterr().err)

    return run


def problems(stderr: str) -> str:
    """The message, without the progress bars before it."""
    assert "Traceback" not in stderr
    _, head, message = stderr.partition("kd_recipes.distill cannot run:\n")
    assert head
    assert all(line.startswith("  - ") for line in message.splitlines()), message
    return message


@pytest.fixture
def checkpoint(toys: Toys, tmp_path: Path) -> Path:
    """A copy of the student's checkpoint, to be damaged."""
    return Path(shutil.copytree(toys.student, tmp_path / "copy"))


def use(checkpoint: Path) -> str:
    """The override that makes a checkpoint the student's."""
    return f"checkpointer.checkpoint_dir={checkpoint}"


# ------------------------------------------------------------------------------------------------------- the config
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["temprature=2"], "temprature: got 'temprature', wanted a known key. Did you mean `temperature`?"),
        (["model.num_layer=3"], "model.num_layer: got 'num_layer', wanted a known argument"),
        (["model.num_layer=3"], "Did you mean `num_layers`?"),
        (["batch_size=four"], "batch_size: got 'four', wanted sequences in a micro-batch, above 0"),
        (["batch_size=0"], "batch_size: got 0, wanted sequences in a micro-batch, above 0"),
        (["batch_size=1.5"], "batch_size: got 1.5, wanted sequences in a micro-batch, above 0"),
        (["batch_size=True"], "batch_size: got True, wanted sequences in a micro-batch, above 0"),
        (["~batch_size"], "batch_size: got None, wanted sequences in a micro-batch, above 0. It has to be"),
        (["~optimizer"], "optimizer: got None, wanted a section with _component_. It has to be in the config"),
        (["optimizer=null"], "optimizer: got None, wanted a section with _component_. It has to be in the config"),
        (["optimizer.lr=fast"], "optimizer.lr: got 'fast', wanted a number"),
        (["optimizer.lr=-1"], "optimizer: got 'torch.optim.AdamW', wanted one that can be built. Invalid learning"),
        (["optimizer.lr=null"], "optimizer: got 'torch.optim.AdamW', wanted one that can be built"),
        (["shuffle=maybe"], "shuffle: got 'maybe', wanted True or False"),
        (["optimizer=AdamW"], "optimizer._component_: got 'AdamW', wanted an importable function or class"),
        (["optimizer._component_=torch.optim.AdamX"], "optimizer._component_: got 'torch.optim.AdamX', wanted"),
        (["optimizer._component_=nowhere.AdamW"], "optimizer._component_: got 'nowhere.AdamW', wanted an importable"),
        (["optimizer._component_=math.pi"], "math.pi is a float, which cannot be called"),
        (["kd_ratio=1.5"], "kd_ratio: got 1.5, wanted a number in [0, 1]"),
        (["kd_ratio=-0.1"], "kd_ratio: got -0.1, wanted a number in [0, 1]"),
        (["kd_ratio=.nan"], "kd_ratio: got nan, wanted a number in [0, 1]"),
        (["temperature=0"], "temperature: got 0, wanted a number above 0"),
        (["temperature=-1"], "temperature: got -1, wanted a number above 0"),
        (["temperature=.nan"], "temperature: got nan, wanted a number above 0"),
        (["temperature=nan"], "temperature: got"),
        (["temperature=.inf"], "temperature: got inf, wanted a number above 0"),
        (["clip_grad_norm=-1"], "clip_grad_norm: got -1, wanted a number above 0"),
        (["clip_grad_norm=tight"], "clip_grad_norm: got 'tight', wanted a number above 0"),
        (["clip_grad_norm=[1]"], "clip_grad_norm: got [1], wanted a number above 0"),
        (["seed=-1"], "seed: got -1, wanted a whole number from 0"),
        (["cudnn_deterministic_mode=often"], "cudnn_deterministic_mode: got 'often', wanted default, warn or error"),
        (["dtype=fp16"], "dtype: got 'fp16', wanted auto, bf16 or fp32"),
        (["best_metric=bleu"], "best_metric: got 'bleu', wanted objective, perplexity or kl"),
        (["seed=${sed}"], "seed: got 'an interpolation', wanted one that resolves. Interpolation key 'sed' not found"),
        (["recipe=distil"], "recipe: got 'distil', wanted `distill`, as on the command line"),
        (["noequals"], "overrides: got ['noequals'], wanted key=value or ~key"),
        (["--lr", "1"], "flags are not settings: ['--lr']; write key=value"),
    ],
)
def test_a_wrong_setting_is_named_with_what_was_wanted(rejected: Rejected, overrides: list[str], message: str) -> None:
    assert message in rejected(*overrides)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "AdamW"}, "optimizer: got 'AdamW', wanted a section with _component_"),
        ({"optimizer": {"lr": 1}}, "optimizer: got {'lr': 1}, wanted a section with _component_"),
        ({"dataset": []}, "dataset: got [], wanted at least one section with _component_"),
        ({"dataset": ["alpaca"]}, "dataset[0]: got 'alpaca', wanted a section with _component_"),
        ({"output_dir": "???"}, "Missing mandatory value: output_dir"),
        ({"output_dir": 5}, "output_dir: got 5, wanted a directory for everything that the run writes"),
        ({"1": 5}, "1: got '1', wanted a known key"),
    ],
)
def test_a_wrong_setting_in_the_file(rejected: Rejected, settings: dict[str, Any], message: str) -> None:
    assert message in rejected(**settings)


def test_several_mistakes_are_reported_at_once(rejected: Rejected) -> None:
    message = rejected("temprature=2", "batch_size=four", "model.num_layer=3", "kd_ratio=2", "~tokenizer")
    found = [line.split(": ")[0].removeprefix("  - ") for line in message.splitlines()]
    assert {"temprature", "batch_size", "model.num_layer", "kd_ratio", "tokenizer"} <= set(found)


def test_mistakes_about_files_are_reported_at_once(rejected: Rejected) -> None:
    message = rejected(
        "device=banana", "teacher_device=mars", "checkpointer.checkpoint_dir=nowhere", "output_dir=/dev/null"
    )
    found = [line.split(": ")[0].removeprefix("  - ") for line in message.splitlines()]
    assert found == ["device", "teacher_device", "output_dir", "checkpointer.checkpoint_dir"]


def test_a_missing_config_names_those_that_there_are(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_recipe("distill", ["--config", "quickstrt"]) == EXIT_BAD_INPUT
    message = "--config: got 'quickstrt', wanted a YAML file. Shipped configs: quickstart"
    assert message in problems(capfd.readouterr().err)


@pytest.mark.parametrize("text", ["model: [", "a: b: c", "- one\n- two\n", "just words", "\x00", "", "1: 2"])
def test_a_file_that_is_no_yaml_mapping(text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert run_recipe("distill", ["--config", str(tmp_path / "config.yaml")]) == EXIT_BAD_INPUT
    assert problems(capfd.readouterr().err)


def test_a_run_from_the_command_line_ends_with_the_message_alone(write_config: WriteConfig, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kd_recipes", "--config", str(write_config(tmp_path)), "kd_ratio=2"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == EXIT_BAD_INPUT
    assert result.stdout == ""
    assert result.stderr.splitlines()[-2:] == [
        "kd_recipes.distill cannot run:",
        "  - kd_ratio: got 2, wanted a number in [0, 1]",
    ]
    assert "Traceback" not in result.stderr


def test_an_unknown_recipe_lists_the_known_ones(write_config: WriteConfig, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kd_recipes", "--config", str(write_config(tmp_path)), "recipe=distell"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == EXIT_BAD_INPUT
    assert "recipe: got 'distell', wanted one of compress, distill" in result.stderr
    assert "Did you mean `distill`?" in result.stderr
    assert "Traceback" not in result.stderr


# ----------------------------------------------------------------------------------------------- device and teacher
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda(rejected: Rejected) -> None:
    assert "device: got 'cuda', wanted a device that is there. torch sees no CUDA device" in rejected("device=cuda")


@pytest.mark.parametrize("device", ["banana", "meta", "cpu:x", "xpu", ""])
def test_no_such_device(device: str, rejected: Rejected) -> None:
    assert f"device: got {device!r}, wanted a device" in rejected(f"device='{device}'")


def test_distilling_needs_a_teacher(rejected: Rejected) -> None:
    message = rejected("~teacher_model", "~teacher_checkpointer")
    assert "teacher_model: got None, wanted a teacher, since kd_ratio is 0.5. kd_ratio=0 trains on labels" in message
    assert "teacher_checkpointer: got None, wanted a teacher" in message
    assert "teacher_checkpointer: got None" in rejected("~teacher_checkpointer", "kd_ratio=0")  # half a teacher


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
        ("kd_loss", "builtins.object", "kd_loss: got 'object', wanted a loss that is called with (distributions)"),
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


# -------------------------------------------------------------------------------------------------- output directory
def test_a_directory_that_holds_another_run(write_config: WriteConfig, tmp_path: Path, rejected: Rejected) -> None:
    distill(write_config(tmp_path), "max_steps=1")
    shutil.copytree(tmp_path / "run", tmp_path / "kept")
    message = rejected("device=banana")
    assert "output_dir: got" in message
    assert "wanted a directory that holds no other run" in message
    assert "resume_from_checkpoint=True" in message
    assert "device: got 'banana'" in message


@pytest.mark.parametrize("name", ["final", "best", "checkpoints"])
def test_results_without_a_run_are_not_written_over(name: str, tmp_path: Path, rejected: Rejected) -> None:
    (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / name / "precious.txt").write_text("mine")
    assert "wanted a directory that holds no other run" in rejected()


def test_an_output_directory_inside_a_checkpoint(toys: Toys, rejected: Rejected) -> None:
    message = rejected(f"output_dir={toys.student}")
    assert f"wanted a directory outside checkpointer.checkpoint_dir ({toys.student})" in message
    message = rejected(f"output_dir={toys.teacher}/runs/first")
    assert f"wanted a directory outside teacher_checkpointer.checkpoint_dir ({toys.teacher})" in message
    assert not (toys.teacher / "runs").exists()


def test_a_student_is_not_read_from_where_it_will_be_written(
    write_config: WriteConfig, tmp_path: Path, toys: Toys, rejected: Rejected
) -> None:
    distill(write_config(tmp_path), *SAVING)
    files = "[model-00001-of-00001.safetensors]"
    message = rejected(
        use(tmp_path / "run" / "final"), f"checkpointer.checkpoint_files={files}", "resume_from_checkpoint=True"
    )
    assert "wanted a checkpoint that the run does not write over" in message


@pytest.mark.parametrize("path", ["file", "file/below"])
def test_an_output_directory_that_is_a_file(path: str, tmp_path: Path, rejected: Rejected) -> None:
    (tmp_path / "file").write_text("mine")
    assert f"output_dir: got '{tmp_path / path}', wanted a" in rejected(f"output_dir={tmp_path / path}")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_an_output_directory_that_nobody_can_make(rejected: Rejected) -> None:
    message = rejected("output_dir=/proc/kd_recipes")
    assert "output_dir: got '/proc/kd_recipes', wanted a place that can be written to" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_directory_without_permission(tmp_path: Path, rejected: Rejected) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "wanted a place that can be written to" in rejected(f"output_dir={tmp_path / 'locked' / 'run'}")


def test_a_logger_that_cannot_be_built_leaves_nothing(rejected: Rejected) -> None:
    logger = {"_component_": "importlib.import_module", "name": "wandb_that_is_not_installed"}
    message = rejected(metric_logger=logger, loads=True)
    assert "metric_logger: got 'importlib.import_module', wanted one that can be built. No module named" in message


# ----------------------------------------------------------------------------------------------------------- resume
def test_resuming_where_there_is_no_run(rejected: Rejected) -> None:
    message = rejected("resume_from_checkpoint=True")
    assert "resume_from_checkpoint: got True, wanted a checkpoint in" in message
    assert "Set resume_from_checkpoint=False to start anew" in message


def test_resuming_a_run_without_a_checkpoint(write_config: WriteConfig, tmp_path: Path, rejected: Rejected) -> None:
    distill(write_config(tmp_path), "max_steps=1")
    message = rejected("resume_from_checkpoint=True")
    assert "resume_from_checkpoint: got True, wanted a checkpoint in" in message
    assert f"delete {tmp_path / 'run'}" in message


@pytest.mark.parametrize("name", ["weights.safetensors", "state.pt"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_resumes(
    name: str, damage: str, write_config: WriteConfig, tmp_path: Path, rejected: Rejected
) -> None:
    distill(write_config(tmp_path), *SAVING)
    newest = tmp_path / "run" / "checkpoints" / "step_00000002"
    content = (newest / name).read_bytes()
    (newest / name).unlink()
    if damage == "truncated":
        (newest / name).write_bytes(content[: len(content) // 2])
    message = rejected("resume_from_checkpoint=True")
    assert f"resume_from_checkpoint: got '{newest}', wanted a checkpoint that is whole" in message
    assert "others here: ['step_00000001']" in message
    shutil.rmtree(newest)  # the remedy
    assert distill(tmp_path / "config.yaml", *SAVING, "resume_from_checkpoint=True").step == 2


@pytest.mark.parametrize(
    "override", ["optimizer._component_=torch.optim.SGD", "model._component_=kd_recipes.models.lora_llama"]
)
def test_resuming_with_another_optimizer_or_student(
    override: str, toys: Toys, write_config: WriteConfig, tmp_path: Path, rejected: Rejected
) -> None:
    distill(write_config(tmp_path), "save_every_n_steps=1", "max_steps=1")
    settings = {"model": lora_section(toys.student)} if override.startswith("model") else {}
    message = rejected("resume_from_checkpoint=True", override, *SAVING, loads=True, **settings)
    assert "resume_from_checkpoint: got True, wanted a checkpoint of the same model, optimizer and data" in message


# ------------------------------------------------------------------------------------------------------ a full disk
@pytest.fixture
def small_disk() -> Iterator[Callable[[int], Path]]:
    """``small_disk(kib)`` mounts a file system of that size."""
    mounted: list[str] = []

    def mount(kib: int) -> Path:
        directory = tempfile.mkdtemp(prefix="kd_recipes_disk")
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", directory]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("no mount command here")
        if done.returncode:
            os.rmdir(directory)
            pytest.skip(f"not allowed to mount a small disk: {done.stderr.strip()}")
        mounted.append(directory)
        return Path(directory)

    yield mount
    for directory in mounted:
        subprocess.run(["umount", directory], check=True)
        os.rmdir(directory)


def test_no_room_is_known_before_anything_is_loaded(small_disk: Callable[[int], Path], rejected: Rejected) -> None:
    disk = small_disk(64)
    message = rejected(f"output_dir={disk / 'run'}")
    assert f"output_dir: got '{disk / 'run'}', wanted a place with" in message
    assert "Free some space or choose another disk" in message
    assert not list(disk.iterdir())


def test_a_resumed_run_needs_no_room_for_what_it_writes_over(
    small_disk: Callable[[int], Path], write_config: WriteConfig, tmp_path: Path
) -> None:
    disk = small_disk(6 * 1024)
    overrides = [f"output_dir={disk / 'run'}", "save_every_n_steps=1", "keep_last_n_checkpoints=1"]
    distill(write_config(tmp_path), *overrides, "max_steps=2")
    free = shutil.disk_usage(disk).free
    (disk / "ballast").write_bytes(b"\0" * (free - 1800 * 1024))
    assert distill(tmp_path / "config.yaml", *overrides, "max_steps=3", "resume_from_checkpoint=True").step == 3


@pytest.mark.parametrize("free_kib", [40, 700])  # the weights do not fit; they do, and the optimizer's state does not
def test_a_disk_that_fills_up_leaves_the_last_checkpoint_to_resume_from(
    free_kib: int, small_disk: Callable[[int], Path], write_config: WriteConfig, tmp_path: Path
) -> None:
    disk = small_disk(16 * 1024)
    run = disk / "run"
    overrides = [f"output_dir={run}", "save_every_n_steps=1", "keep_last_n_checkpoints=2"]
    config = write_config(tmp_path)
    distill(config, *overrides, "max_steps=1")
    shutil.rmtree(run / "final")
    before = snapshot(run / "checkpoints" / "step_00000001")
    argv = ["--config", str(config), *overrides, "max_steps=3", "resume_from_checkpoint=True"]
    # another program takes the room after the check for it
    code = f"""
import shutil
from pathlib import Path
from kd_recipes import distill, entry
prepare = distill.DistillRecipe.setup
def setup(self, cfg):
    prepare(self, cfg)
    free = shutil.disk_usage("{disk}").free
    Path("{disk}/ballast").write_bytes(b"0" * (free - {free_kib} * 1024))
distill.DistillRecipe.setup = setup
raise SystemExit(entry.run_recipe("distill", {argv!r}))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == EXIT_STOPPED, result.stderr
    assert "kd_recipes.distill stopped:" in result.stderr
    assert os.strerror(errno.ENOSPC) in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000001"]  # no temporary ones either
    assert snapshot(run / "checkpoints" / "step_00000001") == before
    (disk / "ballast").unlink()
    assert distill(config, *overrides, "max_steps=3", "resume_from_checkpoint=True").step == 3


# ------------------------------------------------------------------------------------------------------- not finite
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(
    write_config: WriteConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path)
    distill(config, "save_every_n_steps=1", "max_steps=1")
    before = snapshot(tmp_path / "run" / "checkpoints")
    argv = ["--config", str(config), "resume_from_checkpoint=True", "max_steps=9", "optimizer.lr=1e30"]
    capfd.readouterr()
    code = run_recipe("distill", argv)
    stderr = capfd.readouterr().err
    assert code == EXIT_STOPPED, stderr
    assert "Traceback" not in stderr
    assert re.search(
        r"distill stopped:\n  - step 3: loss \S+, gradient norm (nan|inf); the weights are those of step 2", stderr
    )
    assert "Lower optimizer.lr" in stderr
    assert snapshot(tmp_path / "run" / "checkpoints") == before
    assert distill(config, "resume_from_checkpoint=True", "max_steps=3").step == 3
