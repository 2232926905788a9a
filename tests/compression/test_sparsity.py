"""Connections that go: which ones, in a finished model and in one that is trained."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kd_recipes.compression import Form, GradualSparsity, KeepZeros, Sparsification, form_of, read_checkpoint
from kd_recipes.compression.form import zero_pattern
from kd_recipes.compression.sparsity import zero_mask
from kd_recipes.errors import ConfigError
from toy import Toys, calibration, hf_config

NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
NAMES = (*NAMES, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
TOKENS = torch.arange(60).reshape(3, 20) * 7 % 300


def _num_zeros_in_fours(weight_OI: Tensor) -> Tensor:
    return (weight_OI == 0).unflatten(1, (-1, 4)).sum(-1)


# -------------------------------------------------------------------------------------------------------------- masks
@pytest.mark.parametrize("sparsity", [0.1, 0.25, 0.5, 0.7, 0.99])
def test_each_row_loses_its_lowest_scores(sparsity: float) -> None:
    torch.manual_seed(0)
    scores = torch.rand(9, 40) * torch.logspace(-3, 3, 9)[:, None]  # some rows score far less than others
    mask = zero_mask(scores, sparsity, "unstructured")
    assert mask.sum(1).tolist() == [min(round(40 * sparsity), 39)] * 9  # one stays
    for row, gone in zip(scores, mask, strict=True):
        assert row[gone].max() < row[~gone].min()


def test_two_of_four_are_the_lower_ones() -> None:
    scores = torch.rand(7, 24, generator=torch.Generator().manual_seed(1))
    mask = zero_mask(scores, 0.5, "2:4")
    for group, gone in zip(scores.reshape(-1, 4), mask.reshape(-1, 4), strict=True):
        assert gone.sum() == 2
        assert group[gone].max() < group[~gone].min()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_of_equals_the_earlier_goes(pattern: str) -> None:
    mask = zero_mask(torch.ones(2, 8), 0.25, pattern)
    assert mask.tolist() == [[True, True] + [False] * 6] * 2
    half = zero_mask(torch.ones(1, 8), 0.5, pattern)
    wanted = [1, 1, 1, 1, 0, 0, 0, 0] if pattern == "unstructured" else [1, 1, 0, 0, 1, 1, 0, 0]
    assert half[0].int().tolist() == wanted


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.45])
def test_less_than_a_half_stays_inside_the_pattern(sparsity: float) -> None:
    scores = torch.rand(6, 40, generator=torch.Generator().manual_seed(2))
    whole, part = zero_mask(scores, 0.5, "2:4"), zero_mask(scores, sparsity, "2:4")
    assert not (part & ~whole).any()
    assert part.sum(1).tolist() == [round(40 * sparsity)] * 6
    for row, may_go, gone in zip(scores, whole, part, strict=True):
        assert row[gone].max() < row[may_go & ~gone].min()


def test_no_rows_are_no_trouble() -> None:
    assert zero_mask(torch.empty(0, 8), 0.5, "2:4").shape == (0, 8)


def test_patterns_are_recognized() -> None:
    weight = torch.rand(8, 40) + 0.1
    assert zero_pattern(weight) == "none"
    chance = weight.masked_fill(torch.arange(320).view(8, 40) % 40 == 0, 0.0)  # one of 40
    assert zero_pattern(chance) == "none"
    assert zero_pattern(weight.masked_fill(zero_mask(weight, 0.5, "unstructured"), 0.0)) == "unstructured"
    fours = weight.masked_fill(zero_mask(weight, 0.5, "2:4"), 0.0)
    assert zero_pattern(fours) == "2:4"
    fours[3, 4:8] = torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert zero_pattern(fours) == "unstructured"
    assert zero_pattern(torch.zeros(4, 6)) == "unstructured"


# --------------------------------------------------------------------------------------------------------------- step
def _sparsified(toys: Toys, tmp_path: Path, **settings: object) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the student's file, and of the one made of it."""
    source = read_checkpoint(toys.student)
    step = Sparsification(**settings)  # type: ignore[arg-type]
    step.check(form_of(source))
    step.apply(source, tmp_path / "sparse", calibration([(TOKENS, None)]))
    return load_file(toys.student / "model.safetensors"), load_file(tmp_path / "sparse" / "model.safetensors")


