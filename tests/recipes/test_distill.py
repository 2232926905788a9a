"""The distill recipe as a user runs it, on toy models: what it trains, measures, and leaves behind."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from kd_recipes.batch import Batch
from kd_recipes.distill import DistillRecipe
from kd_recipes.entry import EXIT_BAD_INPUT, run_recipe
from toy import Toys, distill, logged, lora_section, prepare, run_tune, sentence, tensorboard_scalars, write_jsonl

WriteConfig = Callable[..., Path]


# ------------------------------------------------------------------------------------------- as `tune run` starts it
@pytest.mark.parametrize("name", ["kd_recipes.distill", "kd_recipes/distill", "kd_recipes/distill.py"])
def test_tune_runs_it_by_each_name_with_overrides_from_another_directory(
    name: str, write_config: WriteConfig, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    result = run_tune(
        "run", name, "--config", str(write_config(tmp_path)), "max_steps=1", "optimizer.lr=0.25", cwd=elsewhere
    )
    assert result.returncode == 0, result.stderr
    assert "Student after 1 steps" in result.stdout
    assert set(logged(tmp_path / "run")) == {1}
    assert logged(tmp_path / "run")[1]["optimizer/lr"] == 0.25
    assert load_file(tmp_path / "run" / "final" / "model-00001-of-00001.safetensors")
    assert not list(elsewhere.iterdir())


def test_another_recipe_is_refused_in_two_processes(write_config: WriteConfig, tmp_path: Path) -> None:
    config = str(write_config(tmp_path, recipe="compress"))
    result = run_tune("run", "--nproc_per_node", "2", "kd_recipes.compress", "--config", config, cwd=tmp_path)
    assert result.returncode != 0
    assert "kd_recipes.compress cannot run:" in result.stderr
    assert "--nproc_per_node: got 2, wanted 1: `compress` runs in a single process" in result.stderr
    assert "kd_recipes/" not in result.stderr  # no frame of ours in a traceback; torchrun's own summary is torchrun's
    assert not (tmp_path / "run").exists()


def test_an_unknown_recipe_is_an_error_that_names_the_nearest(write_config: WriteConfig, tmp_path: Path) -> None:
    result = run_tune("run", "kd_recipes.distil", "--config", str(write_config(tmp_path)), cwd=tmp_path)
    assert result.returncode == EXIT_BAD_INPUT
    assert "recipe" in result.stderr
    assert "Did you mean `distill`?" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_config_of_another_recipe_is_refused(
    write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, recipe="compress")
    assert run_recipe("distill", ["--config", str(config)]) == EXIT_BAD_INPUT
    assert "recipe: got 'compress', wanted `distill`, as on the command line" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------- kinds of student
def _student(kind: str, toys: Toys) -> dict[str, Any]:
    """Overrides that make the toy config's student one of this kind."""
    if kind == "full":
        return {}
    if kind == "qlora":  # NF4 quantizes blocks of 64 weights, scales in blocks of 256
        section = lora_section(toys.wide, quantize_base=True)
        return {"model": section, "checkpointer.checkpoint_dir": str(toys.wide), "dtype": "bf16"}
    return {"model": lora_section(toys.student, use_dora=kind == "dora")}


