"""What is written as GGUF is what was there: weights and tokenizers come back, and lattices bit for bit."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, trainers

from kd_recipes._torchtune.names import to_hf
from kd_recipes.compression import LowRank, Quantization, read_checkpoint
from kd_recipes.compression.convert import quantized_weights
from kd_recipes.errors import ConfigError, RunError
from kd_recipes.exporting.formats import FORMATS
from kd_recipes.exporting.gguf import refuse, verify_gguf, write_gguf
from kd_recipes.exporting.gguf_tokenizer import tokenizer_metadata
from kd_recipes.gguf_format.blocks import dequantize_q1_0, lay_out
from kd_recipes.gguf_format.names import gguf_name
from kd_recipes.gguf_format.splitting import byte_level_tokenizer
from kd_recipes.importing.gguf import import_gguf
from kd_recipes.lattices import Scheme, quantize
from toy import SPECIAL_TOKENS, calibration, save_model, save_tokenizer

SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SIZES: dict[str, dict[str, Any]] = {
    "llama": {},
    "untied": {"tie_word_embeddings": False},
    "qwen2": {},
    "llama3": {"rope_scaling": SCALING, "max_position_embeddings": 16_384},
}
TEXT = calibration([(torch.arange(3, 67)[None], None)])


def checkpoint(directory: Path, kind: str = "llama", **settings: Any) -> Path:
    save_model(directory, "qwen2" if kind == "qwen2" else "llama", **deepcopy({**SIZES[kind], **settings}))
    save_tokenizer(directory)
    return directory


@pytest.mark.parametrize("kind", SIZES)
def test_a_model_comes_back(tmp_path: Path, kind: str) -> None:
    source = checkpoint(tmp_path / "source", kind)
    write_gguf(read_checkpoint(source), tmp_path / "model.gguf")
    written = import_gguf(tmp_path / "model.gguf", tmp_path / "back", dtype=torch.float32)
    weights, back = (load_file(directory / "model.safetensors") for directory in (source, tmp_path / "back"))
    assert weights.keys() == back.keys()
    assert all(torch.equal(weights[name], back[name]) for name in weights)
    if kind == "llama3":
        assert written["rope_scaling"] == SCALING
    texts = ["the cat sat on the mat 12345", "<|im_start|>user\nhello<|im_end|>", "naïve café"]
    before, after = (Tokenizer.from_file(str(d / "tokenizer.json")) for d in (source, tmp_path / "back"))
    assert [before.encode(text).ids for text in texts] == [after.encode(text).ids for text in texts]
    template = json.loads((source / "tokenizer_config.json").read_text())["chat_template"]
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == template
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(("kind", "type_"), [("f16", "F16"), ("bf16", "BF16"), ("q8_0", "Q8_0"), ("q4_0", "Q4_0")])
def test_matrices_are_rounded_as_the_gguf_package_rounds(tmp_path: Path, kind: str, type_: str) -> None:
    source = checkpoint(tmp_path / "source")
    write_gguf(read_checkpoint(source), tmp_path / "model.gguf", kind)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    up = load_file(source / "model.safetensors")["model.layers.1.mlp.up_proj.weight"].numpy()
    stored = found["blk.1.ffn_up.weight"]
    assert stored.tensor_type.name == type_
    wanted = gguf.dequantize(gguf.quantize(up, stored.tensor_type), stored.tensor_type)
    assert np.array_equal(gguf.dequantize(stored.data, stored.tensor_type), wanted)
    assert found["blk.1.ffn_norm.weight"].tensor_type.name == "F32"
    assert found["token_embd.weight"].tensor_type.name == {"Q4_0": "Q8_0"}.get(type_, type_)


@pytest.mark.parametrize("scheme", ["gguf_q8_0", "gguf_q4_0", "ternary_g256", "binary_g128"])
def test_what_was_trained_is_what_is_in_the_file(tmp_path: Path, scheme: str) -> None:
    source = checkpoint(tmp_path / "source", hidden_size=256, intermediate_size=256)
    step = Quantization(scheme, "gguf_q8_0", method="round")
    coded = step.apply(read_checkpoint(source), tmp_path / "coded", TEXT)
    write_gguf(coded, tmp_path / "model.gguf")
    assert verify_gguf(coded, tmp_path / "model.gguf") == 2 * 7 + 1
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert types["token_embd.weight"] == "Q8_0"
    assert (
        types["blk.0.attn_q.weight"]
        == {
            "gguf_q8_0": "Q8_0",
            "gguf_q4_0": "Q4_0",
            "ternary_g256": "TQ2_0",
            "binary_g128": "Q1_0",
        }[scheme]
    )
    file = bytearray((tmp_path / "model.gguf").read_bytes())
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    stored = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_down.weight")
    file[stored.data_offset + 40] ^= 0x11
    (tmp_path / "damaged.gguf").write_bytes(file)
    with pytest.raises(RunError, match=r"blk\.1\.ffn_down\.weight is not what was trained"):
        verify_gguf(coded, tmp_path / "damaged.gguf")


def test_a_file_that_is_not_what_was_trained_is_never_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint(tmp_path / "source")
    coded = Quantization("gguf_q8_0", None, method="round").apply(read_checkpoint(source), tmp_path / "coded", TEXT)
    monkeypatch.setattr("kd_recipes.exporting.gguf.lay_out", lambda quantized: lay_out(quantized) ^ 1)
    (tmp_path / "out").mkdir()
    with pytest.raises(RunError, match="is not what was trained"):
        write_gguf(coded, tmp_path / "out" / "model.gguf")
    assert not [*(tmp_path / "out").iterdir()]


def test_binary_blocks_are_read_as_they_are_written() -> None:
    quantized = quantize(torch.randn(4, 256, generator=torch.Generator().manual_seed(0)), Scheme.parse("binary_g128"))
    assert np.array_equal(dequantize_q1_0(lay_out(quantized)), quantized.dequantize().numpy())


def test_codes_become_numbers_where_that_is_asked_for(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source")
    coded = Quantization("int2_g32", None, method="round").apply(read_checkpoint(source), tmp_path / "coded", TEXT)
    write_gguf(coded, tmp_path / "model.gguf", "f32")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    quantized = dict(quantized_weights(coded))["layers.0.attn.q_proj.weight"]
    assert np.array_equal(found["blk.0.attn_q.weight"].data, quantized.dequantize().numpy())


def test_what_gguf_has_not_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = read_checkpoint(checkpoint(tmp_path / "source"))
    coded = Quantization("int2_g32", None, method="round").apply(source, tmp_path / "coded", TEXT)
    with pytest.raises(ConfigError, match=r"int2_g32', wanted a lattice that GGUF has: gguf_q8_0.* gguf_f32"):
        write_gguf(coded, tmp_path / "model.gguf")
    eight = Quantization("gguf_q8_0", None, method="round").apply(source, tmp_path / "eight", TEXT)
    with pytest.raises(ConfigError, match=r"wanted no second rounding. gguf_trained holds the codes themselves"):
        write_gguf(eight, tmp_path / "model.gguf", "q4_0")
    factored = LowRank(ratio=0.5, whiten=False).apply(source, tmp_path / "factored", TEXT)
    with pytest.raises(ConfigError, match=r"products of factors.*Multiply its factors first"):
        write_gguf(factored, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize(
    ("scheme", "embeddings", "refused", "taken", "keeps"),
    [
        ("int4_g64", None, ("q4_0", "q4_k_m", "q2_k"), ("f32", "f16", "bf16", "q8_0"), "gguf_f16"),
        ("8da4w_g32", "8da8w", ("q8_0", "q4_0", "q6_k"), ("f32", "f16"), "executorch_8da4w"),
        ("int8_g64", None, ("q8_0", "q4_0", "q6_k"), ("f32", "f16"), "gguf_f16"),
        ("ternary", None, ("q4_0", "q4_k_m"), ("f32", "q8_0"), "gguf_f16"),
        ("gguf_q8_0", None, ("q4_0", "q6_k", "iq4_nl"), ("trained", "q8_0", "bf16"), "gguf_trained"),
        ("gguf_q4_0", "gguf_q8_0", ("q4_k_m",), ("trained", "q4_0", "q8_0", "f16"), "gguf_trained"),
    ],
)
def test_what_was_trained_is_not_rounded_again(
    tmp_path: Path,
    scheme: str,
    embeddings: str | None,
    refused: tuple[str, ...],
    taken: tuple[str, ...],
    keeps: str,
) -> None:
    source = read_checkpoint(checkpoint(tmp_path / "source", intermediate_size=128))
    coded = Quantization(scheme, embeddings, method="round").apply(source, tmp_path / "coded", TEXT)
    for kind in refused:
        with pytest.raises(ConfigError, match=rf"gguf_{kind} of weights in .*, wanted no second rounding. {keeps}"):
            refuse(coded, kind)
    for kind in taken:
        refuse(coded, kind)
    if "q8_0" in taken:  # where it is another lattice: each weight is nearest to its trained point
        write_gguf(coded, tmp_path / "model.gguf", "q8_0")
        stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
        for key, quantized in quantized_weights(coded):
            tensor = stored[str(gguf_name(to_hf(key)))]
            read = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
            steps_OG = quantized.scales.float().repeat_interleave(read.shape[1] // quantized.scales.shape[1], 1)
            assert ((read - quantized.dequantize()).abs() <= 0.3 * steps_OG.abs()).all()


@pytest.mark.parametrize(
    ("family", "name"), [("gpt2", "gpt-2"), ("smollm", "smollm"), ("qwen2", "qwen2"), ("llama3", "llama-bpe")]
)
def test_the_way_text_is_split_is_found_by_splitting(tmp_path: Path, family: str, name: str) -> None:
    save_tokenizer(tmp_path)  # for its settings
    trained = byte_level_tokenizer({}, [], family)
    trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=SPECIAL_TOKENS[:1], show_progress=False)
    words = ["in 2024 we'll  read 1234567", "It's 3.14159\n\n\n  and  WE'LL", " def f(x):\n    return [x]\n\n"]
    trained.train_from_iterator(words * 40, trainer)
    trained.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer_metadata(tmp_path, 1300)["tokenizer.ggml.pre"] == name


def test_where_text_ends_is_what_generation_stops_at(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source")
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    config = json.loads((source / "tokenizer_config.json").read_text())
    templates = [{"name": name, "template": f"{{# {name} #}}"} for name in ("tool_use", "default")]
    (source / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": templates}))
    metadata = tokenizer_metadata(source, 330)
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "padding")}
    assert ids == {"bos": None, "eos": 0, "eot": 2, "padding": 0}
    assert metadata["tokenizer.chat_template"] == "{# default #}"
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert metadata["tokenizer.ggml.tokens"][325] == "[PAD325]"


def test_another_way_to_split_text_is_refused(tmp_path: Path) -> None:
    from tokenizers import pre_tokenizers

    source = checkpoint(tmp_path / "source")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    steps: list[Any] = [pre_tokenizers.Split("a", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.save(str(source / "tokenizer.json"))
    with pytest.raises(ConfigError, match="another way to split text"):
        write_gguf(read_checkpoint(source), tmp_path / "model.gguf")
    problems = FORMATS["gguf_f16"].problems(
        read_checkpoint(source)
    )  # before anything is written; or packages are missing
    assert "another way to split text" in [problem.got for problem in problems]
