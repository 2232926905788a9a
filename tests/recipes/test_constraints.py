"""What a student's weights are held to while it is distilled, as a user asks for it, in one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from kd_recipes.batch import Batch
from kd_recipes.compression import (
    LowRank,
    Quantization,
    Sparsification,
    Step,
    ToDense,
    WidthPruning,
    form_of,
    read_checkpoint,
    sections,
)
from kd_recipes.compression.form import zero_pattern
from kd_recipes.entry import run_recipe
from kd_recipes.errors import ConfigError
from kd_recipes.models import from_checkpoint
from kd_recipes.parts import load_model
from toy import Interrupted, Toys, calibration, distill, logged, save_model, save_tokenizer, text_section

WriteConfig = Callable[..., Path]
COMPRESSION = "kd_recipes.compression"
TOKENS = torch.arange(40).reshape(2, 20) * 7 % 300
GRADUAL = {"_component_": f"{COMPRESSION}.GradualSparsity"}
KEEP = {"_component_": f"{COMPRESSION}.KeepZeros"}
Q4 = {
    "_component_": f"{COMPRESSION}.QuantizationAwareTraining",
    "scheme": "gguf_q4_0",
    "embeddings": "gguf_q8_0",
}
SCHEMES = {
    "q4": Q4,
    "ternary": {**Q4, "scheme": "ternary_g32", "embeddings": None},
    "8da4w": {**Q4, "scheme": "8da4w_g32", "embeddings": "8da4w_g32"},
    "mixed": {**Q4, "scheme": "int2_g16", "overrides": {"layers.0.*": None, "*.w2": "float8", "tok_*": "int3"}},
}


def student(checkpoint: Path, constraints: Any = None, **settings: Any) -> dict[str, Any]:
    """Overrides that make a directory of the compress recipe the student."""
    place = {"checkpoint_dir": str(checkpoint)}
    checkpointer = {**place, "checkpoint_files": ["model.safetensors"], "output_dir": "${output_dir}"}
    return {
        "model": {"_component_": "kd_recipes.models.from_checkpoint", **place},
        "checkpointer": {"_component_": f"{COMPRESSION}.CompressedCheckpointer", **checkpointer},
        "student_constraints": constraints,
        **settings,
    }


def compressed(toys: Toys, directory: Path, step: Step) -> Path:
    """What a step makes of the toy student."""
    step.apply(read_checkpoint(toys.student), directory, calibration([(TOKENS, None)]))
    return directory


@pytest.fixture
def sparse(toys: Toys, tmp_path: Path) -> Path:
    """A student that has lost two of four."""
    return compressed(toys, tmp_path / "sparse", Sparsification(pattern="2:4"))


def linears(directory: Path) -> dict[str, Tensor]:
    """The weights of the blocks' linear layers in a directory, codes as what they stand for."""
    cfg = sections(directory)
    device = torch.device("cpu")
    loaded = load_model("model", cfg.model, cfg.checkpointer, dtype=torch.float32, device=device)
    state = loaded.model.state_dict()
    return {name: weight for name, weight in state.items() if name.startswith("layers.") and weight.ndim == 2}


def zeros(directory: Path) -> dict[str, Tensor]:
    """Where those are zero."""
    return {name: weight == 0 for name, weight in linears(directory).items()}


