"""Smoothed models: the same function with other weights, which lose less when they are quantized."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor

from kd_recipes import entry
from kd_recipes.compression import Form, Quantization, Smoothing, Sparsification, form_of, read_checkpoint
from kd_recipes.compression.convert import as_tune
from kd_recipes.errors import ConfigError
from kd_recipes.lattices import Scheme, quantize
from toy import VOCABULARY, Toys, calibration, hf_config, load_sections, save_model, text_section

GENERATOR = torch.Generator().manual_seed(0)
TEXT = calibration([(torch.randint(VOCABULARY, (8, 48), generator=GENERATOR), None)])
TOKENS_BS = torch.randint(VOCABULARY, (4, 32), generator=GENERATOR)
METHODS = [Smoothing("smoothquant"), Smoothing("smoothquant", alpha=0.9), Smoothing("awq", scheme="int3_g32")]
# The first layer of each input -> all that share it, and what it comes from, by torchtune's names.
PAIRS = {
    "attn.q_proj": (("attn.q_proj", "attn.k_proj", "attn.v_proj"), "sa_norm.scale"),
    "attn.output_proj": (("attn.output_proj",), "attn.v_proj.weight"),
    "mlp.w1": (("mlp.w1", "mlp.w3"), "mlp_norm.scale"),
    "mlp.w2": (("mlp.w2",), "mlp.w3.weight"),
}
OUTLIERS = [3, 17, 40]


def plant_outliers(directory: Path) -> None:
    """Give a model a few input channels 30 times as large as the others, and weights there that are as much smaller.

    They are those of a trained model, where quantization suffers: what is computed does not change.
    """
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[OUTLIERS] *= 30
        if re.search(r"(q|k|v|gate|up)_proj.weight", name):
            tensor[:, OUTLIERS] /= 30
        if name.endswith("up_proj.weight"):
            tensor[OUTLIERS] *= 30
        if name.endswith("down_proj.weight"):
            tensor[:, OUTLIERS] /= 30
        if re.search(r"v_proj.(weight|bias)", name):
            tensor[OUTLIERS[:2]] *= 30  # one of each key-value head
        if name.endswith("o_proj.weight"):  # of two query heads each
            tensor[:, [3, 19, 33, 49]] /= 30
    save(directory, tensors)


def save(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")


@pytest.fixture(params=["llama", "qwen2"])
def plain(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint that a test may change."""
    save_model(tmp_path / "plain", request.param)
    return tmp_path / "plain"


@pytest.fixture
def outlying(plain: Path) -> Path:
    """A checkpoint with planted outliers."""
    plant_outliers(plain)
    return plain


def apply(step: Any, source: Path, destination: Path) -> Path:
    """What the recipe does: the check, then the step."""
    checkpoint = read_checkpoint(source)
    step.check(form_of(checkpoint))
    return step.apply(checkpoint, destination, TEXT).directory


def weights(directory: Path) -> dict[str, Tensor]:
    checkpoint = read_checkpoint(directory)
    return as_tune(checkpoint, [spec.name for spec in checkpoint.specs])


@torch.no_grad()
def logits(model: Any) -> Tensor:
    output = model.double()(TOKENS_BS)
    return getattr(output, "logits", output)


def distance(directory: Path, expected: Tensor) -> float:
    """Of a model's logits from others, relative to these."""
    return float((logits(load_sections(directory)) - expected).norm() / expected.norm())


@torch.no_grad()
def inputs_of(directory: Path) -> dict[str, Tensor]:
    """What enters linear layers on the calibration text, ``[T, I]``, float64; seen in the whole model."""
    model, seen = load_sections(directory).double(), {}
    for index in range(2):
        for layer in PAIRS:
            name = f"layers.{index}.{layer}"
            see = lambda _module, args, name=name: seen.setdefault(name, []).append(args[0][0])  # noqa: E731
            model.get_submodule(name).register_forward_pre_hook(see)
    for tokens_1S, _ in TEXT.windows:
        model(tokens_1S)
    return {name: torch.cat(windows) for name, windows in seen.items()}


def ratio(old: Tensor, new: Tensor) -> Tensor:
    """By what rows have been divided."""
    return (old.double() / new.double()).view(len(old), -1).median(1).values


