"""A GGUF file written with the `gguf` package comes back: weights, logits, config; what we cannot read is refused.

Rows of q and k are permuted here with llama.cpp's own line (convert_hf_to_gguf.py), not with the code under test.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from torchtune import config as tune_config
from torchtune.training import FullModelHFCheckpointer

from kd_recipes import config, import_gguf, models, storage
from kd_recipes.compression import Sparsification, form_of, read_checkpoint
from kd_recipes.compression.form import zero_pattern
from kd_recipes.errors import ConfigError
from kd_recipes.importing import gguf as importing
from kd_recipes.importing.gguf_config import llama3_rope_scaling, tensor_shapes
from toy import calibration

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 264,
}
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
Edit = Callable[[gguf.GGUFWriter], None]


def llama_cpp_permute(weights: np.ndarray, num_heads: int) -> np.ndarray:
    return (
        weights.reshape(num_heads, 2, weights.shape[0] // num_heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def add_vocabulary(writer: gguf.GGUFWriter, pre: str = "smollm") -> None:
    merges = ["h e", "l l", "he ll", "Ġ w"]
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in merges)]
    kinds = [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, *(f"[PAD{i}]" for i in range(len(tokens), 264))])
    writer.add_token_types([*kinds, *[5] * (264 - len(tokens))])
    writer.add_token_merges(merges)
    for add, value in ((writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2), (writer.add_pad_token_id, 0)):
        add(value)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")


def add_sizes(writer: gguf.GGUFWriter) -> None:
    writer.add_context_length(128)
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50_000.0)


def write_gguf(
    path: Path,
    arch: str = "llama",
    *,
    is_tied: bool = True,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    edit: Edit = lambda writer: None,
    skip: str = "",
) -> dict[str, torch.Tensor]:
    """Write a random model; returns its weights as the file holds them, by Hugging Face name and in its order."""
    writer = gguf.GGUFWriter(path, arch)
    add_sizes(writer)
    add_vocabulary(writer, "qwen2" if arch == "qwen2" else "smollm")
    edit(writer)
    random = np.random.default_rng(0)
    weights = {}
    for name, shape in tensor_shapes({**SIZES, "model_type": arch, "tie_word_embeddings": is_tied}).items():
        weight = random.normal(scale=0.2, size=shape).astype(np.float32)
        # llama.cpp keeps vectors in float32 whatever the file's kind
        stored = kind if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        weights[name] = torch.from_numpy(gguf.dequantize(gguf.quantize(weight, stored), stored).astype(np.float32))
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = llama_cpp_permute(weight, 4 if "q_proj" in name else 2)
        for theirs, ours in GGUF_NAMES.items():
            name = name.replace(theirs, ours)
        if name != skip:
            writer.add_tensor(name, gguf.quantize(weight, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def load_in_torchtune(directory: Path, output_dir: Path) -> torch.nn.Module:
    hf_config = json.loads((directory / "config.json").read_text())
    sections = OmegaConf.create(import_gguf.sections(directory, hf_config))
    sections.checkpointer.output_dir = str(output_dir)
    checkpointer: FullModelHFCheckpointer = tune_config.instantiate(sections.checkpointer)
    model: torch.nn.Module = tune_config.instantiate(sections.model)
    model.load_state_dict(checkpointer.load_checkpoint()["model"])
    return model.eval()


def logits_of_weights(weights: dict[str, torch.Tensor], directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the original weights put into a fresh transformers model, past our safetensors file."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.float32).eval()
    missing = model.load_state_dict(weights, strict=False)
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    assert not missing.unexpected_keys
    with torch.no_grad():
        return model(tokens).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("arch", "is_tied", "kind"),
    [
        ("llama", True, gguf.GGMLQuantizationType.F32),
        ("llama", False, gguf.GGMLQuantizationType.Q8_0),
        ("llama", True, gguf.GGMLQuantizationType.Q4_0),
        ("qwen2", True, gguf.GGMLQuantizationType.F16),
        ("qwen2", False, gguf.GGMLQuantizationType.Q8_0),
    ],
)
def test_weights_and_logits(tmp_path: Path, arch: str, is_tied: bool, kind: gguf.GGMLQuantizationType) -> None:
    from transformers import AutoModelForCausalLM

    weights = write_gguf(tmp_path / "model.gguf", arch, is_tied=is_tied, kind=kind)
    directory = tmp_path / "model"
    importing.import_gguf(tmp_path / "model.gguf", directory, dtype=torch.float32)
    imported = load_file(directory / "model.safetensors")
    assert imported.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(imported[name], weight), name
    tokens = torch.randint(SIZES["vocab_size"], (2, 48), generator=torch.Generator().manual_seed(0))
    expected = logits_of_weights(weights, directory, tokens)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, expected)
        torch.testing.assert_close(
            load_in_torchtune(directory, tmp_path / "out")(tokens), expected, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.F16])
def test_zeros_of_a_lattice_are_none_of_a_pruned_model(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    weights = write_gguf(tmp_path / "model.gguf", kind=kind)
    importing.import_gguf(tmp_path / "model.gguf", tmp_path / "model")
    is_quantized = kind is gguf.GGMLQuantizationType.Q4_0
    assert (zero_pattern(weights["model.layers.0.mlp.up_proj.weight"]) == "unstructured") == is_quantized
    record = tmp_path / "model" / "compression.json"
    assert record.is_file() == is_quantized
    if is_quantized:
        expected = {"steps": [{"step": "import_gguf", "quantizations": ["Q4_0"]}]}
        assert json.loads(record.read_text()) == expected
    source = read_checkpoint(tmp_path / "model")
    assert form_of(source).zeros == "none"
    # those that a step puts there count all the same
    sparse = Sparsification(importance="magnitude").apply(source, tmp_path / "sparse", calibration([]))
    assert form_of(sparse).zeros == "unstructured"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = write_gguf(tmp_path / "model.gguf")
    written = importing.import_gguf(tmp_path / "model.gguf", tmp_path / "model", dtype=dtype)
    assert written["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert all(
        torch.equal(t, weights[name].to(dtype))
        for name, t in load_file(tmp_path / "model" / "model.safetensors").items()
    )


def test_config_and_generation_config(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", edit=lambda writer: writer.add_eot_token_id(0))
    written = importing.import_gguf(tmp_path / "model.gguf", tmp_path / "model")
    assert written == json.loads((tmp_path / "model" / "config.json").read_text())
    expected = {**SIZES, "rms_norm_eps": 1e-5, "rope_theta": 50_000.0, "tie_word_embeddings": True}
    expected |= {"max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert {name: written[name] for name in expected} == expected
    generation = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 0}


def rope_divisors(factor: float, theta: float, head_dim: int) -> np.ndarray:
    """llama.cpp's loop over frequencies (convert_hf_to_gguf.py, generate_extra_tensors)."""
    divisors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (index / head_dim)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192 / 1:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, dtype=np.float32)


