"""Drop the blocks, neurons, heads or channels of a model that matter least.

Measures on calibration text what each of them adds, drops those that add least, and writes what remains to
``output_dir``: a dense, smaller checkpoint that transformers and torchtune load as it is, and the ``model:`` section
(model.yaml) with which to distil it. Expect it to be poor before that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torchtune.modules import TransformerDecoder
from tqdm import tqdm

from kd_recipes import _torchtune
from kd_recipes.batch import IGNORE_INDEX
from kd_recipes.compression import (
    DepthPruning,
    HFCheckpoint,
    WidthPruning,
    block_influence,
    choose_blocks,
    choose_width,
    collect_moments,
    prune_depth_checkpoint,
    prune_width_checkpoint,
    read_checkpoint,
)
from kd_recipes.config import Key, is_positive
from kd_recipes.errors import ConfigError, Problem, gather
from kd_recipes.parts import build, build_model, find_device, load_model
from kd_recipes.storage import require_vacant
from kd_recipes.training.data import build_dataset
from kd_recipes.training.precision import is_dtype_name, resolve_dtype
from kd_recipes.training.preflight import check_tokenizer

_BAR_WIDTH = 24


KEYS = (
    Key("recipe", "str", wanted="`compress`"),
    Key("output_dir", "path", required=True, wanted="a new or empty directory for the smaller checkpoint"),
    Key("model", "component", required=True, wanted="the model to make smaller"),
    Key("checkpointer", "component", required=True, kwargs=("output_dir",), wanted="where its weights are"),
    Key("tokenizer", "component", required=True),
    Key("dataset", "components", required=True, args=1, wanted="calibration text"),
    Key(
        "method",
        "component",
        required=True,
        wanted="kd_recipes.compression.DepthPruning or WidthPruning",
    ),
    Key("num_calibration_tokens", "int", default=8192, wanted="a whole number above 0", check=is_positive),
    Key(
        "sequence_length", "int", default=512, wanted="longest calibration window in tokens, above 0", check=is_positive
    ),
    Key("seed", "int", default=0, wanted="a whole number; which samples the calibration text is made of"),
    Key("device", "str", default="cuda", wanted="cpu, cuda or cuda:1"),
    Key("dtype", "choice", default="auto", wanted="auto, bf16 or fp32", check=is_dtype_name),
)


def main(cfg: DictConfig) -> None:
    """Prune the model that ``cfg`` describes into ``cfg.output_dir``, and print what was done.

    Raises:
        ConfigError: what is wrong with the config and the files that it names; nothing has been written then.
    """
    source, method, device, tokenizer = _preflight(cfg)
    windows = _calibration_windows(cfg, tokenizer)
    model = _load_model(cfg, tokenizer, device)
    batches = ((tokens.to(device), valid.to(device)) for tokens, valid in tqdm(windows, "calibrate", unit="window"))
    num_tokens = sum(int(valid.sum()) for _, valid in windows)
    prune = _prune_depth if isinstance(method, DepthPruning) else _prune_width
    pruned = prune(source, Path(cfg.output_dir), model, batches, method, {"num_calibration_tokens": num_tokens})
    print(_summary(source, pruned))


def _prune_depth(
    source: HFCheckpoint,
    output_dir: Path,
    model: TransformerDecoder,
    batches: Iterator[tuple[Tensor, Tensor]],
    method: Any,
    record: dict[str, Any],
) -> HFCheckpoint:
    influence = block_influence(model, batches).tolist()
    keep = choose_blocks(influence, method.num_keep(source.num_layers), protected=method.protected)
    print(report(influence, keep))
    record = {"block_influence": [round(value, 6) for value in influence], **record}
    return prune_depth_checkpoint(source.directory, output_dir, keep, record=record)


def _prune_width(
    source: HFCheckpoint,
    output_dir: Path,
    model: TransformerDecoder,
    batches: Iterator[tuple[Tensor, Tensor]],
    method: Any,
    record: dict[str, Any],
) -> HFCheckpoint:
    kept = choose_width(model, collect_moments(model, batches), method)
    lists = {"kept_neurons": kept.neurons_LK, "kept_kv_heads": kept.groups_LK}
    record = {"source": str(source.directory), "method": asdict(method), **record}
    record |= {name: [indices.tolist() for indices in kept_L] for name, kept_L in lists.items()}
    record["kept_channels"] = kept.channels_K.tolist()
    return prune_width_checkpoint(source, output_dir, kept, record=record)


def _preflight(cfg: DictConfig) -> tuple[HFCheckpoint, DepthPruning | WidthPruning, torch.device, Any]:
    """What can be wrong before text and weights are loaded, all of it together."""
    source, method, device, tokenizer, _ = gather(
        lambda: read_checkpoint(Path(cfg.checkpointer.checkpoint_dir)),
        lambda: _method(cfg.method),
        lambda: find_device("device", cfg.device),
        lambda: build("tokenizer", cfg.tokenizer),
        lambda: require_vacant(Path(cfg.output_dir)),
    )
    if isinstance(method, DepthPruning):
        method.num_keep(source.num_layers)
    else:
        heads = source.config["num_attention_heads"]
        num_kv_heads = source.config.get("num_key_value_heads") or heads
        method.sizes(source.config["intermediate_size"], num_kv_heads, source.config["hidden_size"])
    return source, method, device, tokenizer


def _method(section: DictConfig) -> DepthPruning | WidthPruning:
    method = build("method", section)
    if not isinstance(method, (DepthPruning, WidthPruning)):
        wanted = "kd_recipes.compression.DepthPruning or WidthPruning"
        raise ConfigError(Problem("method._component_", section._component_, wanted))
    return method


def _calibration_windows(cfg: DictConfig, tokenizer: Any) -> list[tuple[Tensor, Tensor]]:
    dataset, _ = build_dataset(cfg.dataset, tokenizer, "dataset")
    windows = calibration_windows(
        dataset, num_tokens=cfg.num_calibration_tokens, sequence_length=cfg.sequence_length, seed=cfg.seed
    )
    num_tokens = sum(tokens.numel() for tokens, _ in windows)
    if num_tokens < cfg.num_calibration_tokens:
        print(f"The data set has only {num_tokens} of num_calibration_tokens={cfg.num_calibration_tokens}.")
    return windows


def calibration_windows(
    dataset: Any, *, num_tokens: int, sequence_length: int, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Samples in random order, each cut into windows; never two in one, since no text has such a seam.

    Args:
        dataset: torchtune's: ``dataset[i]`` has ``tokens`` and, beside them, ``labels``.
        num_tokens: how many to take; fewer where the data set ends before.
        sequence_length: the longest window, in tokens.
        seed: of the order.

    Returns:
        For each window its ids and which of them are not masked, both ``[1, S]``.
    """
    windows: list[tuple[Tensor, Tensor]] = []
    missing = num_tokens
    for index in torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist():
        sample = dataset[index]
        tokens_1S, labels_1S = (torch.as_tensor(sample[name])[None, :missing] for name in ("tokens", "labels"))
        valid_1S = labels_1S != IGNORE_INDEX
        windows += zip(tokens_1S.split(sequence_length, dim=1), valid_1S.split(sequence_length, dim=1), strict=True)
        missing -= tokens_1S.numel()
        if missing == 0:
            break
    return windows


