"""Feature distillation through the recipe: what is seen inside, trained, saved and left out; weights of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input import Rejected
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from kd_recipes import _torchtune
from kd_recipes.batch import Batch
from kd_recipes.models import model_section
from kd_recipes.parts import load_model
from kd_recipes.signals import Tap
from toy import Toys, checkpointer_section, distill, hf_config, logged, lora_section, prepare, saved_weights

WriteConfig = Callable[..., Path]
HIDDEN = {"_component_": "kd_recipes.losses.HiddenStates", "weight": 2.0, "distance": "mse"}
RELATIONS = {"_component_": "kd_recipes.losses.AttentionRelations", "weight": 0.5}
NO_TEACHER = ["~teacher_model", "~teacher_checkpointer", "kd_ratio=0"]
RECOMPUTED, COMPILED = {"recompute_activations": True}, {"compile_blocks": True}
TAPS = [Tap(1), Tap(2), *(Tap(layer, kind) for layer in (1, 2) for kind in ("query", "key", "value"))]


def _headless(toys: Toys, **settings: Any) -> _torchtune.Headless:
    sections = (OmegaConf.create(model_section(hf_config(toys.student))), checkpointer_section(toys.student))
    model, checkpointer = (OmegaConf.create(section) for section in sections)
    checkpointer.output_dir = "unused"
    loaded = load_model("model", model, checkpointer, dtype=torch.float32, device=torch.device("cpu"))
    return _torchtune.Headless(loaded.model, TAPS, **settings)


def _batch() -> Batch:
    tokens, labels = torch.randint(0, 300, (2, 2, 9), generator=torch.Generator().manual_seed(0))
    return Batch(tokens, labels)


def test_features_are_those_of_transformers(toys: Toys) -> None:
    batch, theirs, seen = _batch(), AutoModelForCausalLM.from_pretrained(toys.student, dtype=torch.float32), {}
    for layer, block in enumerate(theirs.model.layers, 1):
        block.register_forward_hook(lambda _m, _i, out, layer=layer: seen.update({Tap(layer): out}))
        for kind in ("query", "key", "value"):
            projection, tap = getattr(block.self_attn, f"{kind[0]}_proj"), Tap(layer, kind)
            projection.register_forward_hook(lambda _m, _i, out, tap=tap: seen.update({tap: out}))
    theirs(batch.tokens_BS)
    features = _headless(toys)(batch).features
    assert set(features) == set(TAPS) == set(seen)
    for tap, tensor in features.items():
        expected = seen[tap]
        if tap.kind in ("query", "key"):  # torchtune orders a head's channels otherwise; relations do not see it
            tensor, expected = (z.unflatten(-1, (-1, 16)) for z in (tensor, expected))
            tensor, expected = (torch.einsum("bqhd,bkhd->bhqk", z, z) for z in (tensor, expected))
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("settings", [RECOMPUTED, COMPILED, RECOMPUTED | COMPILED])
def test_features_are_seen_and_differentiated_all_the_same(settings: dict[str, bool], toys: Toys) -> None:
    batch, grads, features = _batch(), [], []
    for headless in (_headless(toys), _headless(toys, **settings)):
        signal = headless(batch)
        features.append(signal.features)
        sum(tensor.square().sum() for tensor in signal.features.values()).backward()  # type: ignore[union-attr]
        assert not headless._seen  # the backward pass computes the blocks once more, and nobody watches
        grads.append([parameter.grad for parameter in headless._model.parameters() if parameter.grad is not None])
    for tap in TAPS:
        torch.testing.assert_close(features[0][tap], features[1][tap], rtol=1e-4, atol=1e-4)
    assert len(grads[0]) == len(grads[1]) > 10
    for plain, other in zip(*grads, strict=True):
        torch.testing.assert_close(plain, other, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))


def test_terms_train_the_student_and_their_projections(toys: Toys, write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(tmp_path, feature_losses=[HIDDEN, RELATIONS], kd_ratio=0.0)
    before = {name: parameter.detach() for name, parameter in prepare(config)._features.named_parameters()}
    recipe = distill(config, "max_steps=3", f"output_dir={tmp_path / 'trained'}")
    steps = logged(tmp_path / "trained")
    for step in (1, 2, 3):
        at = steps[step]
        terms = 2.0 * at["loss/hidden_mse"] + 0.5 * at["loss/attention_relations"]
        assert at["loss/total"] == pytest.approx(at["loss/cross_entropy"] + terms, rel=1e-4)
        assert "kd/forward_kl" not in at  # kd_ratio 0: no product with the teacher's head
    projections = dict(recipe._features.named_parameters())
    assert {tuple(p.shape) for p in projections.values()} == {(96, 64)}
    assert len(projections) == 2
    saved = saved_weights(tmp_path / "trained")
    for name, parameter in projections.items():
        assert torch.equal(saved[f"feature_losses.{name}"], parameter)
        assert 0 < float((parameter - before[name]).norm().detach()) < float(before[name].norm())
    final = load_file(tmp_path / "trained" / "final" / "model-00001-of-00001.safetensors")
    assert final.keys() == load_file(toys.student / "model.safetensors").keys()
    AutoModelForCausalLM.from_pretrained(tmp_path / "trained" / "final")


@pytest.mark.parametrize("kind", ["lora", "bf16", "packed", "cka"])
def test_terms_with(kind: str, toys: Toys, write_config: WriteConfig, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"feature_losses": [HIDDEN, RELATIONS], "teacher_device": "cpu"}
    if kind == "lora":
        settings["model"] = lora_section(toys.student)
    elif kind == "bf16":
        settings["dtype"] = "bf16"
    elif kind == "packed":
        settings |= {"dataset.packed": True, "tokenizer.max_seq_len": 32}
    else:
        settings["feature_losses"] = {**HIDDEN, "distance": "cka"}
    recipe = distill(write_config(tmp_path, **settings), "max_steps=2")
    at, names = logged(tmp_path / "run")[2], [term.name for term in recipe._features.by_name.values()]
    assert all(0 < at[f"loss/{name}"] < math.inf for name in names)
    assert all(p.grad is None and p.isfinite().all() for p in recipe._updates.parameters.values())


def test_a_resumed_run_equals_an_unbroken_one(write_config: WriteConfig, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for directory in (whole, parts):
        directory.mkdir()
    settings: dict[str, Any] = {"feature_losses": [HIDDEN, RELATIONS]}
    unbroken = distill(write_config(whole, **settings), "max_steps=4")
    distill(write_config(parts, **settings), "max_steps=2")
    resumed = distill(write_config(parts, **settings), "max_steps=4", "resume_from_checkpoint=True", "seed=1")
    assert resumed._updates.parameters.keys() == unbroken._updates.parameters.keys()
    for name, parameter in resumed._updates.parameters.items():
        assert torch.equal(parameter, unbroken._updates.parameters[name]), name


def test_micro_batches_add_up(write_config: WriteConfig, tmp_path: Path) -> None:
    trained = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        directory = tmp_path / str(batch_size)
        directory.mkdir()
        settings = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation, "shuffle": False}
        optimizer = {"optimizer": {"_component_": "torch.optim.SGD", "lr": 0.1}}
        recipe = distill(write_config(directory, feature_losses=[HIDDEN, RELATIONS], **settings, **optimizer))
        trained.append(recipe._updates.parameters)
    for name, parameter in trained[0].items():
        torch.testing.assert_close(parameter, trained[1][name], rtol=1e-4, atol=1e-5)


def test_nothing_is_watched_where_nothing_is_asked(write_config: WriteConfig, tmp_path: Path) -> None:
    recipe = prepare(write_config(tmp_path))
    for model in (recipe.student.model, recipe._teacher.model):  # type: ignore[union-attr]
        assert model.output_hidden_states == []
        assert not any(module._forward_hooks for module in model.modules())
    assert recipe._updates.parameters.keys() == recipe.student.trainable().keys()


@pytest.mark.parametrize(
    ("settings", "overrides", "message"),
    [
        (
            {"feature_losses": HIDDEN},
            ["~teacher_model", "~teacher_checkpointer", "kd_ratio=0"],
            "feature_losses compare",
        ),
        ({"feature_losses": {**HIDDEN, "layers": [[2, 4]]}}, [], "student's block of 1 to 2, teacher's of 1 to 3"),
        ({"feature_losses": [HIDDEN, {**RELATIONS, "num_heads": 3}]}, [], "feature_losses[1].num_heads: got 3"),
        ({"feature_losses": [{**HIDDEN, "weight": 0}]}, [], "feature_losses[0].weight: got 0"),
        ({"feature_losses": {**HIDDEN, "distanse": "mse"}}, [], "Did you mean `distance`?"),
        ({"feature_losses": {"_component_": "torch.nn.Identity"}}, [], "wanted a kd_recipes.losses.FeatureTerm"),
        ({"token_weights": {"_component_": f"{__name__}.later_counts_more", "slop": 1}}, [], "Did you mean `slope`?"),
        (
            {
                "token_weights": {"_component_": f"{__name__}.later_counts_more"},
                "kd_loss": {"_component_": "torchtune.modules.loss.ForwardKLLoss"},
            },
            [],
            f"token_weights: got '{__name__}.later_counts_more', wanted none beside torchtune's kd_loss",
        ),
        ({"token_weights": {"_component_": f"{__name__}.no_weights"}}, [], "wanted a tensor [2, "),
        ({"token_weights": {"_component_": f"{__name__}.negative_weights"}}, [], "wanted numbers from 0"),
        ({"token_weights": {"_component_": f"{__name__}.raises"}}, [], "got \"KeyError: 'weights'\""),
    ],
)
def test_settings_that_cannot_be(
    settings: dict[str, Any], overrides: list[str], message: str, rejected: Rejected
) -> None:
    assert message in rejected(*overrides, **settings)


def later_counts_more(batch: Batch, slope: float = 0.1) -> Tensor:
    """Weights as a user writes them."""
    return 1 + slope * torch.arange(batch.tokens_BS.shape[1]).expand_as(batch.tokens_BS)


def no_weights(batch: Batch) -> Tensor:
    """A function that is wrong."""
    return batch.tokens_BS[0]


def negative_weights(batch: Batch) -> Tensor:
    """Another."""
    return -torch.ones(batch.tokens_BS.shape)


def raises(batch: Batch) -> Tensor:
    """And another."""
    raise KeyError("weights")


def test_token_weights(write_config: WriteConfig, tmp_path: Path) -> None:
    totals = {}
    for slope in (0.0, 0.3):
        directory = tmp_path / str(slope)
        directory.mkdir()
        section = {"_component_": f"{__name__}.later_counts_more", "slope": slope}
        distill(write_config(directory, token_weights=section, feature_losses=HIDDEN), "max_steps=1")
        totals[slope] = logged(directory / "run")[1]
    plain, weighted = totals[0.0], totals[0.3]
    assert plain["loss/cross_entropy"] == weighted["loss/cross_entropy"]  # what is logged is comparable
    assert weighted["loss/total"] > 1.2 * plain["loss/total"]
    assert weighted["loss/hidden_mse"] > 1.2 * plain["loss/hidden_mse"]
