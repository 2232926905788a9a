"""Factors in the place of matrices: ranks, what is written, what it computes, and what may follow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kd_recipes.compression import (
    DepthPruning,
    LowRank,
    Quantization,
    Sparsification,
    Stream,
    TensorDecomposition,
    ToDense,
    cross_entropy,
    decomposition,
    form_of,
    read_checkpoint,
)
from kd_recipes.compression.convert import as_tune
from kd_recipes.compression.stream import INPUT_OF
from kd_recipes.errors import ConfigError
from kd_recipes.layers import LowRankEmbedding, LowRankLinear
from toy import VOCABULARY, calibration, hf_config, load_sections, save_model

GENERATOR = torch.Generator().manual_seed(0)
TEXT = calibration([(torch.randint(VOCABULARY, (8, 48), generator=GENERATOR), None)])
TOKENS_BS = torch.randint(VOCABULARY, (2, 32), generator=GENERATOR)
MATRICES = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96  # parameters of a block's


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save_model(tmp_path / "source")
    return tmp_path / "source"


@torch.no_grad()
def logits(model: Any) -> Tensor:
    output = model(TOKENS_BS)
    return getattr(output, "logits", output)


def apply(method: Any, source: Path, destination: Path) -> Any:
    """What the recipe does: the check, then the step."""
    checkpoint = read_checkpoint(source)
    method.check(form_of(checkpoint))
    return method.apply(checkpoint, destination, TEXT)


def kept_share(directory: Path, num_blocks: int = 2) -> float:
    """Of the parameters of the blocks' matrices."""
    state = load_sections(directory).state_dict()
    blocks = [value for name, value in state.items() if name.startswith("layers.") and value.ndim == 2]
    return sum(value.numel() for value in blocks) / (num_blocks * MATRICES)