def _load_model(cfg: DictConfig, tokenizer: Any, device: torch.device) -> TransformerDecoder:
    size = _torchtune.model_size(build_model("model", cfg.model, dtype=torch.bfloat16, device=torch.device("meta")))
    check_tokenizer(tokenizer, size.num_rows, size.max_seq_len)
    if cfg.sequence_length > size.max_seq_len:
        wanted = f"at most {size.max_seq_len}, the model's max_seq_len"
        raise ConfigError(Problem("sequence_length", cfg.sequence_length, wanted))
    dtype = resolve_dtype(cfg.dtype, device)
    return load_model("model", cfg.model, cfg.checkpointer, dtype=dtype, device=device).model.eval()


def report(influence: Sequence[float], keep: Sequence[int]) -> str:
    """A table of the blocks: index, influence as a number and a bar, kept or dropped.

    A full bar is three times the median: the first and the last block tower over the rest, whose differences decide.
    """
    full = 3 * median(influence) or 1.0
    lines = ["block  influence"]
    for index, value in enumerate(influence):
        length = round(_BAR_WIDTH * value / full)
        bar = "#" * min(length, _BAR_WIDTH) + (">" if length > _BAR_WIDTH else "")
        lines.append(f"{index:5}  {value:9.4f}  {bar:{_BAR_WIDTH + 1}}  {'kept' if index in keep else 'dropped'}")
    return "\n".join(lines)


def _summary(source: HFCheckpoint, pruned: HFCheckpoint) -> str:
    before, after = (sum(math.prod(spec.shape) for spec in checkpoint.specs) for checkpoint in (source, pruned))
    sizes = {"Blocks": "num_hidden_layers", "Channels": "hidden_size", "Neurons": "intermediate_size"}
    sizes |= {"Heads": "num_attention_heads", "KV heads": "num_key_value_heads"}
    changes = {
        label: (source.config[name], pruned.config[name])
        for label, name in sizes.items()
        if source.config.get(name) != pruned.config.get(name)
    }
    text = "\n" + "".join(f"{label + ':':11} {old} -> {new}\n" for label, (old, new) in changes.items())
    text += (
        f"Parameters: {before:,} -> {after:,} ({after / before:.0%})\n"
        f"Wrote {pruned.directory}, which transformers loads as it is. "
    )
    section = pruned.directory / "model.yaml"
    if not section.is_file():
        return f"{text}torchtune has no builder for it, so no recipe can train it."
    return f"{text}To use it in a recipe (also in model.yaml):\n\n{OmegaConf.to_yaml(OmegaConf.load(section))}"


if __name__ == "__main__":
    from kd_recipes.entry import run_recipe

    raise SystemExit(run_recipe("compress"))
