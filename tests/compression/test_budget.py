"""A number of parameters: which shapes meet it, and which of them is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kd_recipes.compression import (
    Budget,
    DepthPruning,
    Form,
    LowRank,
    Quantization,
    Sparsification,
    Step,
    WidthPruning,
    cross_entropy,
    form_of,
    read_checkpoint,
)
from kd_recipes.compression.budget import Candidate, report
from kd_recipes.compression.step import check_steps
from kd_recipes.errors import ConfigError
from toy import VOCABULARY, calibration, load_sections, save_model

GENERATOR = torch.Generator().manual_seed(0)
TEXT = calibration([(torch.randint(VOCABULARY, (4, 32), generator=GENERATOR), None)])
BUDGET = Budget(99.2e6, num_candidates=5)
KINDS = ["llama, tied", "llama, untied", "qwen2, tied", "qwen2, untied"]
FORMS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-1.5B": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "odd": {
        "model_type": "llama",
        "vocab_size": 1000,
        "hidden_size": 200,
        "intermediate_size": 700,
        "num_hidden_layers": 12,
        "num_attention_heads": 10,
        "num_key_value_heads": 5,
    },
}


def save(directory: Path, kind: str = "llama, tied", **settings: Any) -> Any:
    model_type, tied = kind.split(", ")
    return save_model(directory, model_type, tie_word_embeddings=tied == "tied", **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_counted_as_they_are(tmp_path: Path, kind: str) -> None:
    model = save(tmp_path / "source", kind)
    form = form_of(read_checkpoint(tmp_path / "source"))
    assert form.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    checkpoint = read_checkpoint(tmp_path / "source")
    method = WidthPruning(intermediate_dim=48, num_kv_heads=1, embed_dim=40, multiple_of=8)
    narrow = method.apply(checkpoint, tmp_path / "narrow", TEXT)
    expected = method.check(form)
    in_files = sum(torch.Size(spec.shape).numel() for spec in narrow.specs)
    assert Form(narrow.config).num_parameters == expected.num_parameters == in_files


@pytest.mark.parametrize(("name", "total"), [("SmolLM2-135M", 134_515_008), ("Qwen2.5-1.5B", 1_543_714_304)])
def test_parameters_of_known_models(name: str, total: int) -> None:
    assert Form(FORMS[name]).num_parameters == total


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("narrow_stream", [True, False])
@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("num_candidates", [1, 3, 50])
def test_candidates_meet_the_budget(name: str, narrow_stream: bool, share: float, num_candidates: int) -> None:
    form = Form(FORMS[name])
    method = Budget(share, num_candidates, narrow_stream)
    found = method.candidates(form)
    assert 1 <= len(found) <= num_candidates
    assert len(set(found)) == len(found)
    assert [shape.num_blocks for shape in found] == sorted((shape.num_blocks for shape in found), reverse=True)
    for shape in found:
        assert 0.98 * share * form.num_parameters <= shape.num_parameters <= share * form.num_parameters
        # the two prunings can make it
        shallow = DepthPruning(num_blocks=shape.num_blocks).check(form)
        width = WidthPruning(shape.intermediate_dim, shape.num_kv_heads, shape.embed_dim, multiple_of=32)
        assert width.check(shallow).num_parameters == shape.num_parameters
        assert narrow_stream or (shape.num_kv_heads, shape.embed_dim) == (form.num_kv_heads, form.embed_dim)
    exact = Budget(share * form.num_parameters, num_candidates, narrow_stream).candidates(form)
    assert exact == found
    left = method.check(form).outcomes
    assert [(of.num_layers, of.intermediate_dim, of.num_kv_heads, of.embed_dim, of.num_parameters) for of in left] == [
        (shape.num_blocks, shape.intermediate_dim, shape.num_kv_heads, shape.embed_dim, shape.num_parameters)
        for shape in found
    ]


def test_all_blocks_that_are_protected_stay() -> None:
    found = Budget(0.5, num_candidates=50, protected=tuple(range(20))).candidates(Form(FORMS["SmolLM2-135M"]))
    assert min(shape.num_blocks for shape in found) >= 20


@pytest.mark.parametrize("kind", KINDS)
def test_the_candidate_of_least_loss_is_kept(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    save(tmp_path / "source", kind, num_hidden_layers=4)
    source = read_checkpoint(tmp_path / "source")
    method = Budget(0.7, num_candidates=3, multiple_of=4, narrow_stream=True)
    form = form_of(source)
    method.check(form)
    written = method.apply(source, tmp_path / "made" / "small", TEXT)
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["small"]
    steps = json.loads((written.directory / "compression.json").read_text())["steps"]
    last = steps[-1]
    assert (last["step"], last["num_parameters"], last["narrow_stream"]) == ("Budget", 0.7, True)
    assert {step["step"] for step in steps[:-1]} <= {"DepthPruning", "WidthPruning"}
    rows = last["candidates"]
    assert len(rows) == 3
    best = min(rows, key=lambda row: row["loss"])
    assert len({row["loss"] for row in rows}) == 3
    kept = Form(written.config)
    sizes = (kept.num_layers, kept.num_kv_heads, kept.embed_dim, kept.intermediate_dim, kept.num_parameters)
    assert sizes == tuple(best[name] for name in Candidate.__dataclass_fields__)
    assert cross_entropy(written, TEXT) == pytest.approx(best["loss"], rel=1e-6)
    theirs = AutoModelForCausalLM.from_pretrained(written.directory).eval()
    assert sum(parameter.numel() for parameter in theirs.parameters()) == kept.num_parameters
    assert 0.98 * 0.7 * form.num_parameters <= kept.num_parameters <= 0.7 * form.num_parameters
    ours = load_sections(written.directory)
    tokens_BS = TEXT.windows[0][0]
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens_BS), theirs(tokens_BS).logits, atol=1e-4, rtol=1e-4)


def test_nothing_is_left_where_it_fails(tmp_path: Path) -> None:
    save(tmp_path / "source", num_hidden_layers=4)
    empty = calibration([(TEXT.windows[0][0], torch.zeros(1, 32, dtype=torch.bool))])
    with pytest.raises(ConfigError, match="no token that counts"):
        Budget(0.7, multiple_of=4).apply(read_checkpoint(tmp_path / "source"), tmp_path / "made" / "small", empty)
    assert not list((tmp_path / "made").iterdir())


@pytest.mark.parametrize("losses", [(3.0, 2.0, 4.0), (1.0, 2.0, 3.0), (3.0, 2.0, 1.0)], ids=str)
def test_a_candidate_that_has_lost_is_gone_at_once(
    losses: tuple[float, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "source", num_hidden_layers=4)
    source = read_checkpoint(tmp_path / "source")
    method = Budget(0.7, num_candidates=3, multiple_of=4, narrow_stream=True)
    coming, on_disk = list(losses), []

    def scripted(*_: object) -> float:
        on_disk.append(len([*(tmp_path / "made").rglob("model.safetensors")]))
        return coming.pop(0)

    monkeypatch.setattr("kd_recipes.compression.budget.cross_entropy", scripted)
    written = method.apply(source, tmp_path / "made" / "small", TEXT)
    assert on_disk == [1, 2, 2]
    best = method.candidates(Form(source.config))[losses.index(min(losses))]
    assert (written.num_layers, Form(written.config).intermediate_dim) == (best.num_blocks, best.intermediate_dim)
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["small"]


# ------------------------------------------------------------------------------------------------- what may follow it
SHAPES = [(30, 832), (28, 928), (25, 1120), (22, 1344), (20, 1536)]  # blocks and neurons of 99.2 M parameters


def follow(*steps: Step) -> list[Form]:
    """What may be left of SmolLM2 by a budget and then some steps."""
    return check_steps(
        {f"compress[{index}]": step for index, step in enumerate((BUDGET, *steps))}, Form(FORMS["SmolLM2-135M"])
    )


def shapes_of(forms: list[Form]) -> list[tuple[int, int]]:
    return [(form.num_layers, form.intermediate_dim) for form in forms]


def test_a_step_that_every_candidate_takes() -> None:
    assert shapes_of(follow()) == SHAPES
    assert shapes_of(follow(WidthPruning(intermediate_dim=800))) == [(blocks, 800) for blocks, _ in SHAPES]
    assert shapes_of(follow(DepthPruning(num_blocks=20))) == [(20, neurons) for _, neurons in SHAPES]
    assert len(follow(DepthPruning(num_blocks=20), WidthPruning(intermediate_dim=800))) == 1
    assert {form.rank_multiple for form in follow(LowRank(ratio=0.2, multiple_of=16))} == {16}
    assert all(form.schemes == {"gguf_q4_0"} for form in follow(Quantization("gguf_q4_0")))


def test_a_step_that_some_candidate_does_not_take() -> None:
    with pytest.raises(ConfigError) as caught:
        follow(WidthPruning(intermediate_dim=960))
    assert [str(problem) for problem in caught.value.problems] == [
        f"compress[1].intermediate_dim: got 960, wanted from 1 to {neurons}, the model's, in multiples of 32"
        f" (multiple_of), with {blocks} blocks and {neurons} neurons"
        for blocks, neurons in SHAPES[:2]
    ]
    with pytest.raises(ConfigError, match="to 22, the model's, with 22 blocks and 1344 neurons") as caught:
        follow(DepthPruning(num_blocks=24))
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigError, match=r"\.scheme: .* divides 928 inputs.*, with 28 blocks and 928 neurons"):
        follow(Quantization("int4_g64"))


def test_a_step_that_no_candidate_takes_is_refused_once() -> None:
    with pytest.raises(ConfigError, match=r"compress\[2\]\._component_: got 'pruning of widths of weights") as caught:
        follow(Quantization("gguf_q4_0"), WidthPruning(intermediate_dim=800))
    assert len(caught.value.problems) == 1
    assert " blocks" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_parameters": 0}, r"\.num_parameters: got 0"),
        ({"num_parameters": 0.5, "num_candidates": 0}, r"\.num_candidates: got 0"),
        ({"num_parameters": 0.5, "multiple_of": 0}, r"\.multiple_of: got 0"),
        ({"num_parameters": 1000}, r"\.num_parameters: got 1000, wanted a budget that some shape meets; .*134,515,008"),
        ({"num_parameters": 0.05}, r"\.num_parameters: got 0.05, wanted a budget that some shape meets"),
        ({"num_parameters": 1e9}, r"\.num_parameters: got 1000000000.0, wanted a budget that some shape meets"),
        ({"num_parameters": 0.4, "protected": range(30)}, r"wanted a budget that some shape meets"),
        ({"num_parameters": 0.7, "protected": (0, 99)}, r"\.protected: got \[99\], wanted indices of the model's 30"),
    ],
)
def test_a_budget_that_nobody_meets(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Budget(**settings).check(Form(FORMS["SmolLM2-135M"]))


@pytest.mark.parametrize("before", [LowRank(ratio=0.5), Sparsification(), Quantization("int4")], ids=str)
def test_what_comes_too_late(before: Any) -> None:
    form = before.check(Form(FORMS["SmolLM2-135M"]))
    with pytest.raises(ConfigError, match="pruning of widths of"):
        Budget(0.7).check(form)


def test_the_table() -> None:
    shapes = [Candidate(28, 3, 576, 1024, 100_000_000), Candidate(20, 3, 576, 1536, 99_000_000)]
    lines = report(shapes, [3.25, 4.5], 1).splitlines()
    assert lines[1].split() == ["28", "3", "576", "1024", "100,000,000", "3.250"]
    assert lines[2].endswith("4.500  <- kept")
    assert not lines[1].endswith("kept")