def _norms(toys: Toys) -> dict[str, Tensor]:
    """Of the inputs of the first block's linear layers, seen by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(toys.student).eval()
    squares: dict[str, Tensor] = {}
    for name in NAMES:

        def see(_module: nn.Module, args: tuple[Tensor], _output: Tensor, name: str = name) -> None:
            squares[name] = args[0].double().square().sum((0, 1))

        model.model.layers[0].get_submodule(name).register_forward_hook(see)
    with torch.no_grad():
        model(TOKENS)
    return {name: square.sqrt() for name, square in squares.items()}


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("importance", ["wanda", "magnitude"])
def test_what_goes_scores_least(importance: str, pattern: str, toys: Toys, tmp_path: Path) -> None:
    before, after = _sparsified(toys, tmp_path, pattern=pattern, importance=importance)
    norms = _norms(toys)
    for name in NAMES:
        key = f"model.layers.0.{name}.weight"
        weight = before[key].double()
        scores = weight.abs() * norms[name] if importance == "wanda" else weight.abs()
        groups = scores.reshape(-1, 4) if pattern == "2:4" else scores
        threshold = groups.sort(1).values[:, groups.shape[1] // 2 - 1, None]
        expected = (groups <= threshold).reshape(weight.shape)
        assert ((after[key] == 0) == expected).float().mean() > 0.999, name  # but for rounding between two models
        assert torch.equal(after[key], before[key].masked_fill(after[key] == 0, 0.0))


def test_only_linear_layers_of_blocks_change(toys: Toys, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = _sparsified(toys, tmp_path, pattern="2:4")
    assert before.keys() == after.keys()
    linears = {f"model.layers.{index}.{name}.weight" for index in range(2) for name in NAMES}
    assert {name for name in before if not torch.equal(before[name], after[name])} == linears
    assert all((_num_zeros_in_fours(after[name]) == 2).all() for name in linears)
    num_zeros = sum(int((after[name] == 0).sum()) for name in linears)
    total = sum(after[name].numel() for name in linears)
    printed = re.search(r"layers: ([\d,]+) of ([\d,]+) \((.*)%\)", capsys.readouterr().out)
    assert printed
    assert [int(group.replace(",", "")) for group in printed.groups()[:2]] == [num_zeros, total]
    assert float(printed[3]) == 50.0
    record = json.loads((tmp_path / "sparse" / "compression.json").read_text())["steps"][-1]
    assert record == {"step": "Sparsification", "sparsity": 0.5, "pattern": "2:4", "importance": "wanda"}
    assert form_of(read_checkpoint(tmp_path / "sparse")).zeros == "2:4"


def test_a_second_time_takes_more_and_gives_nothing_back(toys: Toys, tmp_path: Path) -> None:
    _, once = _sparsified(toys, tmp_path, sparsity=0.4)
    again = Sparsification(sparsity=0.2)
    again.apply(read_checkpoint(tmp_path / "sparse"), tmp_path / "less", calibration([(TOKENS, None)]))
    less = load_file(tmp_path / "less" / "model.safetensors")
    assert all(torch.equal(less[name], once[name]) for name in once)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 0.0}, r"\.sparsity: got 0.0, wanted a share of zeros above 0 and below 1"),
        ({"sparsity": 1.0}, r"\.sparsity: got 1.0, wanted a share of zeros above 0 and below 1"),
        ({"sparsity": 0.6, "pattern": "2:4"}, r"\.sparsity: got 0.6, wanted .* at most 0.5"),
        ({"pattern": "4:8"}, r"\.pattern: got '4:8', wanted unstructured or 2:4"),
        ({"importance": "luck"}, r"\.importance: got 'luck', wanted wanda or magnitude"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sparsification(**settings)  # type: ignore[arg-type]


def test_models_that_it_cannot_take(toys: Toys) -> None:
    config = hf_config(toys.student)
    with pytest.raises(ConfigError, match="2:4 zeros, which it would fill in"):
        Sparsification().check(Form(config, zeros="2:4"))
    with pytest.raises(ConfigError, match="got 'sparsification of factors', wanted whole matrices"):
        Sparsification().check(Form(config, rank_multiple=8))
    with pytest.raises(ConfigError, match="gguf_q4_0, which it would take off"):
        Sparsification().check(Form(config, schemes=frozenset({"gguf_q4_0"})))
    with pytest.raises(ConfigError, match=r"multiples of 4, not \[94\]"):
        Sparsification(pattern="2:4").check(Form({**config, "intermediate_size": 94}))
    assert Sparsification().check(Form({**config, "intermediate_size": 94})).zeros == "unstructured"
    assert Sparsification(pattern="2:4").check(Form(config, zeros="2:4")).zeros == "2:4"


# ----------------------------------------------------------------------------------------------------------- training
def test_the_schedule_is_cubic() -> None:
    schedule = GradualSparsity(sparsity=0.8, begin=0.2, end=0.7)
    shares = [schedule.at(step, 100) for step in range(101)]
    assert shares[:21] == [0.0] * 21
    assert shares[70:] == [0.8] * 31
    assert shares[45] == pytest.approx(0.8 * (1 - 0.5**3))
    assert all(later > earlier for earlier, later in pairwise(shares[20:71]))


def _trained(constraint: KeepZeros, weights: dict[str, nn.Parameter], num_steps: int) -> list[dict[str, Tensor]]:
    """The weights after each of some steps of an optimizer with all that could bring a zero back."""
    optimizer = torch.optim.AdamW(weights.values(), lr=0.05, weight_decay=0.1)
    generator = torch.Generator().manual_seed(3)
    seen = []
    for step in range(1, num_steps + 1):
        for weight in weights.values():
            weight.grad = torch.randn(weight.shape, generator=generator)
        with constraint.update(weights, step, num_steps):
            optimizer.step()
        seen.append({name: weight.detach().clone() for name, weight in weights.items()})
    return seen


def _weights() -> dict[str, nn.Parameter]:
    torch.manual_seed(4)
    names = ("layers.0.mlp.w1.weight", "layers.1.attn.q_proj.weight", "tok_embeddings.weight", "norm.scale")
    return {name: nn.Parameter(torch.randn(6, 40)) for name in names}


def test_zeros_stay_through_momentum_and_decay() -> None:
    weights = _weights()
    with torch.no_grad():
        for weight in weights.values():
            weight[torch.rand(weight.shape) < 0.4] = 0.0
    masks = {name: weight == 0 for name, weight in weights.items()}
    last = _trained(KeepZeros(), weights, 20)[-1]
    for name, mask in masks.items():
        is_held = name.startswith("layers.")
        assert torch.equal(last[name] == 0, mask) == is_held, name
        assert (last[name][~mask] != 0).all()


@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.7), ("2:4", 0.5)])
@pytest.mark.parametrize("every_n_steps", [1, 4, 50])
def test_sparsity_rises_as_scheduled_and_never_falls(pattern: str, sparsity: float, every_n_steps: int) -> None:
    constraint = GradualSparsity(sparsity, pattern, begin=0.1, end=0.65, every_n_steps=every_n_steps)  # type: ignore[arg-type]
    weights = _weights()
    seen = _trained(constraint, weights, 20)
    for name in weights:
        masks = [weights_at[name] == 0 for weights_at in seen]
        if not name.startswith("layers."):
            assert not any(mask.any() for mask in masks)
            continue
        for step, mask in enumerate(masks, 1):
            if step % every_n_steps == 0 or step >= 13:
                assert (mask.sum(1) == round(40 * constraint.at(step, 20))).all(), step
            if step > 1:
                assert not (masks[step - 2] & ~mask).any()
            if pattern == "2:4":
                assert (mask.unflatten(1, (-1, 4)).sum(-1) <= 2).all()
        assert masks[-1].float().mean() == pytest.approx(sparsity)
    assert constraint.metrics(weights) == {"sparsity": pytest.approx(sparsity)}


def test_the_end_is_reached_though_its_own_step_is_left_out() -> None:
    constraint = GradualSparsity(0.5, end=0.5, every_n_steps=100)
    weights = {"layers.0.mlp.w1.weight": nn.Parameter(torch.randn(4, 8))}
    for step in (1, 2, 3, 4, 6, 7, 8, 9, 10):  # of ten, the fifth of which had a loss that was no number
        with constraint.update(weights, step, 10):
            pass
    assert (weights["layers.0.mlp.w1.weight"] == 0).float().mean() == 0.5