def test_llama3_rope_is_recognized(tmp_path: Path) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", rope_divisors(32.0, 50_000.0, 16))

    write_gguf(tmp_path / "model.gguf", edit=edit)
    written = importing.import_gguf(tmp_path / "model.gguf", tmp_path / "model")
    assert written["rope_scaling"]["factor"] == 32.0
    assert models.model_section(written)["scale_factor"] == 32
    config_64 = {"rope_theta": 500_000.0, "head_dim": 64}
    assert llama3_rope_scaling(np.ones(32, dtype=np.float32), config_64) is None
    scaling = llama3_rope_scaling(rope_divisors(8.0, 500_000.0, 64), config_64) or {}
    assert (scaling["rope_type"], scaling["factor"]) == ("llama3", 8.0)
    with pytest.raises(ConfigError, match="rope_freqs"):
        llama3_rope_scaling(np.linspace(1, 8, 32, dtype=np.float32), config_64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "gemma"}, "general.architecture: got 'gemma', wanted one of llama, qwen2"),
        ({"edit": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN)}, "rope.scaling.type"),
        ({"edit": lambda w: w.add_expert_count(8)}, "expert_count"),
        ({"edit": lambda w: w.add_key_length(32)}, "wanted no misshapen"),
        ({"edit": lambda w: w.add_tensor("blk.0.attn_sinks", np.ones(4, dtype=np.float32))}, "attn_sinks"),
        ({"skip": "blk.1.attn_q.weight"}, "q_proj.weight', wanted no missing"),
        ({"skip": "token_embd.weight"}, "token_embd"),
    ],
)
def test_models_we_do_not_translate_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    write_gguf(tmp_path / "model.gguf", **options)
    with pytest.raises(ConfigError, match=message):
        importing.import_gguf(tmp_path / "model.gguf", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_occupied_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").touch()
    with pytest.raises(ConfigError, match="output_dir"):
        importing.import_gguf(tmp_path / "model.gguf", tmp_path / "model")


def test_full_disk_is_seen_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "model.gguf")
    usage = storage.shutil.disk_usage(tmp_path)._replace(free=1_000)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match=r"output_dir.*1,000"):
        importing.import_gguf(tmp_path / "model.gguf", tmp_path / "model")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with pytest.raises(ConfigError, match="exists"):
        importing.open_gguf(path)
    path.write_bytes(b"PK\x03\x04 not at all")
    with pytest.raises(ConfigError, match="does not begin with GGUF"):
        importing.open_gguf(path)
    write_gguf(path)
    whole = path.read_bytes()
    for size in (4, 20, 3_000, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match="whole GGUF file"):
            importing.open_gguf(path)


def test_values_that_the_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    huge = np.full(SIZES["hidden_size"], 1e6, dtype=np.float32)
    name = "output_norm.weight"
    write_gguf(tmp_path / "model.gguf", skip=name, edit=lambda writer: writer.add_tensor(name, huge))
    with pytest.raises(ConfigError, match=r"dtype: got 'torch.float16'.*model\.norm"):
        importing.import_gguf(tmp_path / "model.gguf", tmp_path / "model", dtype=torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_recipe_prints_sections_that_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_gguf(tmp_path / "model.gguf")
    overrides = [f"gguf_file={tmp_path / 'model.gguf'}", f"output_dir={tmp_path / 'model'}", "dtype=fp32"]
    cfg = config.load_and_validate("import_gguf", overrides)
    import_gguf.main(cfg)
    printed = OmegaConf.create(capsys.readouterr().out.split("recipe:\n\n")[1])
    assert set(printed) == {"model", "tokenizer", "checkpointer"}
    tune_config.instantiate(printed.model)
    assert tune_config.instantiate(printed.tokenizer).decode([3, 4]) is not None


def test_recipe_says_what_is_missing() -> None:
    with pytest.raises(ConfigError) as caught:
        config.load_and_validate("import_gguf", ["dtype=int4"])
    assert [problem.key for problem in caught.value.problems] == ["gguf_file", "output_dir", "dtype"]