def same_files(one: Path, other: Path) -> None:
    """Every tensor of two directories, bit for bit."""
    first, second = (load_file(path / "model.safetensors") for path in (one, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def interrupt_and_resume(config: Path, run: Path, *overrides: str) -> None:
    """Break a run of six steps off after the fourth, and go on from the third."""
    words = [*overrides, f"output_dir={run}", "save_every_n_steps=3"]
    breaking = ["metric_logger._component_=toy.InterruptingLogger", "metric_logger.stop_at=4"]
    with pytest.raises(Interrupted):
        distill(config, *words, *breaking)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000003"]
    assert distill(config, *words, "resume_from_checkpoint=True").step == 6


SIX = {"max_steps": 6, "optimizer.lr": 3e-3, "optimizer.weight_decay": 0.1}


# -------------------------------------------------------------------------------------------------------------- zeros
@pytest.mark.parametrize("precision", ["fp32", "bf16", "master weights"])
def test_zeros_are_kept_when_asked_for(precision: str, sparse: Path, write_config: WriteConfig, tmp_path: Path) -> None:
    settings = {"dtype": "fp32" if precision == "fp32" else "bf16", "master_weights": precision == "master weights"}
    config = write_config(tmp_path, **student(sparse, KEEP, **SIX, **settings))
    distill(config)
    before, after = linears(sparse), linears(tmp_path / "run" / "final")
    assert all((after[name][before[name] == 0] == 0).all() for name in before)
    assert not any(torch.equal(before[name], after[name]) for name in before)  # it has learnt
    distill(config, "student_constraints=null", f"output_dir={tmp_path / 'free'}")
    filled = zeros(tmp_path / "free" / "final")
    assert all(filled[name].float().mean() < 0.1 for name in filled)


@pytest.mark.parametrize("checkpointer", ["torchtune", "compressed"])
def test_gradual_sparsity_reaches_its_pattern(
    checkpointer: str, toys: Toys, write_config: WriteConfig, tmp_path: Path
) -> None:
    gradual = {"_component_": f"{COMPRESSION}.GradualSparsity", "pattern": "2:4", "every_n_steps": 2}
    both = student(toys.student, gradual) if checkpointer == "compressed" else {"student_constraints": gradual}
    held_out = {"eval_dataset": text_section(toys.data / "held_out.jsonl", toys.data / "cache"), "health": None}
    config = write_config(tmp_path, **{**both, **SIX, **held_out, "eval_every_n_steps": 1})
    distill(config)
    final = tmp_path / "run" / "final"
    best = load_file(next((tmp_path / "run" / "best").glob("*.safetensors")))
    linears = [w for name, w in best.items() if ".layers." in name and w.ndim == 2]
    assert all(((w == 0).unflatten(1, (-1, 4)).sum(-1) == 2).all() for w in linears)  # none on the way counts
    file = next(final.glob("*.safetensors"))
    weights = {name: w for name, w in load_file(file).items() if ".layers." in name and w.ndim == 2}
    assert len(weights) == 14
    assert all(((w == 0).unflatten(1, (-1, 4)).sum(-1) == 2).all() for w in weights.values())
    shares = [metrics["compression/sparsity"] for step, metrics in logged(tmp_path / "run").items() if step]
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx(0, abs=1e-3)
    assert shares[-1] == shares[-2] == pytest.approx(0.5, abs=1e-4)
    interrupt_and_resume(config, tmp_path / "parts")
    first, second = (load_file(path) for path in (file, tmp_path / "parts" / "final" / file.name))
    assert all(torch.equal(first[name], second[name]) for name in first)


# ----------------------------------------------------------------------------------------------------------- lattices
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", SCHEMES)
def test_what_is_shipped_is_what_was_trained(
    kind: str, tied: bool, toys: Toys, write_config: WriteConfig, tmp_path: Path
) -> None:
    directory = toys.student
    if not tied:
        directory = tmp_path / "untied"
        save_model(directory, tie_word_embeddings=False)
        save_tokenizer(directory)
    held_out = text_section(toys.data / "held_out.jsonl", toys.data / "cache")
    settings = {"epochs": 4, "max_steps": 40, "optimizer.lr": 3e-3, "eval_dataset": held_out, "kd_ratio": 1.0}
    recipe = distill(write_config(tmp_path, **student(directory, SCHEMES[kind], **settings)))
    curve = logged(tmp_path / "run")
    losses = [curve[step]["loss/total"] for step in range(1, 41)]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])

    final = tmp_path / "run" / "final"
    files = load_file(final / "model.safetensors")
    schemes = json.loads((final / "config.json").read_text())["schemes"]
    codes = {name.removesuffix(".codes") for name in files if name.endswith(".codes")}
    num_blocks, num_tables = (1, 2 - tied) if kind == "mixed" else (2, 0 if kind == "ternary" else 2 - tied)
    num_w2 = 1 if kind == "mixed" else 0  # of the block that has no scheme otherwise
    assert len(codes) == len(schemes) == num_blocks * 7 + num_tables + num_w2
    assert not codes & files.keys()
    cfg = sections(final)
    assert cfg.model.checkpoint_dir == cfg.checkpointer.checkpoint_dir == str(final)
    assert OmegaConf.load(final / "model.yaml") == cfg

    device = torch.device("cpu")
    shipped = load_model("model", cfg.model, cfg.checkpointer, dtype=torch.float32, device=device).model.eval()
    model = recipe.student.model.eval()
    with torch.no_grad():
        hidden = model(TOKENS)
        output = model.output
        wanted = output(hidden)
        assert torch.equal(shipped(TOKENS), wanted)
        assert torch.equal(recipe.student(Batch(TOKENS, TOKENS)).logits.compute().view_as(wanted), wanted)
    if tied and kind != "ternary":  # one table, on the lattice, for both
        table = model.tok_embeddings.weight
        assert torch.equal(table, shipped.tok_embeddings.weight)
        assert torch.equal(table, output.tied_module.weight)
        assert not torch.equal(table, model.tok_embeddings.parametrizations.weight.original)

    evaluation = {
        "output_dir": str(tmp_path / "evaluation"),
        "models": {"teacher": str(toys.teacher), "student": str(final)},
        "tokenizer": OmegaConf.load(tmp_path / "config.yaml").tokenizer,
        "dataset": held_out,
        "batch_size": 2,
        "device": "cpu",
        "dtype": "fp32",
    }
    OmegaConf.save(OmegaConf.create(evaluation), tmp_path / "evaluate.yaml")
    assert run_recipe("evaluate", ["--config", str(tmp_path / "evaluate.yaml")]) == 0
    found = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["models"][1]["text"]
    recorded = json.loads((final / "held_out.json").read_text())
    assert recorded["kl"] == pytest.approx(found["kl"]["mean"], rel=1e-5)
    assert recorded["agreement"] == pytest.approx(found["agreement"]["mean"], rel=1e-5)
    assert recorded["kl"] == curve[40]["held_out/kl"]