SETTINGS: list[dict[str, Any]] = [
    {"ratio": 0.6},
    {"energy": 0.8, "whiten": False},
    {"budget": 0.7, "embedding_rank": 24},
    {"ratio": 0.5, "three_factors": True, "multiple_of": 4},
    {"embedding_rank": 40},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_factors_compute_what_their_product_does(source: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    written = apply(LowRank(**settings), source, tmp_path / "low")
    with pytest.raises(ValueError, match="kd_recipes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "low")
    model = load_sections(tmp_path / "low")
    dense = apply(ToDense(), tmp_path / "low", tmp_path / "dense")
    theirs, info = AutoModelForCausalLM.from_pretrained(dense.directory, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(model), logits(theirs.eval()), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(load_sections(dense.directory)), logits(model), atol=1e-4, rtol=1e-4)
    assert cross_entropy(written, TEXT) == pytest.approx(cross_entropy(dense, TEXT), rel=1e-4)
    # config.json says what is in the files, and what is not said of is as it was
    config = json.loads((tmp_path / "low" / "config.json").read_text())
    assert (config["model_type"], config["schemes"]) == ("kd_recipes", {})
    assert config["dense"] == hf_config(source)
    factored = {n: m for n, m in model.named_modules() if isinstance(m, (LowRankLinear, LowRankEmbedding))}
    assert factored.keys() == config["ranks"].keys() != set()
    for name, layer in factored.items():
        assert config["ranks"][name] == [layer.rank] * (2 if getattr(layer, "s", None) is not None else 1)
        is_table = not name.startswith("layers.")
        multiple_of = settings.get("multiple_of", 8)
        assert layer.rank == settings["embedding_rank"] if is_table else layer.rank % multiple_of == 0
        assert sum(p.numel() for n, p in layer.named_parameters() if n != "bias") < layer.weight.numel()
    original = load_sections(source).state_dict()
    for name, value in model.state_dict().items():
        if name.rpartition(".")[0] not in factored or name.endswith("bias"):
            assert torch.equal(value, original[name]), name
    tables = {"tok_embeddings"} if hf_config(source)["tie_word_embeddings"] else {"tok_embeddings", "output"}
    assert tables & factored.keys() == (tables if settings.get("embedding_rank") else set())
    assert (settings.keys() == {"embedding_rank"}) == (factored.keys() == tables)


@pytest.mark.parametrize("settings", [{"ratio": 0.6}, {"budget": 0.6}, {"ratio": 0.35}, {"budget": 0.35}], ids=str)
def test_share_of_parameters(llama: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    apply(LowRank(**settings, multiple_of=1), llama, tmp_path / "low")
    share = next(iter(settings.values()))
    assert share - 0.03 < kept_share(tmp_path / "low") <= share


@pytest.mark.parametrize("whiten", [True, False])
def test_energy_keeps_so_much_of_each_output(llama: Path, tmp_path: Path, whiten: bool) -> None:
    written = apply(LowRank(energy=0.7, whiten=whiten, multiple_of=1), llama, tmp_path / "low")
    ranks, new = written.ranks, load_sections(tmp_path / "low")
    for block in Stream(read_checkpoint(llama), TEXT, "test", [0]):
        grams = block.grams(list(INPUT_OF)) if whiten else {}
        for name in set(INPUT_OF) - {"attn.output_proj", "mlp.w1", "mlp.w2", "mlp.w3"}:  # their inputs have changed
            weight_OI, gram_II = block.weight(name), grams.get(name, torch.eye(64))
            error_OI = weight_OI - new.get_submodule(f"layers.0.{name}").weight.detach()
            lost = torch.trace(error_OI @ gram_II @ error_OI.T) / torch.trace(weight_OI @ gram_II @ weight_OI.T)
            assert lost <= 0.3
            fewer = decomposition.truncated_svd(weight_OI, ranks[f"layers.0.{name}"][0] - 1, grams.get(name))
            error_OI = weight_OI - fewer.weight
            lost = torch.trace(error_OI @ gram_II @ error_OI.T) / torch.trace(weight_OI @ gram_II @ weight_OI.T)
            assert lost > 0.3


def test_what_would_not_get_smaller_stays_whole(llama: Path, tmp_path: Path) -> None:
    written = apply(LowRank(energy=0.999), llama, tmp_path / "low")
    assert not written.ranks
    assert hf_config(tmp_path / "low") == hf_config(llama)
    assert torch.equal(logits(load_sections(tmp_path / "low")), logits(load_sections(llama)))


def test_whitening_pays_where_inputs_are_unlike(tmp_path: Path) -> None:
    """A model whose channels differ in size by orders of magnitude, on text that it was not fitted to."""
    theirs = save_model(tmp_path / "source", tie_word_embeddings=False)
    scales = torch.logspace(-1.5, 0.5, 64)
    for block in theirs.model.layers:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight.data = scales[torch.randperm(64, generator=GENERATOR)]
    theirs.save_pretrained(tmp_path / "source")
    expected = logits(load_sections(tmp_path / "source"))
    errors = []
    for whiten in (True, False):
        apply(LowRank(ratio=0.5, whiten=whiten), tmp_path / "source", tmp_path / f"low_{whiten}")
        errors.append(float((logits(load_sections(tmp_path / f"low_{whiten}")) - expected).square().mean()))
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("kind", ["tucker", "tensor_train"])
@pytest.mark.parametrize("stack", ["layers", "heads"])
def test_tensor_decomposition_is_dense_again(source: Path, tmp_path: Path, kind: Any, stack: Any) -> None:
    from transformers import AutoModelForCausalLM

    projections = ("attn.q_proj", "mlp.w2") if stack == "layers" else ("attn.q_proj", "attn.v_proj")
    method = TensorDecomposition(kind, stack, 0.6, projections)
    written = apply(method, source, tmp_path / "low")
    assert hf_config(written.directory) == hf_config(source)
    old, new = load_sections(source).state_dict(), load_sections(written.directory).state_dict()
    decompose = getattr(decomposition, kind)
    counts = 0
    for projection in projections:
        names = [f"layers.{index}.{projection}.weight" for index in range(2)]
        stacks = [torch.stack([old[name] for name in names])]
        if stack == "heads":
            stacks = [old[name].unflatten(0, (-1, 16)) for name in names]
        found = [decompose(each, 0.6) for each in stacks]
        counts += sum(each.num_parameters for each in found)
        expected = found[0].stack if stack == "layers" else [each.stack.flatten(0, 1) for each in found]
        for name, value in zip(names, expected, strict=True):
            torch.testing.assert_close(new[name], value, atol=1e-5, rtol=1e-4)
            assert 0.02 < (new[name] - old[name]).norm() / old[name].norm() < 1
    untouched = [name for name in old if not name.endswith(tuple(f"{p}.weight" for p in projections))]
    assert untouched
    assert all(torch.equal(new[name], old[name]) for name in untouched)
    theirs = AutoModelForCausalLM.from_pretrained(written.directory).eval()
    torch.testing.assert_close(logits(load_sections(written.directory)), logits(theirs), atol=1e-4, rtol=1e-4)
    (step,) = json.loads((written.directory / "compression.json").read_text())["steps"]
    assert (step["step"], step["kind"], step["stack"]) == ("TensorDecomposition", kind, stack)
    assert step["parameters"]["after"] == counts <= 0.6 * step["parameters"]["before"]


def test_quantized_factors(source: Path, tmp_path: Path) -> None:
    """Also where a row of codes ends within a byte: a rank of 5 has 15 bits of int3."""
    for multiple_of, scheme in ((16, "int8_g16"), (5, "int3"), (5, "ternary"), (5, "binary")):
        place = tmp_path / f"{multiple_of}_{scheme}"
        sizes = {"multiple_of": multiple_of, "embedding_rank": multiple_of}
        method = LowRank(ratio=0.8, three_factors=scheme == "int3", **sizes)
        apply(method, source, place / "low")
        quantized = apply(Quantization(scheme, embeddings=scheme, method="round"), place / "low", place / "codes")
        model = load_sections(quantized.directory)
        dense = apply(ToDense(), quantized.directory, place / "dense")
        torch.testing.assert_close(logits(model), logits(load_sections(dense.directory)), atol=1e-3, rtol=1e-3)
        if scheme == "int8_g16":
            before = load_sections(place / "low")
            assert (logits(model) - logits(before)).norm() < 0.1 * logits(before).norm()


def test_what_may_follow(llama: Path, tmp_path: Path) -> None:
    form = form_of(read_checkpoint(llama))
    assert LowRank(ratio=0.8, multiple_of=16).check(form).rank_multiple == 16
    factored = LowRank(ratio=0.5).check(form)
    assert Quantization("int4_g8").check(factored).schemes == {"int4_g8"}
    with pytest.raises(ConfigError, match="'int4_g16', wanted a group size that divides 8 inputs"):
        Quantization("int4_g16").check(factored)
    for step in (LowRank(ratio=0.5), Sparsification(), TensorDecomposition()):
        with pytest.raises(ConfigError, match=r"of factors', wanted whole matrices.*ToDense between them"):
            step.check(factored)
    assert ToDense().check(factored) == form
    assert DepthPruning(num_blocks=2).check(factored).rank_multiple == 8
    with pytest.raises(ConfigError, match="of a model with unstructured zeros, which it would fill in"):
        LowRank(ratio=0.5).check(Sparsification().check(form))
    apply(LowRank(ratio=0.5), llama, tmp_path / "low")
    assert form_of(read_checkpoint(tmp_path / "low")).rank_multiple == 8


def test_tables_have_ranks_of_their_own(llama: Path, tmp_path: Path) -> None:
    form = form_of(read_checkpoint(llama))
    method = LowRank(ratio=0.8, multiple_of=16, embedding_rank=20)
    factored = method.check(form)
    assert (factored.rank_multiple, factored.table_rank) == (16, 20)
    written = apply(method, llama, tmp_path / "low")
    assert form_of(written) == factored
    assert Quantization("int4_g16").check(factored).schemes == {"int4_g16"}
    assert Quantization("int4_g16", embeddings="int8_g4").check(factored).schemes == {"int4_g16", "int8_g4"}
    with pytest.raises(ConfigError, match=r"\.embeddings: got 'int4_g16', wanted a group size that divides 4 inputs"):
        Quantization("int4_g16", embeddings="int4_g16").check(factored)
    tables = LowRank(embedding_rank=16).check(form)
    assert Quantization("int4_g32").check(tables).schemes == {"int4_g32"}
    with pytest.raises(ConfigError, match="of factors', wanted whole matrices"):
        Sparsification().check(tables)
    assert ToDense().check(tables) == form


@pytest.mark.parametrize("multiple_of", [1, 8, 16])
def test_a_budget_that_does_not_pay_for_the_least_ranks(llama: Path, tmp_path: Path, multiple_of: int) -> None:
    form = form_of(read_checkpoint(llama))
    with pytest.raises(ConfigError, match=rf"\.budget: got 0.01, .*, rank {multiple_of} of each matrix") as caught:
        LowRank(budget=0.01, multiple_of=multiple_of).check(form)
    least = float(caught.value.problems[0].wanted.split()[1].rstrip(","))
    with pytest.raises(ConfigError, match=r"\.budget"):
        LowRank(budget=least - 0.002, multiple_of=multiple_of).check(form)
    apply(LowRank(budget=least, multiple_of=multiple_of, whiten=False), llama, tmp_path / "low")
    assert kept_share(tmp_path / "low") == pytest.approx(least, abs=0.002)


@pytest.mark.parametrize(
    ("settings", "stacks"),
    [
        ({"kind": "tucker"}, ["(2, 64, 64)", "(2, 32, 64)"]),
        ({"kind": "tensor_train"}, ["(2, 64, 64)", "(2, 32, 64)"]),
        ({"kind": "tucker", "stack": "heads"}, ["(4, 16, 64)", "(2, 16, 64)"]),
        ({"kind": "tensor_train", "projections": ["mlp.w2"]}, ["(2, 64, 96)"]),
    ],
)
def test_a_tensor_decomposition_of_nothing(llama: Path, settings: dict[str, Any], stacks: list[str]) -> None:
    form = form_of(read_checkpoint(llama))
    with pytest.raises(ConfigError) as caught:
        TensorDecomposition(**settings, ratio=1e-4).check(form)
    problems = caught.value.problems
    assert [problem.key for problem in problems] == [".ratio"] * len(stacks)
    found = [problem.wanted.partition(", ranks of 1 for a stack of ") for problem in problems]
    assert [stack for _, _, stack in found] == stacks
    least = max(float(share.removeprefix("from ")) for share, _, _ in found)
    TensorDecomposition(**settings, ratio=least).check(form)


def test_a_shallower_factored_model(llama: Path, tmp_path: Path) -> None:
    written = apply(LowRank(energy=0.7), llama, tmp_path / "low")
    shallow = apply(DepthPruning(num_blocks=1, protected=[1]), written.directory, tmp_path / "shallow")
    expected = {name.replace("layers.1.", "layers.0."): r for name, r in written.ranks.items() if "layers.1." in name}
    assert shallow.ranks == expected
    state, whole = as_tune(shallow, shallow.names(0)), as_tune(written, written.names(1))
    assert all(torch.equal(state[name.replace("layers.1.", "layers.0.")], value) for name, value in whole.items())
    assert load_sections(shallow.directory)(TOKENS_BS).isfinite().all()


def test_half_precision_files_stay_so(tmp_path: Path) -> None:
    model = save_model(tmp_path / "source", "qwen2")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    written = apply(LowRank(ratio=0.5, embedding_rank=8), tmp_path / "source", tmp_path / "low")
    assert {spec.dtype for spec in written.specs} == {torch.bfloat16}
    dense = apply(ToDense(), tmp_path / "low", tmp_path / "dense")
    assert {value.dtype for value in load_file(dense.directory / "model.safetensors").values()} == {torch.float32}
    assert hf_config(dense.directory)["dtype"] == "float32"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of ratio, energy and budget"),
        ({"embedding_rank": 0}, r"\.embedding_rank: got 0, wanted from 1"),
        ({"ratio": 0.5, "budget": 0.5}, "exactly one of ratio, energy and budget"),
        ({"ratio": 1.0}, r"\.ratio: got 1.0, wanted a share above 0 and below 1"),
        ({"energy": 0.0}, r"\.energy: got 0.0"),
        ({"budget": -0.5}, r"\.budget: got -0.5"),
        ({"ratio": 0.5, "multiple_of": 0}, r"\.multiple_of: got 0"),
        ({"ratio": 0.3, "multiple_of": 32}, r"attn\.q_proj \(64 x 64\) a rank of 32"),
        ({"embedding_rank": 64}, r"\.embedding_rank: got 64, wanted from 1 to 53"),
        ({"embedding_rank": 54}, r"\.embedding_rank: got 54, wanted from 1 to 53"),
    ],
)
def test_what_leaves_nothing_is_refused(llama: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LowRank(**settings).check(form_of(read_checkpoint(llama)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "cp"}, r"\.kind: got 'cp', wanted tucker or tensor_train"),
        ({"stack": "all"}, r"\.stack: got 'all', wanted layers or heads"),
        ({"ratio": 1.5}, r"\.ratio: got 1.5"),
        ({"stack": "heads", "projections": ["mlp.w1"]}, r"\.projections: got \['mlp.w1'\], wanted some of attn.q_proj"),
        ({"projections": ["attn.o_proj"]}, r"attn.o_proj"),
        ({"projections": []}, r"\.projections: got \[\], wanted some of"),
    ],
)
def test_tensor_decompositions_that_there_are_not(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TensorDecomposition(**settings)