def scales_of(before: Mapping[str, Tensor], after: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """By what the inputs of a block's layers have been divided, ``[I]``, as what they come from tells."""
    old, new = ({name: state[f"layers.{index}.{pair[1]}"] for name, pair in PAIRS.items()} for state in (before, after))
    norm_D = ratio(old["attn.q_proj"], new["attn.q_proj"])
    value_K = ratio(old["attn.output_proj"] * norm_D, new["attn.output_proj"])
    mlp_norm_D = ratio(old["mlp.w1"], new["mlp.w1"])
    return {
        "attn.q_proj": norm_D,
        "attn.output_proj": torch.cat([value_K[:16], value_K[:16], value_K[16:], value_K[16:]]),
        "mlp.w1": mlp_norm_D,
        "mlp.w2": ratio(old["mlp.w2"] * mlp_norm_D, new["mlp.w2"]),
    }


# ------------------------------------------------------------------------------------------------------- the function
@pytest.mark.parametrize("step", METHODS, ids=str)
def test_the_same_function_with_other_weights(step: Smoothing, source: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    directory = apply(step, source, tmp_path / "smooth")
    assert hf_config(directory) == hf_config(source)
    ours, theirs = load_sections(directory), AutoModelForCausalLM.from_pretrained(directory).eval()
    torch.testing.assert_close(logits(ours), logits(load_sections(source)), atol=1e-4, rtol=1e-5)
    expected = logits(AutoModelForCausalLM.from_pretrained(source).eval())
    torch.testing.assert_close(logits(theirs), expected, atol=1e-4, rtol=1e-5)
    before, after = weights(source), weights(directory)
    assert {key: value.dtype for key, value in after.items()} == {key: value.dtype for key, value in before.items()}
    # every pair, and nothing beside
    same = {key for key, value in before.items() if torch.equal(after[key], value)}
    linears = {"attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.output_proj", "mlp.w1", "mlp.w2", "mlp.w3"}
    expected_same = {
        key for key in before if not key.startswith("layers.") or key.endswith(("q_proj.bias", "k_proj.bias"))
    }
    if step.method == "smoothquant":  # awq may leave an input as it is
        assert same == expected_same
    else:
        assert same >= expected_same
        changed = {key.split(".", 2)[2].rpartition(".")[0] for key in before.keys() - same}
        assert changed >= linears - {"attn.output_proj"}


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 1.0])
def test_smoothquant_balances_inputs_and_weights(alpha: float, outlying: Path, tmp_path: Path) -> None:
    before, inputs = weights(outlying), inputs_of(outlying)
    after = weights(apply(Smoothing("smoothquant", alpha=alpha), outlying, tmp_path / "smooth"))
    for index in range(2):
        found = scales_of(before, after, index)
        for name, (layers, _) in PAIRS.items():
            largest_I = inputs[f"layers.{index}.{name}"].abs().amax(0)
            # columns as they are when their turn comes: those of w2 and output_proj have no scale of their own yet
            weight_OI = torch.cat([before[f"layers.{index}.{layer}.weight"].double() for layer in layers])
            weight_I = weight_OI.abs().amax(0)
            if name == "attn.output_proj":
                largest_I, weight_I = (shared(values_I) for values_I in (largest_I, weight_I))
            expected_I = largest_I**alpha / weight_I ** (1 - alpha)
            torch.testing.assert_close(found[name], expected_I, rtol=1e-4, atol=0)


def shared(values_I: Tensor) -> Tensor:
    """The largest over the two query heads of 16 channels that share a key-value head, for both."""
    head_0, head_1, head_2, head_3 = values_I.split(16)
    first, second = torch.maximum(head_0, head_1), torch.maximum(head_2, head_3)
    return torch.cat([first, first, second, second])


