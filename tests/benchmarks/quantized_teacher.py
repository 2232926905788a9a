"""What does loading a quantized teacher take at its peak, and what does its quantization change? Two tables.

Memory: a checkpoint of random weights in bf16, 1.3 GB in five files, is written to runs/bench/quantized_teacher and
loaded in each format by a process of its own. Its largest matrix is 1% of it and its embedding 8%, as of Qwen2.5 7B.
The peak is what the process had in memory at most while it loaded (VmHWM, set to zero before: pages of mapped files
count), less what it had before, when all was imported and the format had been tried on the model's shapes; the size is
that of the model then loaded. `whole` loads as without teacher_quantization and quantizes to int8 after, as one would
by hand. Linux only.

Divergence: the quickstart's teacher (`make quickstart`), in float32, on its held-out text.

    python tests/benchmarks/quantized_teacher.py [FORMAT …]

Ten minutes on two cores.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import torch
from omegaconf import DictConfig

from kd_recipes.compression import sections
from kd_recipes.compression.keeping import Keeping
from kd_recipes.compression.weight_only import linear_layers, parse_format
from kd_recipes.config import find_config, load_and_validate
from kd_recipes.evaluation.tokens import token_values
from kd_recipes.parts import build, build_model, load_model
from kd_recipes.storage import write_json
from kd_recipes.teachers import OnlineTeacher
from kd_recipes.teachers.loading import load_frozen
from kd_recipes.tensor_files import TensorSpec, write_safetensors
from kd_recipes.training.data import Loader, build_dataset
from kd_recipes.training.faults import num_bytes
from kd_recipes.training.order import Rows

ROOT = Path("runs/bench/quantized_teacher")
CPU = torch.device("cpu")
NUM_FILES = 5
NUM_BATCHES = 2  # of 1,024 tokens
FORMATS = ("int8", "int8_g64", "float8", "int4", "int4_g64", "int4_g32", "nf4", "nvfp4", "int3_g32", "int2_g32")
LOADED = ("int8", "float8", "int4", "nf4", "nvfp4")  # the others are as large as one of these, or nearly
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 12,
    "num_key_value_heads": 3,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of the checkpoint."""
    width, ffn, heads = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["num_attention_heads"]
    kv_width = width // heads * CONFIG["num_key_value_heads"]
    yield "model.embed_tokens.weight", (CONFIG["vocab_size"], width)
    for index in range(CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        for name, size in {"q": width, "k": kv_width, "v": kv_width, "o": width}.items():
            yield f"{layer}.self_attn.{name}_proj.weight", (size, width)
        yield f"{layer}.mlp.gate_proj.weight", (ffn, width)
        yield f"{layer}.mlp.up_proj.weight", (ffn, width)
        yield f"{layer}.mlp.down_proj.weight", (width, ffn)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{name}.weight", (width,)
    yield "model.norm.weight", (width,)


def write_model(directory: Path) -> None:
    """Write the checkpoint, if it is not there."""
    if (directory / "config.json").is_file():
        return
    directory.mkdir(parents=True, exist_ok=True)
    specs = [TensorSpec(name, torch.bfloat16, shape) for name, shape in shapes()]
    limit = sum(spec.num_bytes for spec in specs) / NUM_FILES
    files: list[list[TensorSpec]] = [[]]
    for spec in specs:
        if sum(other.num_bytes for other in files[-1]) + spec.num_bytes / 2 > limit and len(files) < NUM_FILES:
            files.append([])
        files[-1].append(spec)
    torch.manual_seed(0)
    for index, part in enumerate(files):
        tensors = (torch.randn(spec.shape, dtype=torch.bfloat16).mul_(0.02) for spec in part)
        write_safetensors(directory / f"model-{index + 1:05}-of-{NUM_FILES:05}.safetensors", part, tensors)
    weight_map = {
        spec.name: f"model-{i + 1:05}-of-{NUM_FILES:05}.safetensors" for i, part in enumerate(files) for spec in part
    }
    write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(directory / "config.json", CONFIG)


def in_memory(what: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    match = re.search(rf"{what}:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) * 1024


def keeping(name: str) -> Keeping:
    """What ``teacher_quantization: name`` says; as it is for ``bf16``."""
    value = None if name == "bf16" else name
    return Keeping.of("teacher_model", {}, {"teacher_quantization": value, "teacher_cpu_offload": False})


def load_whole(found: DictConfig) -> torch.nn.Module:
    """Load all of the model, then quantize it."""
    model = load_model("teacher_model", found.model, found.checkpointer, dtype=torch.bfloat16, device=CPU).model
    pack = parse_format("int8", "").pack
    for layer in linear_layers(model).values():
        layer.weight = torch.nn.Parameter(pack(layer.weight.detach(), torch.bfloat16), requires_grad=False)
    return model


def measure(name: str) -> None:
    """In a process of its own: load, and print peak and size in bytes."""
    write_model(ROOT / "model")
    found = sections(ROOT / "model")
    kept = keeping("int8" if name == "whole" else name)
    skeleton = build_model("teacher_model", found.model, dtype=torch.bfloat16, device=torch.device("meta"))
    problems = [*kept.problems(skeleton, dtype=torch.bfloat16, device=CPU, is_split=False)]
    assert not problems, problems
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = in_memory("VmRSS")
    if name == "whole":
        model = load_whole(found)
    else:
        model = load_frozen("teacher_model", found.model, found.checkpointer, kept, dtype=torch.bfloat16, device=CPU)
    print(json.dumps({"peak": in_memory("VmHWM") - before, "size": num_bytes(model.parameters()), "before": before}))


def memory_table(names: tuple[str, ...]) -> Iterator[str]:
    """Peak and size of each format."""
    write_model(ROOT / "model")
    yield "| | size, MB | peak of loading, MB | peak over size |"
    yield "|---|---:|---:|---:|"
    for name in ("whole", "bf16", *names):
        command = [sys.executable, __file__, "--measure", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        ratio = found["peak"] / found["size"]
        yield f"| {name} | {found['size'] / 1e6:,.0f} | {found['peak'] / 1e6:,.0f} | {ratio:.2f} |"


def divergence_table(names: tuple[str, ...]) -> Iterator[str]:
    """How far each format takes the quickstart's teacher from itself."""
    cfg = load_and_validate(str(find_config("quickstart")), [], "distill")
    tokenizer = build("tokenizer", cfg.tokenizer)
    dataset, packed = build_dataset(cfg.eval_dataset, tokenizer, "eval_dataset")
    loader = Loader(
        Rows(dataset, shuffle=False, seed=0),
        packed=packed,
        batch_size=cfg.batch_size,
        padding_idx=tokenizer.pad_id,
        device=CPU,
        max_seq_len=cfg.teacher_model.max_seq_len,
    )
    batches = list(islice(loader.batches(), NUM_BATCHES))
    parts, settings = (cfg.teacher_model, cfg.teacher_checkpointer), {"dtype": torch.float32, "device": CPU}
    full = OnlineTeacher(load_frozen("teacher_model", *parts, keeping("bf16"), **settings), CPU)
    signals = [full.signal(batch) for batch in batches]
    skeleton = build_model("teacher_model", parts[0], dtype=torch.float32, device=torch.device("meta"))
    yield "| | bytes | perplexity | KL to the teacher | same likeliest id |"
    yield "|---|---:|---:|---:|---:|"
    for name in ("bf16", *names):
        if problems := [*keeping(name).problems(skeleton, **settings, is_split=False)]:
            yield f"| {name} | | {problems[0]} | | |"
            continue
        teacher = OnlineTeacher(load_frozen("teacher_model", *parts, keeping(name), **settings), CPU)
        values = [
            token_values(teacher.signal(batch), signal, batch, num_ids=full.num_rows).values
            for batch, signal in zip(batches, signals, strict=True)
        ]
        means = {key: torch.cat([part[key] for part in values]).mean().item() for key in values[0]}
        size = num_bytes(teacher.model.parameters()) / 1e6
        label = "float32" if name == "bf16" else name
        perplexity = math.exp(means["cross_entropy"])
        yield f"| {label} | {size:,.0f} MB | {perplexity:.2f} | {means['kl']:.5f} | {means['agreement']:.3f} |"


def main() -> None:
    """Print both tables, and write them beside the checkpoint."""
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2])
        return
    names, loaded = (tuple(sys.argv[1:]) or default for default in (FORMATS, LOADED))
    lines = []
    for line in chain(memory_table(loaded), [""], divergence_table(names)):
        lines.append(line)
        print(line, flush=True)
    (ROOT / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
