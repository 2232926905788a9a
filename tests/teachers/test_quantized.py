"""A teacher in fewer bits, or in host memory: the weights that it should have, in the memory that it should take."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Family
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torchao.dtypes import nf4tensor
from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
from torchao.quantization import quantize_

from kd_recipes import _torchtune
from kd_recipes.compression import Quantization, read_checkpoint, sections
from kd_recipes.compression.keeping import Keeping
from kd_recipes.compression.weight_only import linear_layers, packed_bytes, parse_format
from kd_recipes.errors import ConfigError
from kd_recipes.models import model_section
from kd_recipes.parts import build_model, load_model
from kd_recipes.teachers.loading import load_frozen
from kd_recipes.teachers.offload import Offload
from kd_recipes.training.faults import num_bytes
from toy import VOCABULARY, Toys, calibration, hf_config, lora_section

CPU = torch.device("cpu")
IDS_BS = torch.arange(24).view(2, 12) * 13 % VOCABULARY
# of the weights, relative; of Gaussian ones
ERRORS = {
    "int8": 0.01,
    "int8_g64": 0.01,
    "int5_g32": 0.05,
    "int4": 0.11,
    "int4_g32": 0.1,
    "nf4": 0.12,
    "float8": 0.03,
    "nvfp4": 0.13,
    "int2_g32": 0.45,
}
BITS = {"int4": 4.6, "int4_g32": 6.1, "nf4": 4.3, "nvfp4": 4.7}  # of a weight; of the others a byte and a scale


def keeping(quantization: Any, *, cpu_offload: bool = False) -> Keeping:
    settings = {"teacher_quantization": quantization, "teacher_cpu_offload": False}
    return replace(Keeping.of("teacher_model", {}, settings), cpu_offload=cpu_offload)


def load(directory: Path, quantization: Any = None, *, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    found = sections(directory)
    kept = keeping(quantization, **settings)
    return load_frozen("teacher_model", found.model, found.checkpointer, kept, dtype=dtype, device=CPU).eval()


def whole(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    found = sections(directory)
    return load_model("model", found.model, found.checkpointer, dtype=dtype, device=CPU).model.eval()


def problems(directory: Path, quantization: Any, *, is_split: bool = False, **settings: Any) -> list[str]:
    skeleton = build_model("m", sections(directory).model, dtype=torch.float32, device=torch.device("meta"))
    kept = keeping(quantization, **settings)
    return [str(p) for p in kept.problems(skeleton, dtype=torch.float32, device=CPU, is_split=is_split)]


def dense(weight: Tensor) -> Tensor:
    """What a packed weight stands for, by multiplying the identity by it."""
    identity = torch.eye(weight.shape[1], dtype=weight.dtype)
    return torch.nn.functional.linear(identity, weight).T.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ERRORS)
def test_each_format_holds_the_weights(name: str, dtype: torch.dtype, toys: Toys) -> None:
    reference, model = whole(toys.wide), load(toys.wide, name, dtype=dtype)
    assert not problems(toys.wide, name)
    assert torch.equal(model.tok_embeddings.weight, reference.tok_embeddings.weight.to(dtype))
    layers = linear_layers(reference)
    assert len(layers) == 14
    for path, layer in layers.items():
        weight = model.get_parameter(f"{path}.weight").detach()
        error = (dense(weight) - layer.weight).norm() / layer.weight.norm()
        assert error < ERRORS[name], path
        bits = num_bytes([weight]) * 8 / layer.weight.numel()
        assert bits < BITS.get(name, 9.6), path
    with torch.no_grad():
        logits = model(IDS_BS)
    assert logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_is_torchaos(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(192, 256, dtype=dtype)
    expected, found = nf4tensor.to_nf4(weight), _torchtune.to_nf4(weight)
    same = expected.quantized_data == found.quantized_data
    assert same.float().mean() > (0.9999 if dtype is torch.float32 else 0.9)  # bf16: ties by torchao's rounding
    for name in ("quantized_scalers", "quantization_factor", "scaler_mean", "nf4"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    ours, theirs = (((tensor.get_original_weight() - weight).float()).norm() for tensor in (found, expected))
    assert ours < 1.001 * theirs
    weight[:, :64] = 0
    assert torch.equal(_torchtune.to_nf4(weight).get_original_weight()[:, :64], torch.zeros(192, 64, dtype=dtype))


@pytest.mark.parametrize("shape", [(272, 144), (16, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nvfp4_is_torchaos(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    found: Any = parse_format("nvfp4", "").pack(layer.weight.detach(), dtype)
    quantize_(layer, NVFP4WeightOnlyConfig())
    weight: Any = layer.weight
    names, settings = found.__tensor_flatten__()
    assert (names, settings) == weight.__tensor_flatten__()
    for name in names:
        assert torch.equal(getattr(found, name).float(), getattr(weight, name).float()), name


@pytest.mark.parametrize("name", ["int8", "int4_g32", "nf4", "float8", "nvfp4"])
def test_a_few_rows_tell_how_large_a_weight_becomes(name: str) -> None:
    form = parse_format(name, "")
    packed = form.pack(torch.randn(512, 1024), torch.float32)
    assert packed_bytes(form, (512, 1024), torch.float32) == pytest.approx(num_bytes([packed]), rel=0.001)


@pytest.mark.parametrize("name", [None, "int8", "int4_g32", "nf4", "float8", "nvfp4"])
def test_blocks_from_host_memory_compute_the_same(name: str | None, toys: Toys) -> None:
    resident, offloaded = load(toys.wide, name), load(toys.wide, name, cpu_offload=True)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(offloaded(IDS_BS), resident(IDS_BS))


def test_two_blocks_at_a_time_are_there(toys: Toys) -> None:
    model = load(toys.teacher)
    expected = model(IDS_BS)
    block_bytes = num_bytes(model.layers[0].parameters())
    assert len(model.layers) == 3  # odd: the last one and the first share a buffer
    Offload(model, CPU)
    memory = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in model.layers.parameters()}
    assert len(memory) == 2
    assert sum(memory.values()) < 2.1 * block_bytes
    with torch.no_grad():
        assert torch.equal(model(IDS_BS), expected)
        model.layers[1].register_forward_pre_hook(_fail)
        with pytest.raises(KeyboardInterrupt):
            model(IDS_BS)
        model.layers[1]._forward_pre_hooks.popitem()
        assert torch.equal(model(IDS_BS), expected)  # whatever a pass that was cut off has left


def _fail(*_: Any) -> None:
    raise KeyboardInterrupt


def test_loads_what_a_checkpointer_loads(families: dict[str, Family], toys: Toys, tmp_path: Path) -> None:
    Quantization("gguf_q8_0").apply(read_checkpoint(toys.student), tmp_path / "q8_0", calibration([(IDS_BS, None)]))
    for directory in (families["qwen"].teacher, families["llama3_2"].student, toys.teacher, tmp_path / "q8_0"):
        expected, found = whole(directory).state_dict(), load(directory).state_dict()
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
    several = families["llama3_2"].teacher  # in four files, its head not tied
    assert torch.equal(load(several)(IDS_BS), whole(several)(IDS_BS))
    assert torch.equal(load(several, "int8").output.weight, whole(several).output.weight)


def test_torchtunes_own_nf4_builders(toys: Toys) -> None:
    section = lora_section(toys.wide, quantize_base=True)
    section = DictConfig({**section, "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"]})
    checkpointer = sections(toys.wide).checkpointer
    settings: dict[str, Any] = {"dtype": torch.float32, "device": CPU}
    model = load_frozen("teacher_model", section, checkpointer, keeping(None), **settings).eval()
    assert any(_torchtune.is_nf4(parameter) for parameter in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model(IDS_BS), load(toys.wide, "nf4")(IDS_BS))
    skeleton = build_model("m", section, dtype=torch.float32, device=torch.device("meta"))
    assert not keeping(None).is_plain(skeleton)
    twice = [*keeping("int8").problems(skeleton, **settings, is_split=False)]
    assert "NF4 as it is" in str(twice[0])


def test_a_configuration_of_torchaos(toys: Toys) -> None:
    section = {
        "_component_": "torchao.quantization.IntxWeightOnlyConfig",
        "weight_dtype": "torch.int4",
        "granularity": {"_component_": "torchao.quantization.granularity.PerGroup", "group_size": 32},
        "mapping_type": "torchao.quantization.quant_primitives.MappingType.SYMMETRIC",
    }
    for form in (section, OmegaConf.create(section)):
        weight = load(toys.wide, form, dtype=torch.bfloat16).layers[0].mlp.w1.weight
        assert type(weight).__name__ == "IntxUnpackedToInt8Tensor"
        assert num_bytes([weight]) < 1.2 * weight.numel()
        expected = whole(toys.wide).layers[0].mlp.w1.weight
        assert (dense(weight.detach()) - expected).norm() / expected.norm() < 0.1
    int8 = {"_component_": "torchao.quantization.Int8WeightOnlyConfig", "version": 2}
    weight = load(toys.wide, int8, dtype=torch.bfloat16).layers[0].mlp.w1.weight
    assert num_bytes([weight]) < 1.1 * weight.numel()


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ("int9", "wanted int8, int4"),
        ("int4_g48", "wanted int8, int4"),
        ({"_component_": "torchao.quantization.IntxWeightOnlyConfig", "wieght_dtype": "torch.int4"}, "wieght_dtype"),
        ({"_component_": "torchao.quantization.Int8DynamicActivationInt8WeightConfig"}, "a weight-only configuration"),
        ({"_component_": "torch.nn.Linear", "in_features": 2, "out_features": 2}, "one configuration for all layers"),
    ],
)
def test_formats_that_there_are_not(quantization: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        keeping(quantization)


def test_what_does_not_suit_a_model(toys: Toys) -> None:
    assert "the 96, 144 inputs of its layers. These do: 16" in problems(toys.teacher, "int8_g64")[0]
    assert "These do" not in problems(toys.teacher, "int4")[0]
    assert "int8 works everywhere" in problems(toys.teacher, "nf4")[0]
    per_group = {"_component_": "torchao.quantization.granularity.PerGroup", "group_size": 64}
    section = {"_component_": "torchao.quantization.IntxWeightOnlyConfig", "granularity": per_group}
    assert "layers of 48 x 96" in problems(toys.teacher, section)[0]
    assert "shard_teacher: got True" in problems(toys.teacher, "int8", is_split=True)[0]
    assert "shard_teacher: got True" in problems(toys.teacher, None, is_split=True, cpu_offload=True)[0]
    assert "cpu_offload: got True, wanted False on cpu" in problems(toys.teacher, None, cpu_offload=True)[0]
    assert problems(toys.teacher, None, is_split=True) == []


def test_says_what_does_not_fit(toys: Toys) -> None:
    small = {**model_section(hf_config(toys.teacher)), "num_layers": 2}
    with pytest.raises(ConfigError, match="in the file and not in the model"):
        load_frozen(
            "teacher_model",
            DictConfig(small),
            sections(toys.teacher).checkpointer,
            keeping("int8"),
            dtype=torch.float32,
            device=CPU,
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "int4", "nvfp4"])
def test_peak_memory_of_loading(name: str, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "quantized_teacher.py"
    command = [sys.executable, str(script), "--measure", name]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["peak"] <= 1.3 * found["size"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", [None, "int8", "int4_g32", "nf4", "float8"])
def test_blocks_from_host_memory_on_a_gpu(name: str | None, toys: Toys) -> None:
    device, ids_BS, found = torch.device("cuda"), IDS_BS.cuda(), sections(toys.wide)
    settings: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    parts = ("teacher_model", found.model, found.checkpointer)
    resident = load_frozen(*parts, keeping(name), **settings).eval()
    offloaded = load_frozen(*parts, keeping(name, cpu_offload=True), **settings).eval()
    assert all(parameter.device.type == device.type for parameter in offloaded.parameters())
    with torch.no_grad():
        expected = resident(ids_BS)
        for _ in range(50):  # a copy that came too late or too early would show now and then
            assert torch.equal(offloaded(ids_BS), expected)