@pytest.mark.parametrize("step", METHODS, ids=str)
def test_dead_channels_keep_their_weights(step: Smoothing, plain: Path, tmp_path: Path) -> None:
    tensors = load_file(plain / "model.safetensors")
    for index in range(2):
        part = {name.split(".", 3)[3]: tensor for name, tensor in tensors.items() if f".layers.{index}." in name}
        part["input_layernorm.weight"][5] = 0  # an input that is always zero
        part["post_attention_layernorm.weight"][6] = 1e-12
        for name in ("mlp.up_proj.weight", "self_attn.v_proj.weight", "self_attn.v_proj.bias"):
            if name in part:
                part[name][7] = 0
        for name in ("mlp.down_proj.weight", "self_attn.o_proj.weight"):  # inputs that go nowhere
            part[name][:, [9, 25]] = 0
    save(plain, tensors)
    directory = apply(step, plain, tmp_path / "smooth")
    before, after = weights(plain), weights(directory)
    assert all(value.isfinite().all() for value in after.values())
    for layer, channels in {"attn.q_proj": 5, "mlp.w1": 6, "mlp.w2": 7, "attn.output_proj": [7, 23]}.items():
        key = f"layers.1.{layer}.weight"
        assert torch.equal(after[key][:, channels], before[key][:, channels])
    assert after["layers.1.mlp_norm.scale"][6] == before["layers.1.mlp_norm.scale"][6]
    expected = logits(load_sections(plain))
    torch.testing.assert_close(logits(load_sections(directory)), expected, atol=1e-4, rtol=1e-5)