@pytest.mark.parametrize("kind", ["q4", "8da4w"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_resumed_run_equals_an_unbroken_one(
    kind: str, dtype: str, toys: Toys, write_config: WriteConfig, tmp_path: Path
) -> None:
    config = write_config(tmp_path, **student(toys.student, SCHEMES[kind], **SIX, dtype=dtype))
    distill(config)
    interrupt_and_resume(config, tmp_path / "parts")
    same_files(tmp_path / "run" / "final", tmp_path / "parts" / "final")


@pytest.mark.parametrize("kind", ["q4", "8da4w"])
def test_recomputed_activations_change_nothing(
    kind: str, toys: Toys, write_config: WriteConfig, tmp_path: Path
) -> None:
    config = write_config(tmp_path, **student(toys.student, SCHEMES[kind], **SIX))
    distill(config)
    distill(config, "enable_activation_checkpointing=True", f"output_dir={tmp_path / 'again'}")
    same_files(tmp_path / "run" / "final", tmp_path / "again" / "final")


@pytest.mark.parametrize("kind", ["q4", "ternary", "8da4w"])
def test_zeros_and_a_lattice_go_together_and_once_more(
    kind: str, sparse: Path, write_config: WriteConfig, tmp_path: Path
) -> None:
    distill(write_config(tmp_path, **student(sparse, [KEEP, SCHEMES[kind]], **SIX)))
    final = tmp_path / "run" / "final"
    before, after = zeros(sparse), zeros(final)
    assert all(not (before[name] & ~after[name]).any() for name in before)
    assert form_of(read_checkpoint(final)).zeros == "2:4"  # seen in codes, too
    distill(write_config(tmp_path, **student(final, [KEEP, Q4], **SIX, output_dir=str(tmp_path / "again"))))
    last = zeros(tmp_path / "again" / "final")
    assert all(not (before[name] & ~last[name]).any() for name in before)


@pytest.mark.parametrize("constraints", [[GRADUAL, SCHEMES["q4"]], SCHEMES["q4"]], ids=["sparse", "whole"])
def test_zeros_that_have_been_put_are_told_from_those_of_a_lattice(
    constraints: Any, toys: Toys, write_config: WriteConfig, tmp_path: Path
) -> None:
    distill(write_config(tmp_path, **student(toys.student, constraints, **SIX)))
    final = tmp_path / "run" / "final"
    expected = "unstructured" if isinstance(constraints, list) else "none"
    dense = ToDense().apply(read_checkpoint(final), tmp_path / "dense", calibration([]))
    (_, weight_OI) = next(dense.tensors(["model.layers.0.mlp.up_proj.weight"]))
    assert zero_pattern(weight_OI) == "unstructured"  # in either
    forms = [form_of(read_checkpoint(final)), form_of(dense)]
    assert [form.zeros for form in forms] == [expected] * 2
    steps = json.loads((dense.directory / "compression.json").read_text())["steps"]
    assert [step["step"] for step in steps] == ["distillation", "ToDense"]
    (*_, lattice) = steps[0]["constraints"]
    assert (lattice["constraint"], lattice["scheme"]) == ("QuantizationAwareTraining", "gguf_q4_0")
    widths = WidthPruning(intermediate_dim=64)
    if expected == "none":
        widths.check(forms[1])
    else:
        with pytest.raises(ConfigError, match="of a model with unstructured zeros, which it would fill in"):
            widths.check(forms[1])


def test_zeros_are_known_whichever_checkpointer_has_written_them(
    toys: Toys, write_config: WriteConfig, tmp_path: Path
) -> None:
    """torchtune's copies compression.json of the student, if there is one; codes then come on top."""
    distill(write_config(tmp_path, **{"student_constraints": GRADUAL, **SIX}))
    final = tmp_path / "run" / "final"
    (step,) = json.loads((final / "compression.json").read_text())["steps"]
    assert step["constraints"][0]["sparsity"] == 0.5
    codes = Quantization("int2_g32", method="round").apply(read_checkpoint(final), tmp_path / "q", calibration([]))
    assert form_of(codes).zeros == "unstructured"
    # who trains it without keeping its zeros has none but those of the lattice again
    distill(write_config(tmp_path, **student(codes.directory, Q4, **SIX, output_dir=str(tmp_path / "free"))))
    assert form_of(read_checkpoint(tmp_path / "free" / "final")).zeros == "none"


def test_a_student_without_a_history_gets_none(toys: Toys, write_config: WriteConfig, tmp_path: Path) -> None:
    distill(write_config(tmp_path))
    assert not (tmp_path / "run" / "final" / "compression.json").exists()
    pruned = compressed(toys, tmp_path / "pruned", WidthPruning(intermediate_dim=64))
    cfg = sections(pruned)
    cfg.checkpointer.output_dir = "${output_dir}"
    distill(write_config(tmp_path, **cfg, output_dir=str(tmp_path / "again")))
    final = tmp_path / "again" / "final"
    steps = json.loads((final / "compression.json").read_text())["steps"]
    assert [step["step"] for step in steps] == ["WidthPruning", "distillation"]
    assert OmegaConf.load(final / "model.yaml").checkpointer.checkpoint_dir == str(final)


@pytest.mark.parametrize("then", ["8da4w", "q4", None])
def test_inputs_are_rounded_as_what_is_written_says(
    then: str | None, toys: Toys, write_config: WriteConfig, tmp_path: Path
) -> None:
    """A student whose files round the inputs of layers, distilled onto the same lattice, another one, or none."""
    distill(write_config(tmp_path, **student(toys.student, SCHEMES["8da4w"])))
    config = write_config(tmp_path, **student(tmp_path / "run" / "final", then and SCHEMES[then]))
    recipe = distill(config, f"output_dir={tmp_path / 'again'}")
    cfg = sections(tmp_path / "again" / "final")
    device = torch.device("cpu")
    shipped = load_model("model", cfg.model, cfg.checkpointer, dtype=torch.float32, device=device).model.eval()
    model = recipe.student.model.eval()
    with torch.no_grad():
        assert torch.equal(shipped(TOKENS), model.output(model(TOKENS)))


# ------------------------------------------------------------------------------------------------------------ factors
@pytest.mark.parametrize("three_factors", [False, True])
@pytest.mark.parametrize("lattice", [None, {**Q4, "embeddings": "int8_g8", "scheme": "int4_g8"}])
def test_a_low_rank_student_is_trained_as_its_factors(
    three_factors: bool, lattice: Any, toys: Toys, write_config: WriteConfig, tmp_path: Path
) -> None:
    low_rank = compressed(
        toys, tmp_path / "low", LowRank(ratio=0.5, three_factors=three_factors, multiple_of=8, embedding_rank=32)
    )
    settings = {"epochs": 4, "max_steps": 40, "optimizer.lr": 3e-3}
    recipe = distill(write_config(tmp_path, **student(low_rank, lattice, **settings)))
    losses = [metrics["loss/total"] for metrics in logged(tmp_path / "run").values()]
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])
    final = tmp_path / "run" / "final"
    shapes = [
        {name: p.shape for name, p in from_checkpoint(str(path)).named_parameters()} for path in (low_rank, final)
    ]
    assert shapes[0] == shapes[1]
    assert sum(name.endswith(".s") for name in shapes[0]) == (14 if three_factors else 0)
    cfg = sections(final)
    device = torch.device("cpu")
    shipped = load_model("model", cfg.model, cfg.checkpointer, dtype=torch.float32, device=device).model.eval()
    model = recipe.student.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(shipped(TOKENS), model.output(model(TOKENS)), rtol=0, atol=0)