def _snapshot(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _logits(recipe: DistillRecipe, tokens: Tensor) -> Tensor:
    """Of the student as trained, in float32."""
    recipe.student.model.eval()
    with torch.no_grad():
        return recipe.student(Batch(tokens, tokens)).logits.compute().unflatten(0, tokens.shape).float()


def _greedy(recipe: DistillRecipe, tokens: Tensor, num_tokens: int) -> Tensor:
    for _ in range(num_tokens):
        tokens = torch.cat((tokens, _logits(recipe, tokens)[:, -1:].argmax(-1)), dim=1)
    return tokens


def _load_exported(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()


# Norm of the logits' difference, relative to theirs. In float32 it is rounding. QLoRA students compute in bf16 (8 bits)
# from weights that are dequantized, merged with the adapter and rounded once more for the export.
LOGIT_TOLERANCE = {"full": 1e-5, "lora": 1e-5, "dora": 1e-5, "qlora": 0.05}  # NF4; 0.02 to 0.035, by the processor


@pytest.mark.parametrize("kind", ["full", "lora", "dora", "qlora"])
def test_a_student_learns_and_its_export_is_what_was_trained(
    kind: str, toys: Toys, write_config: WriteConfig, tmp_path: Path
) -> None:
    data = write_jsonl(tmp_path / "four.jsonl", [{"text": sentence(i)} for i in range(4)])
    overrides = {"dataset.data_files": str(data), "batch_size": 4, "epochs": 8, "max_steps": None}
    overrides |= {"optimizer.lr": 3e-3 if kind == "full" else 1e-2, **_student(kind, toys)}
    recipe = prepare(write_config(tmp_path, **overrides))
    before, teacher_before = _snapshot(recipe.student.model), _snapshot(recipe._teacher.model)
    recipe.train()
    recipe.cleanup()

    losses = [step["loss/total"] for _, step in sorted(logged(tmp_path / "run").items())]
    assert len(losses) == 8
    assert losses[1] < losses[0]
    assert losses[-1] < 0.8 * losses[0]

    after = _snapshot(recipe.student.model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(recipe.student.trainable())
    assert all(("lora" in name or "magnitude" in name) == (kind != "full") for name in changed)
    assert not recipe._teacher.model.training
    assert all(torch.equal(tensor, teacher_before[name]) for name, tensor in _snapshot(recipe._teacher.model).items())

    exported = _load_exported(tmp_path / "run" / "final")
    prompt = torch.tensor([recipe._tokenizer.encode(sentence(5, 6), add_eos=False)])
    with torch.no_grad():
        logits, expected = exported(prompt).logits.float(), _logits(recipe, prompt)
    difference = ((logits - expected).norm() / expected.norm()).item()
    largest = (logits - expected).abs().max().item()
    print(
        f"\n{kind}: logits differ by {difference:.1e}, at most {largest:.1e} with a deviation of {expected.std():.1f}"
    )
    assert difference < LOGIT_TOLERANCE[kind]
    exported.generation_config.eos_token_id = None  # nothing is to stop it early
    mask = torch.ones_like(prompt)
    continuation = exported.generate(prompt, attention_mask=mask, max_new_tokens=12, do_sample=False)
    same = len(prompt[0]) + (
        12 if kind != "qlora" else 6
    )  # rounded to NF4 or not, near ties are decided otherwise in time
    assert continuation[:, :same].tolist() == _greedy(recipe, prompt, 12)[:, :same].tolist()
    # an adapter beside the merged weights would be applied once more by transformers wherever peft is installed
    assert not (tmp_path / "run" / "final" / "adapter_config.json").exists()
    assert (tmp_path / "run" / "final" / "adapter" / "adapter_config.json").exists() == (kind != "full")


def test_save_adapter_weights_only_leaves_the_rest_out(toys: Toys, write_config: WriteConfig, tmp_path: Path) -> None:
    overrides = {"model": lora_section(toys.student), "save_adapter_weights_only": True, "max_steps": 1}
    distill(write_config(tmp_path, **overrides))
    names = {path.name for path in (tmp_path / "run" / "final").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert not [name for name in names if name.startswith("model")]


# ---------------------------------------------------------------------------------------------------------- data sets
def test_a_packed_run_trains_on_what_an_unpacked_one_does(write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(tmp_path, max_steps=1, **{"dataset.split_across_pack": False})
    distill(config, "batch_size=24")
    packed = ["dataset.packed=True", "batch_size=1", f"output_dir={tmp_path / 'packed'}"]
    num_packs = len(prepare(config, *packed)._loader)
    assert num_packs < 24
    distill(config, *packed, f"output_dir={tmp_path / 'all_packs'}", f"gradient_accumulation_steps={num_packs}")
    whole, packed_whole = logged(tmp_path / "run")[1], logged(tmp_path / "all_packs")[1]
    for name in ("loss/cross_entropy", "loss/divergence", "quality/accuracy", "optimizer/grad_norm"):
        assert packed_whole[name] == pytest.approx(whole[name], rel=1e-5), name


def _oracle_labels(toys: Toys, file: str, prompt: Callable[[dict[str, Any]], list[dict[str, str]]]) -> int:
    """How many tokens of a file the model answers with, by transformers' own chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(toys.student)
    count = 0
    for line in (toys.data / file).read_text().splitlines():
        messages = prompt(json.loads(line))
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                texts = (tokenizer.apply_chat_template(messages[:end], tokenize=False) for end in (index, index + 1))
                lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
                count += lengths[1] - lengths[0]
        count += 1  # EOS, which this template does not write
    return count


CHAT = {"_component_": "torchtune.datasets.chat_dataset", "conversation_style": "openai"}
INSTRUCT = {"_component_": "torchtune.datasets.instruct_dataset"}


@pytest.mark.parametrize(
    ("section", "prompt"),
    [
        (
            {**INSTRUCT, "column_map": {"input": "instruction", "output": "output"}, "train_on_input": False},
            lambda row: [
                {"role": "user", "content": row["instruction"]},
                {"role": "assistant", "content": row["output"]},
            ],
        ),
        ({**CHAT, "conversation_column": "messages", "train_on_input": False}, lambda row: row["messages"]),
    ],
    ids=["instruct", "chat"],
)
def test_conversations_train_on_the_answers_alone(
    section: dict[str, Any], prompt: Any, toys: Toys, write_config: WriteConfig, tmp_path: Path
) -> None:
    file = "chat.jsonl" if "chat" in section["_component_"] else "instruct.jsonl"
    source = {"source": "json", "split": "train", "data_files": str(toys.data / file)}
    dataset = {**section, **source, "cache_dir": str(toys.data / "cache")}
    recipe = distill(write_config(tmp_path, dataset=dataset, batch_size=8, max_steps=None, seed=None))
    assert recipe.step == 2
    steps = logged(tmp_path / "run")
    num_tokens = sum(step["throughput/tokens_per_second"] * step["time/step"] for step in steps.values())
    assert round(num_tokens) == _oracle_labels(toys, file, prompt)
    assert all(math.isfinite(step["loss/total"]) for step in steps.values())


# ------------------------------------------------------------------------------------------- what must change nothing
def _losses(config: Path, *overrides: str) -> list[float]:
    recipe = distill(config, *overrides)
    return [step["loss/total"] for _, step in sorted(logged(Path(recipe._cfg.output_dir)).items())]


def test_activation_checkpointing_changes_nothing(write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(tmp_path, **{"model.attn_dropout": 0.1}, max_steps=3)
    plain = _losses(config)
    names = set(load_file(tmp_path / "run" / "final" / "model-00001-of-00001.safetensors"))
    recomputed = _losses(config, "enable_activation_checkpointing=True", f"output_dir={tmp_path / 'again'}")
    assert recomputed == plain
    assert set(load_file(tmp_path / "again" / "final" / "model-00001-of-00001.safetensors")) == names


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile looks at it while it traces
def test_compile_changes_nothing(write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(tmp_path, max_steps=3, eval_dataset=None)
    plain = _losses(config)
    start = time.perf_counter()
    compiled = _losses(config, "compile=True", f"output_dir={tmp_path / 'compiled'}")
    print(f"\ncompile: {time.perf_counter() - start:.0f} s")
    assert compiled == pytest.approx(plain, rel=1e-5)
    exported = (load_file(tmp_path / run / "final" / "model-00001-of-00001.safetensors") for run in ("run", "compiled"))
    assert len({frozenset(tensors) for tensors in exported}) == 1


# ------------------------------------------------------------------------------------------------ held-out evaluation
def _held_out(toys: Toys, path: Path) -> dict[str, Any]:
    section = OmegaConf.create({"_component_": "torchtune.datasets.text_completion_dataset", "source": "json"})
    return {**section, "split": "train", "data_files": str(path), "cache_dir": str(toys.data / "cache")}


def _oracle(student: Path, teacher: Path, file: Path) -> dict[str, float]:
    """From transformers' logits, one text at a time: no batch, no padding, no code of ours."""
    models = [_load_exported(path) for path in (student, teacher)]
    tokenizer = Tokenizer.from_file(str(student / "tokenizer.json"))
    sums = dict.fromkeys(("cross_entropy", "kl", "agreement", "accuracy"), 0.0)
    num_tokens = 0
    for line in file.read_text().splitlines():
        ids = torch.tensor([*tokenizer.encode(json.loads(line)["text"]).ids, tokenizer.token_to_id("<|endoftext|>")])
        with torch.no_grad():
            student_SV, teacher_SV = (model(ids[None]).logits[0, :-1].double() for model in models)
        log_p, log_q = F.log_softmax(teacher_SV, -1), F.log_softmax(student_SV, -1)
        sums["cross_entropy"] += F.nll_loss(log_q, ids[1:], reduction="sum").item()
        sums["kl"] += F.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
        sums["agreement"] += (student_SV.argmax(-1) == teacher_SV.argmax(-1)).sum().item()
        sums["accuracy"] += (student_SV.argmax(-1) == ids[1:]).sum().item()
        num_tokens += len(ids) - 1
    means = {name: value / num_tokens for name, value in sums.items()}
    return {**means, "perplexity": math.exp(means["cross_entropy"])}


def test_held_out_values_are_those_of_an_oracle_and_reachtensorboard_scalars(
    toys: Toys, write_config: WriteConfig, tmp_path: Path
) -> None:
    # the teacher is the student before training, so that they agree on some tokens at the end and not on others
    file, teacher = toys.data / "held_out.jsonl", toys.student
    overrides = {"teacher_model": "${model}", "teacher_checkpointer": "${checkpointer}", "optimizer.lr": 3e-3}
    logger = {"_component_": "torchtune.training.metric_logging.TensorBoardLogger", "log_dir": "${output_dir}/logs"}
    overrides |= {"metric_logger": logger, "temperature": 2.0, "max_steps": 3, "batch_size": 4}
    distill(write_config(tmp_path, eval_dataset=_held_out(toys, file), eval_every_n_steps=2, **overrides))
    run = tmp_path / "run"
    scalars = tensorboard_scalars(run)
    assert set(scalars["held_out/perplexity"]) == {0, 2, 3}
    assert set(scalars["loss/total"]) == {1, 2, 3}
    expected = {0: _oracle(toys.student, teacher, file), 3: _oracle(run / "final", teacher, file)}
    for step, oracle in expected.items():
        for name, value in oracle.items():
            assert scalars[f"held_out/{name}"][step] == pytest.approx(value, rel=1e-5, abs=1e-9), (step, name)
    assert expected[0]["agreement"] == 1
    assert 0.1 < expected[3]["agreement"] < 0.9
    recorded = json.loads((run / "final" / "held_out.json").read_text())
    assert {name: recorded[name] for name in expected[3]} == pytest.approx(expected[3], rel=1e-5)


def test_best_is_the_best_and_final_the_last(toys: Toys, write_config: WriteConfig, tmp_path: Path) -> None:
    # at this learning rate two sentences are soon learnt by heart, to the loss of all other text
    data = write_jsonl(tmp_path / "train.jsonl", [{"text": sentence(i)} for i in range(2)])
    overrides = {
        "dataset.data_files": str(data),
        "epochs": 12,
        "max_steps": None,
        "optimizer.lr": 3e-2,
        "kd_ratio": 0.2,
    }
    held_out = _held_out(toys, toys.data / "held_out.jsonl")
    overrides |= {"eval_dataset": held_out, "eval_every_n_steps": 1, "best_metric": "perplexity"}
    recipe = distill(write_config(tmp_path, **overrides))
    scores = {step: held_out.perplexity for step, held_out in recipe._held_out.items()}
    best = min(scores, key=scores.__getitem__)
    assert 0 < best < 12, scores
    run = tmp_path / "run"
    assert json.loads((run / "best" / "held_out.json").read_text())["step"] == best
    assert json.loads((run / "final" / "held_out.json").read_text())["step"] == 12
    short = distill(write_config(tmp_path, **overrides, output_dir=str(tmp_path / "short")), f"max_steps={best}")
    files = (path / "model-00001-of-00001.safetensors" for path in (run / "best", short._run.path / "final"))
    at_best, at_step = (load_file(file) for file in files)
    assert all(torch.equal(at_best[name], at_step[name]) for name in at_step)
    last = load_file(run / "final" / "model-00001-of-00001.safetensors")
    assert not any(torch.equal(at_best[name], last[name]) for name in last)


# ------------------------------------------------------------------------------------------------ teacher, precision
def test_kd_ratio_0_needs_no_teacher(write_config: WriteConfig, tmp_path: Path) -> None:
    recipe = distill(write_config(tmp_path, kd_ratio=0))
    assert recipe._teacher is None
    none = {"teacher_model": None, "teacher_checkpointer": None, "output_dir": str(tmp_path / "none")}
    distill(write_config(tmp_path, kd_ratio=0, **none))
    for step, metrics in logged(tmp_path / "none").items():
        assert metrics["loss/total"] == logged(tmp_path / "run")[step]["loss/total"]
        assert metrics["loss/total"] == pytest.approx(metrics["loss/cross_entropy"], rel=1e-6)


def test_kd_ratio_0_still_compares_held_out_text_with_the_teacher(
    toys: Toys, write_config: WriteConfig, tmp_path: Path
) -> None:
    held_out = _held_out(toys, toys.data / "held_out.jsonl")
    recipe = distill(write_config(tmp_path, kd_ratio=0, eval_dataset=held_out, max_steps=1))
    assert recipe._held_out[1].kl > 0


def test_the_teacher_has_its_own_dtype(write_config: WriteConfig, tmp_path: Path) -> None:
    recipe = distill(write_config(tmp_path, teacher_dtype="bf16", max_steps=1))
    assert {p.dtype for p in recipe._teacher.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in recipe.student.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("master_weights", [True, False])
def test_master_weights_keep_updates_that_bf16_loses(
    master_weights: bool, write_config: WriteConfig, tmp_path: Path
) -> None:
    # AdamW moves each weight by about lr a step: 40 steps of 2e-5 are 8e-4, the spacing of bf16 numbers near 0.2
    data = write_jsonl(tmp_path / "four.jsonl", [{"text": sentence(i)} for i in range(4)])
    overrides = {"dtype": "bf16", "master_weights": master_weights, "max_steps": 40, "epochs": 40}
    overrides |= {"dataset.data_files": str(data), "batch_size": 4}
    recipe = prepare(write_config(tmp_path, **overrides, **{"optimizer.lr": 2e-5, "optimizer.weight_decay": 0.0}))
    before = {name: tensor.detach().clone() for name, tensor in recipe.student.trainable().items()}
    recipe.train()
    recipe.cleanup()
    dtypes = {p.dtype for group in recipe._updates.optimizer.param_groups for p in group["params"]}
    assert dtypes == {torch.float32 if master_weights else torch.bfloat16}
    after = recipe.student.trainable()
    name = "layers.0.attn.q_proj.weight"
    large = before[name].abs() > 0.125
    moved = (before[name] != after[name])[large].float().mean().item()
    print(f"\nmaster_weights {master_weights}: {moved:.0%} of the weights above 1/8 have moved")
    assert moved > 0.2 if master_weights else moved == 0
    if master_weights:
        distance = (recipe._updates.parameters[name] - before[name].float()).abs().mean().item()
        assert 1e-4 < distance < 40 * 2e-5 * 1.5