def test_a_model_that_gives_nothing_stays_as_it_is(tmp_path: Path) -> None:
    save_model(tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    save(tmp_path / "source", {name: tensor * ("layers" not in name) for name, tensor in tensors.items()})
    for step in METHODS:
        directory = apply(step, tmp_path / "source", tmp_path / f"{step.method}{step.alpha}")
        before, after = weights(tmp_path / "source"), weights(directory)
        assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_in_bfloat16_a_norm_is_not_rounded_beside_the_weights(model_type: str, tmp_path: Path) -> None:
    """A rounding to 8 bits is at most 2^-8 off: one, of the weights, and not a second one, of the norm."""
    save_model(tmp_path / "source", model_type).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    plant_outliers(tmp_path / "source")
    before = weights(tmp_path / "source")
    after = weights(apply(Smoothing("smoothquant"), tmp_path / "source", tmp_path / "smooth"))
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    for norm, layers in {"sa_norm": ("attn.q_proj", "attn.k_proj"), "mlp_norm": ("mlp.w1",)}.items():
        for layer in layers:
            old, new = (
                state[f"layers.1.{norm}.scale"].double() * state[f"layers.1.{layer}.weight"].double()
                for state in (before, after)
            )
            assert ((new / old - 1).abs() <= 2**-8 * 1.0001).all()
    assert not torch.equal(before["layers.1.sa_norm.scale"], after["layers.1.sa_norm.scale"])


# -------------------------------------------------------------------------------------------------- what it is good for
@pytest.mark.parametrize(
    ("step", "scheme"),
    [
        (Smoothing("smoothquant"), "8da8w"),
        (Smoothing("smoothquant"), "8da4w_g32"),
        (Smoothing("awq", scheme="gguf_q4_0"), "gguf_q4_0"),
        (Smoothing("awq", scheme="int3_g16"), "int3_g16"),
        (Smoothing("awq", scheme="int4"), "int4"),
    ],
    ids=str,
)
def test_outliers_cost_less(step: Smoothing, scheme: str, outlying: Path, tmp_path: Path) -> None:
    expected = logits(load_sections(outlying))
    smooth = apply(step, outlying, tmp_path / "smooth")
    method = Quantization(scheme, method="round")
    rounded = distance(apply(method, outlying, tmp_path / "rounded"), expected)
    smoothed = distance(apply(method, smooth, tmp_path / "quantized"), expected)
    assert smoothed < 0.8 * rounded


@pytest.mark.parametrize("scheme", ["gguf_q4_0", "int2_g32", "8da8w", "ternary_g32", "float8"])
@pytest.mark.parametrize("has_outliers", [False, True])
def test_awq_never_costs_outputs(scheme: str, has_outliers: bool, plain: Path, tmp_path: Path) -> None:
    """Of the layers of each input, on the text itself: what their rounded weights give, against what they gave."""
    parsed = Scheme.parse(scheme)
    if has_outliers:
        plant_outliers(plain)
    before, inputs = weights(plain), inputs_of(plain)
    after = weights(apply(Smoothing("awq", scheme=scheme), plain, tmp_path / "smooth"))
    gains = []
    for index in range(2):
        scales = scales_of(before, after, index)
        rows = {"attn.v_proj": scales["attn.output_proj"][[*range(16), *range(32, 48)]], "mlp.w3": scales["mlp.w2"]}
        for name, (layers, _) in PAIRS.items():
            rounded, smoothed = 0.0, 0.0
            for layer in layers:
                old, new = (state[f"layers.{index}.{layer}.weight"] for state in (before, after))
                x_TI, weight_OI = inputs[f"layers.{index}.{name}"], old.double()
                rounded_OI = quantize(new, parsed).dequantize().double() / scales[name]
                rounded_OI *= rows[layer][:, None] if layer in rows else 1.0
                rounded += float((x_TI @ (quantize(old, parsed).dequantize() - weight_OI).T).square().sum())
                smoothed += float((x_TI @ (rounded_OI - weight_OI).T).square().sum())
            # rows that are divided after the search get other scales in 16 bits
            assert smoothed <= rounded * (1.005 if rows.keys() & {*layers} else 1.00001), (index, name)
            gains.append(1 - smoothed / rounded)
    assert sum(gains) / len(gains) > (0.1 if has_outliers and parsed.kind != "float8" else 0.0)


@pytest.mark.parametrize("step", METHODS, ids=str)
def test_zeros_stay_where_they_are(step: Smoothing, source: Path, tmp_path: Path) -> None:
    sparse = apply(Sparsification(0.5, "2:4"), source, tmp_path / "sparse")
    smooth = apply(step, sparse, tmp_path / "smooth")
    before, after = weights(sparse), weights(smooth)
    assert all(torch.equal(value == 0, after[key] == 0) for key, value in before.items())
    assert form_of(read_checkpoint(smooth)).zeros == "2:4"
    apply(Quantization("gguf_q4_0", method="round"), smooth, tmp_path / "codes")


# ---------------------------------------------------------------------------------------------------------- the recipe
def compress_config(toys: Toys, tmp_path: Path, *steps: dict[str, Any]) -> list[str]:
    cfg = OmegaConf.load(Path(__file__).parents[2] / "configs" / "quantize.yaml")
    cfg.checkpoint_dir, cfg.output_dir = str(toys.student), str(tmp_path / "result")
    cfg.tokenizer.max_seq_len = 128
    cfg.dataset = text_section(toys.data / "text.jsonl", tmp_path / "cache")
    cfg.compress = [{**step, "_component_": f"kd_recipes.compression.{step['_component_']}"} for step in steps]
    cfg.update(num_calibration_tokens=300, num_held_out_tokens=100, sequence_length=64, dtype="fp32")
    OmegaConf.save(cfg, tmp_path / "config.yaml")
    return ["--config", str(tmp_path / "config.yaml")]


CODES = {"_component_": "Quantization", "scheme": "gguf_q4_0"}


@pytest.mark.parametrize("method", ["round", "gptq"])
def test_with_quantization_in_one_list(
    method: str, toys: Toys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    awq = {"_component_": "Smoothing", "method": "awq", "scheme": "gguf_q4_0"}
    smooth = {"_component_": "Smoothing", "method": "smoothquant"}
    argv = compress_config(toys, tmp_path, smooth, awq, {**CODES, "method": method})
    assert entry.run_recipe("compress", argv) == 0
    printed = capsys.readouterr().out
    assert re.search(
        r"Scales for 8 of 8 inputs \(100\.0%\); largest channel over the mean one: [\d.]+ -> [\d.]+ ", printed
    )
    found = re.search(r"Scales for (\d) of 8 inputs \((.*)%\); error of the outputs in gguf_q4_0: (.*)% less", printed)
    assert found
    assert float(found[2]) == 100 * int(found[1]) / 8
    assert 0 < float(found[3]) < 100
    steps = json.loads((tmp_path / "result" / "compression.json").read_text())["steps"]
    assert steps[0] == {"step": "Smoothing", "method": "smoothquant", "alpha": 0.5, "scheme": None}
    assert steps[1] == {"step": "Smoothing", "method": "awq", "alpha": None, "scheme": "gguf_q4_0"}
    assert form_of(read_checkpoint(tmp_path / "result")).schemes == {"gguf_q4_0"}
    assert load_sections(tmp_path / "result")(TOKENS_BS).isfinite().all()


def test_not_after_quantization(toys: Toys, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = compress_config(toys, tmp_path, CODES, {"_component_": "Smoothing", "method": "smoothquant"})
    assert entry.run_recipe("compress", argv) == entry.EXIT_BAD_INPUT
    assert "compress[1]._component_: got 'smoothing of weights in gguf_q4_0, which" in capsys.readouterr().err
    assert not (tmp_path / "result").exists()


# ------------------------------------------------------------------------------------------------------------- refusals
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
FORM = Form({"vocab_size": 320, "num_hidden_layers": 2, "tie_word_embeddings": True, **SIZES})


@pytest.mark.parametrize(
    ("settings", "form", "message"),
    [
        ({"method": "luck"}, FORM, r"\.method: got 'luck', wanted smoothquant or awq$"),
        ({"method": None}, FORM, r"\.method: got None, wanted smoothquant or awq$"),
        ({"method": "smoothquant", "alpha": -0.1}, FORM, r"\.alpha: got -0\.1, wanted a number from 0 to 1"),
        ({"method": "smoothquant", "alpha": 1.1}, FORM, r"\.alpha: got 1\.1, wanted a number from 0 to 1"),
        (
            {"method": "smoothquant", "scheme": "8da8w"},
            FORM,
            r"\.scheme: got '8da8w', wanted no scheme with smoothquant",
        ),
        ({"method": "awq"}, FORM, r"\.scheme: got None, wanted the scheme of the quantization that follows"),
        ({"method": "awq", "scheme": "int4", "alpha": 0.5}, FORM, r"\.alpha: got 0\.5, wanted no alpha with awq"),
        ({"method": "awq", "scheme": "q4"}, FORM, r"\.scheme: got 'q4', wanted gguf_q8_0, "),
        (
            {"method": "awq", "scheme": "int4_g64"},
            FORM,
            r"\.scheme: got 'int4_g64', .* divides 96 inputs. These do: 16",
        ),
        ({"method": "smoothquant"}, Form(FORM.config, rank_multiple=8), r"got 'smoothing of factors', wanted whole"),
        (
            {"method": "awq", "scheme": "int4"},
            Form(FORM.config, schemes=frozenset({"int8"})),
            r"got 'smoothing of weights in int8, which it would take off their lattice'",
        ),
    ],
)
def test_what_does_not_fit(settings: dict[str, Any], form: Form, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Smoothing(**settings).check(form)


def test_what_fits() -> None:
    for form in (FORM, Form(FORM.config, zeros="2:4"), Form(FORM.config, zeros="unstructured")):
        for step in (*METHODS, Smoothing("smoothquant", alpha=0.0), Smoothing("smoothquant", alpha=1)):
            assert step.check(form) == form


@pytest.mark.parametrize("step", METHODS, ids=str)
def test_text_and_weights_that_say_nothing(step: Smoothing, tmp_path: Path) -> None:
    theirs = save_model(tmp_path / "source")
    nothing = calibration([(TOKENS_BS, torch.zeros(4, 32, dtype=torch.bool))])
    with pytest.raises(ConfigError, match="no token that counts"):
        step.apply(read_checkpoint(tmp_path / "source"), tmp_path / "smooth", nothing)
    counts_BS = torch.ones(4, 32, dtype=torch.bool)
    counts_BS[1:3] = False  # whole windows
    some = calibration([(TOKENS_BS, counts_BS)])
    step.apply(read_checkpoint(tmp_path / "source"), tmp_path / "some", some)
    assert distance(tmp_path / "some", logits(load_sections(tmp_path / "source"))) < 1e-5
    theirs.model.layers[1].mlp.up_proj.weight.data[3, 3] = torch.inf
    theirs.save_pretrained(tmp_path / "source")
    with pytest.raises(ConfigError, match="block 1 that are not finite"):
        step.apply(read_checkpoint(tmp_path / "source"), tmp_path / "smooth", TEXT)
    assert not (tmp_path / "smooth").exists()
