"""Quantized checkpoints: codes in files, the lattice's values when they are loaded, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torchao.quantization import IntxUnpackedToInt8Tensor

from kd_recipes.compression import (
    CompressedCheckpointer,
    DepthPruning,
    Form,
    LowRank,
    Quantization,
    QuantizationAwareTraining,
    Sparsification,
    TensorDecomposition,
    ToDense,
    WidthPruning,
    cross_entropy,
    form_of,
    read_checkpoint,
    to_torchao,
)
from kd_recipes.compression.convert import as_tune
from kd_recipes.compression.form import zero_pattern
from kd_recipes.compression.stream import INPUT_OF, Stream
from kd_recipes.errors import ConfigError
from kd_recipes.lattices import Scheme, gptq, hqq, quantize
from toy import VOCABULARY, calibration, hf_config, load_sections, save_model

GENERATOR = torch.Generator().manual_seed(0)
TEXT = calibration([(torch.randint(VOCABULARY, (8, 48), generator=GENERATOR), None)])
CPU: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
TOKENS_BS = torch.randint(VOCABULARY, (2, 32), generator=GENERATOR)
SCHEMES = ["gguf_q8_0", "gguf_q4_0", "int3_g16", "int5", "ternary_g32", "binary_g32", "8da4w_g32", "8da8w", "float8"]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save_model(tmp_path / "source", tie_word_embeddings=False)
    return tmp_path / "source"


@torch.no_grad()
def logits(model: Any) -> Tensor:
    output = model(TOKENS_BS)
    return getattr(output, "logits", output)


def weights(directory: Path) -> dict[str, Tensor]:
    checkpoint = read_checkpoint(directory)
    return as_tune(checkpoint, [spec.name for spec in checkpoint.specs])


def apply(method: Any, source: Path, destination: Path) -> Any:
    """What the recipe does: the check, then the step."""
    checkpoint = read_checkpoint(source)
    method.check(form_of(checkpoint))
    return method.apply(checkpoint, destination, TEXT)


def scheme_of(key: str, schemes: dict[str, str]) -> Scheme | None:
    return Scheme.parse(schemes[key]) if key in schemes else None


@pytest.mark.parametrize("scheme", SCHEMES)
def test_files_hold_the_lattice_and_nothing_rounds_again(source: Path, tmp_path: Path, scheme: str) -> None:
    from transformers import AutoModelForCausalLM

    method = Quantization(scheme, embeddings=scheme, method="round")
    written = apply(method, source, tmp_path / "codes")
    original = weights(source)
    matrices = {key for key, value in original.items() if value.ndim == 2}
    config = json.loads((tmp_path / "codes" / "config.json").read_text())
    assert config["schemes"] == dict.fromkeys(matrices, scheme) == written.schemes
    assert (config["model_type"], config["ranks"], config["dense"]) == ("kd_recipes", {}, hf_config(source))
    with pytest.raises(ValueError, match="kd_recipes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "codes")
    # the files: codes of so many bytes, and scales of the format's dtype, for safetensors alone
    parsed, sizes = Scheme.parse(scheme), {}
    with safe_open(tmp_path / "codes" / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no dict
            tensor = file.get_tensor(name)
            if name.endswith(".codes"):
                assert tensor.dtype == torch.uint8
                sizes[name] = tensor.numel()
            if name.endswith(".scales"):
                assert tensor.dtype == parsed.scale_dtype
    assert sum(sizes.values()) == sum(
        original[key].shape[0] * math.ceil(original[key].shape[1] * parsed.bits / 8) for key in matrices
    )
    bits = sum(original[key].numel() * parsed.bits_per_weight(original[key].shape[1]) for key in matrices)
    rest = sum(value.nbytes for key, value in original.items() if key not in matrices)
    assert written.num_bytes == math.ceil(bits / 8) + rest
    # what is loaded
    model = load_sections(tmp_path / "codes")
    state, again = model.state_dict(), load_sections(tmp_path / "codes").state_dict()
    for key, value in original.items():
        expected = quantize(value, parsed).dequantize() if key in matrices else value
        assert torch.equal(state[key], expected), key
        assert torch.equal(again[key], expected), key
    # the dense model
    dense = apply(ToDense(), tmp_path / "codes", tmp_path / "dense")
    found = weights(dense.directory)
    assert found.keys() == original.keys()
    assert all(torch.equal(found[key], state[key]) for key in found)
    theirs = AutoModelForCausalLM.from_pretrained(dense.directory).eval()
    if not parsed.dynamic_activations:
        torch.testing.assert_close(logits(model), logits(theirs), atol=1e-4, rtol=1e-4)
    else:  # their inputs are not rounded, ours are
        change = (logits(model) - logits(theirs)).norm() / logits(theirs).norm()
        assert 1e-3 < change < 0.2
    assert cross_entropy(written, TEXT) == pytest.approx(
        cross_entropy(dense, TEXT), rel=0.1 if parsed.dynamic_activations else 1e-5
    )


@pytest.mark.parametrize("scheme", ["gguf_q4_0", "int3_g16", "ternary_g32", "binary_g32", "8da8w", "float8"])
def test_gptq_writes_the_lattice_too(source: Path, tmp_path: Path, scheme: str) -> None:
    written = apply(Quantization(scheme), source, tmp_path / "codes")
    state, parsed = load_sections(tmp_path / "codes").state_dict(), Scheme.parse(scheme)
    for block in Stream(read_checkpoint(source), TEXT, "test", [0]):
        grams = block.grams(list(INPUT_OF))
        for name in INPUT_OF:
            weight_OI = block.weight(name)
            expected = quantize(weight_OI, parsed) if scheme == "float8" else gptq(weight_OI, grams[name], parsed)
            assert torch.equal(state[f"layers.0.{name}.weight"], expected.dequantize()), name
    assert not any(key.startswith(("tok_embeddings", "output")) for key in written.schemes)
    # what is next is fitted to what comes from the lattice, inputs that are rounded too
    seen: list[Tensor] = []
    for block in Stream(written, TEXT, "test"):
        seen.clear()
        block.run({"sa_norm": lambda _, y_TD: seen.append(y_TD)})
    gram_DD = sum((y_TD.T @ y_TD for y_TD in seen[1:]), seen[0].T @ seen[0])
    weight_OI = weights(source)["layers.1.attn.v_proj.weight"]
    expected = quantize(weight_OI, parsed) if scheme == "float8" else gptq(weight_OI, gram_DD, parsed)
    assert torch.equal(state["layers.1.attn.v_proj.weight"], expected.dequantize())


@pytest.mark.parametrize("scheme", ["gguf_q8_0", "gguf_q4_0", "int3_g16", "int5", "8da4w_g32", "8da8w"])
def test_hqq_writes_the_lattice_too(source: Path, tmp_path: Path, scheme: str) -> None:
    """Every matrix: of no calibration text, so that those outside the blocks are no exception."""
    apply(Quantization(scheme, embeddings="int6_g32", method="hqq"), source, tmp_path / "codes")
    original, state = weights(source), load_sections(tmp_path / "codes").state_dict()
    for key, value in original.items():
        parsed = Scheme.parse(scheme if key.startswith("layers.") else "int6_g32")
        expected = hqq(value, parsed).dequantize() if value.ndim == 2 else value
        assert torch.equal(state[key], expected), key
        assert value.ndim < 2 or not torch.equal(expected, quantize(value, parsed).dequantize()), key
    (step,) = json.loads((tmp_path / "codes" / "compression.json").read_text())["steps"]
    assert step["method"] == "hqq"


def test_hqq_of_factors_and_of_zeros(source: Path, tmp_path: Path) -> None:
    low_rank = apply(LowRank(ratio=0.6, multiple_of=8), source, tmp_path / "low_rank")
    written = apply(Quantization("int4_g8", method="hqq"), low_rank.directory, tmp_path / "codes")
    before, after = weights(low_rank.directory), weights(written.directory)
    assert any(key.endswith(".u") for key in written.schemes)
    for key in written.schemes:
        assert torch.equal(after[key], hqq(before[key], Scheme.parse("int4_g8")).dequantize()), key
    sparse = apply(Sparsification(0.5, "2:4"), source, tmp_path / "sparse")
    written = apply(Quantization("gguf_q4_0", method="hqq"), sparse.directory, tmp_path / "sparse_codes")
    before, after = weights(sparse.directory), weights(written.directory)
    assert all(bool((after[key][before[key] == 0] == 0).all()) for key in written.schemes)


def test_gptq_loses_less_than_rounding(llama: Path, tmp_path: Path) -> None:
    """On correlated inputs: the same few words in all windows."""
    losses = {}
    text = calibration([(torch.randint(12, (16, 48), generator=GENERATOR), None)])
    expected = logits_of(llama, text)
    for method in ("round", "gptq"):
        written = Quantization("int3_g32", method=method).apply(read_checkpoint(llama), tmp_path / method, text)
        losses[method] = float((logits_of(written.directory, text) - expected).square().mean())
    assert losses["gptq"] < 0.8 * losses["round"]


@torch.no_grad()
def logits_of(directory: Path, text: Any) -> Tensor:
    checkpoint = read_checkpoint(directory)
    stream = Stream(checkpoint, text, "test")
    list(stream)
    norm, head = stream.final_norm(), weights(directory)["output.weight"]
    return torch.cat([norm(hidden_1SD)[0] @ head.T for hidden_1SD in stream.hidden])


def test_overrides_by_pattern_the_last_of_which_counts(llama: Path, tmp_path: Path) -> None:
    overrides = {"layers.1.*": None, "*.w2": "int8_g32", "layers.0.attn.*": "8da4w_g32", "output": "float8"}
    written = apply(Quantization("gguf_q4_0", overrides=overrides, method="round"), llama, tmp_path / "codes")
    mlp = {f"layers.0.mlp.{name}.weight": "gguf_q4_0" for name in ("w1", "w3")}
    attention = {f"layers.0.attn.{name}_proj.weight": "8da4w_g32" for name in ("q", "k", "v", "output")}
    down = {f"layers.{index}.mlp.w2.weight": "int8_g32" for index in (0, 1)}
    assert written.schemes == {**mlp, **attention, **down, "output.weight": "float8"}
    assert form_of(written).schemes == {"gguf_q4_0", "8da4w_g32", "int8_g32", "float8"}
    state, original = load_sections(tmp_path / "codes").state_dict(), weights(llama)
    for key, value in original.items():
        scheme = scheme_of(key, written.schemes)
        assert torch.equal(state[key], value if scheme is None else quantize(value, scheme).dequantize()), key


def test_a_row_that_does_not_fill_its_last_byte(tmp_path: Path) -> None:
    """33 neurons: a row of ternary codes has 66 bits."""
    save_model(tmp_path / "source", intermediate_size=33)
    for scheme in ("ternary", "binary", "int3", "int4"):
        apply(Quantization(scheme, method="round"), tmp_path / "source", tmp_path / scheme)
        found, original = load_sections(tmp_path / scheme).state_dict(), weights(tmp_path / "source")
        key = "layers.1.mlp.w2.weight"
        assert torch.equal(found[key], quantize(original[key], Scheme.parse(scheme)).dequantize())


def test_zeros_stay_zeros(source: Path, tmp_path: Path) -> None:
    sparse = apply(Sparsification(0.5, "2:4"), source, tmp_path / "sparse")
    written = apply(Quantization("gguf_q4_0", method="round"), sparse.directory, tmp_path / "codes")
    before, after = weights(sparse.directory), weights(written.directory)
    for key in written.schemes:
        assert zero_pattern(before[key]) == "2:4"
        assert bool((after[key][before[key] == 0] == 0).all())


def test_a_quantized_model_may_lose_blocks(source: Path, tmp_path: Path) -> None:
    written = apply(Quantization("int3_g16", embeddings="gguf_q8_0"), source, tmp_path / "codes")
    shallow = apply(DepthPruning(num_blocks=1, protected=[1]), written.directory, tmp_path / "shallow")
    before, after = weights(written.directory), weights(shallow.directory)
    assert shallow.schemes.keys() == {key for key in written.schemes if ".1." not in key}
    assert len(after) < len(before)
    for key, value in after.items():
        assert torch.equal(value, before[key.replace("layers.0.", "layers.1.")]), key
    assert logits(load_sections(shallow.directory)).isfinite().all()


def test_what_transformers_loads_is_not_rounded_to_the_dtype_that_the_source_had(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    save_model(tmp_path / "source").to(torch.bfloat16).save_pretrained(tmp_path / "source")
    assert hf_config(tmp_path / "source")["dtype"] == "bfloat16"
    apply(Quantization("gguf_q8_0", method="round"), tmp_path / "source", tmp_path / "codes")
    for dtype in ("fp32", "bf16"):
        apply(ToDense(dtype), tmp_path / "codes", tmp_path / dtype)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / dtype)
        exact = weights(tmp_path / "codes")["layers.0.mlp.w1.weight"]
        found = theirs.model.layers[0].mlp.gate_proj.weight
        assert torch.equal(found, exact.to(torch.float32 if dtype == "fp32" else torch.bfloat16))


def test_a_student_is_written_as_it_was_trained(source: Path, tmp_path: Path) -> None:
    model = load_sections(source)
    schemes = QuantizationAwareTraining("int3_g16", embeddings="gguf_q8_0").attach(model)
    trained = {key: model.get_submodule(key.rpartition(".")[0]).weight.detach() for key in schemes}
    state = {name.replace("parametrizations.weight.original", "weight"): v for name, v in model.state_dict().items()}
    writer = CompressedCheckpointer(str(source), str(tmp_path))
    writer.save_checkpoint({"model": state, "schemes": schemes}, epoch=3)
    found = load_sections(tmp_path / "epoch_3").state_dict()
    assert found.keys() == state.keys()
    assert len(trained) == 14 + (1 if hf_config(source)["tie_word_embeddings"] else 2)
    for key, value in found.items():
        assert torch.equal(value, trained.get(key, state[key])), key


SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
FORM = Form({"vocab_size": 320, "num_hidden_layers": 2, "tie_word_embeddings": True, **SIZES})
SPARSE = Sparsification().check(FORM)
QUANTIZED = Quantization("gguf_q4_0").check(FORM)


@pytest.mark.parametrize(
    ("settings", "form", "message"),
    [
        ({"scheme": "int9"}, FORM, r"\.scheme: got 'int9', wanted gguf_q8_0"),
        ({"scheme": "int4", "embeddings": "fp8"}, FORM, r"\.embeddings: got 'fp8'"),
        ({"scheme": "int4", "overrides": {"*.w2": "q4"}}, FORM, r"\.overrides\.\*\.w2: got 'q4'"),
        ({"scheme": "int4", "method": "awq"}, FORM, r"\.method: got 'awq', wanted round, hqq or gptq$"),
        (
            {"scheme": "ternary_g32", "method": "hqq"},
            FORM,
            r"\.method: got 'hqq for ternary_g32', wanted a scheme of integers for hqq: gguf_q8_0, .* all schemes$",
        ),
        ({"scheme": "int4", "embeddings": "float8", "method": "hqq"}, FORM, r"\.method: got 'hqq for float8'"),
        (
            {"scheme": "int4", "overrides": {"*.w2": "binary"}, "method": "hqq"},
            FORM,
            r"\.method: got 'hqq for binary'",
        ),
        ({"scheme": None, "overrides": {"*.w2": None}}, FORM, r"\.scheme: got None, wanted a scheme"),
        ({"scheme": ["int4"]}, FORM, r"\.scheme: got \['int4'\], wanted gguf_q8_0"),
        ({"scheme": "int4_g64"}, FORM, r"\.scheme: got 'int4_g64', .* divides 96 inputs. These do: 16, 32$"),
        ({"scheme": "int4", "embeddings": "int4_g128"}, FORM, r"\.embeddings: .* divides 64 inputs"),
        ({"scheme": "int4", "overrides": {"*.w4": "int3"}}, FORM, r"\.overrides: got \['\*\.w4'\], wanted patterns"),
        ({"scheme": "int4", "overrides": {"layers.2.*": None}}, FORM, r"\.overrides: got \['layers\.2\.\*'\]"),
        ({"scheme": "int4", "overrides": {"output": "int8"}}, FORM, r"\.overrides: got \['output'\]"),
        ({"scheme": "binary_g32", "method": "round"}, SPARSE, "a scheme that has a zero, for a model"),
        ({"scheme": "gguf_q4_0"}, SPARSE, r"\.method: got 'gptq', wanted round or hqq for a model"),
        ({"scheme": "int8", "method": "round"}, QUANTIZED, "of weights in gguf_q4_0, .* quantize last"),
    ],
)
def test_what_does_not_fit(settings: dict[str, Any], form: Form, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Quantization(**settings).check(form)


def test_what_fits() -> None:
    assert Quantization("binary_g32", "gguf_q8_0").check(FORM).schemes == {"binary_g32", "gguf_q8_0"}
    assert Quantization("8da8w", "int4", {"*.w2": "gguf_q8_0"}, "hqq").check(SPARSE).zeros == "unstructured"
    assert Quantization("ternary_g32", method="round").check(SPARSE).zeros == "unstructured"
    assert Quantization("int4_g64", overrides={"*.w2": "int4_g32"}).check(FORM).schemes == {"int4_g64", "int4_g32"}
    assert ToDense().check(QUANTIZED) == FORM


@pytest.mark.parametrize(
    "step", [LowRank(ratio=0.5), WidthPruning(embed_dim=32), Sparsification(), TensorDecomposition()], ids=str
)
def test_what_comes_too_late(step: Any) -> None:
    step.check(FORM)
    with pytest.raises(ConfigError, match=r"of weights in gguf_q4_0, .* Put this step first: quantize last"):
        step.check(QUANTIZED)


@pytest.mark.parametrize(
    "scheme", ["gguf_q4_0", "int2_g16", "ternary_g32", "binary_g32", "8da4w_g32", "8da8w", "float8"]
)
def test_torchao_computes_with_the_same_codes(scheme: str, source: Path, tmp_path: Path) -> None:
    apply(Quantization(scheme, embeddings="gguf_q8_0", method="round"), source, tmp_path / "codes")
    ours, theirs = load_sections(tmp_path / "codes"), load_sections(tmp_path / "codes")
    converted = to_torchao(theirs, tmp_path / "codes")
    assert len([name for name in converted if name.startswith("layers.")]) == (0 if scheme == "float8" else 2 * 7)
    for name in converted:
        assert isinstance(theirs.get_parameter(name), IntxUnpackedToInt8Tensor)
        assert torch.equal(theirs.get_parameter(name).dequantize(), ours.get_parameter(name))
    torch.testing.assert_close(logits(theirs), logits(ours), atol=1e-4, rtol=1e-4)
    torch.save(theirs.state_dict(), tmp_path / "torchao.pt")
    again = load_sections(tmp_path / "codes")
    to_torchao(again, tmp_path / "codes")
    again.load_state_dict(torch.load(tmp_path / "torchao.pt", weights_only=True), assign=True)
    assert torch.equal(logits(again), logits(theirs))
