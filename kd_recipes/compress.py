"""Make a checkpoint smaller: prune, decompose, sparsify and quantize it, one step after another.

Each step goes by what the model does on calibration text. What is left is written to ``output_dir``, with its lineage
(compression.json) and the sections of a config with which to distil it (model.yaml). Expect it to be poor before that.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from tqdm import tqdm

from kd_recipes.batch import IGNORE_INDEX
from kd_recipes.compression import HFCheckpoint, Step, Text, cross_entropy, form_of, read_checkpoint
from kd_recipes.compression.checkpoint import RECORD, SECTIONS, add_figures, file_stamps
from kd_recipes.compression.step import check_steps
from kd_recipes.config import Key, is_positive
from kd_recipes.errors import ConfigError, Problem, gather, within
from kd_recipes.parts import build, find_device
from kd_recipes.storage import explain_disk_errors, require_free_space, require_vacant, write_json
from kd_recipes.training.data import build_dataset
from kd_recipes.training.precision import is_dtype_name, resolve_dtype
from kd_recipes.training.preflight import check_tokenizer

KEYS = (
    Key("recipe", "str", wanted="`compress`"),
    Key("output_dir", "path", required=True, wanted="a new or empty directory for the smaller checkpoint"),
    Key("checkpoint_dir", "path", required=True, wanted="the Hugging Face directory of the model to make smaller"),
    Key("compress", "components", required=True, wanted="a step of kd_recipes.compression, or a list of them"),
    Key("tokenizer", "component", required=True),
    Key("dataset", "components", required=True, args=1, wanted="calibration text"),
    Key("num_calibration_tokens", "int", default=8192, wanted="a whole number above 0", check=is_positive),
    Key(
        "num_held_out_tokens",
        "int",
        default=2048,
        wanted="of other text, for the figures before and after, above 0",
        check=is_positive,
    ),
    Key(
        "sequence_length", "int", default=512, wanted="longest calibration window in tokens, above 0", check=is_positive
    ),
    Key("seed", "int", default=0, wanted="a whole number; which samples the calibration text is made of"),
    Key("device", "str", default="cuda", wanted="cpu, cuda or cuda:1"),
    Key("dtype", "choice", default="auto", wanted="auto, bf16 or fp32", check=is_dtype_name),
)


def main(cfg: DictConfig) -> None:
    """Compress the checkpoint that ``cfg`` names into ``cfg.output_dir``, and print what was done.

    Raises:
        ConfigError: what is wrong with the config and the files that it names; nothing has been written then.
    """
    output_dir = Path(cfg.output_dir)
    source, device, tokenizer, steps, is_written = gather(
        lambda: read_checkpoint(Path(cfg.checkpoint_dir)),
        lambda: find_device("device", cfg.device),
        lambda: build("tokenizer", cfg.tokenizer),
        lambda: _build_steps(cfg),
        lambda: _is_written(cfg),
    )
    _check_model(cfg, source, tokenizer)
    left = check_steps(dict(zip(_sections(cfg), steps, strict=True)), form_of(source))
    if not is_written:
        require_free_space(output_dir, min(form.least_bytes for form in left), key="output_dir")
    windows = _windows(cfg, tokenizer)
    dtype = resolve_dtype(cfg.dtype, device)
    calibration, held_out = (Text(part, device, dtype) for part in windows)
    with explain_disk_errors(output_dir):
        before = cross_entropy(source, held_out, what="before")
        written = _apply(cfg, source, steps, calibration)
        after = cross_entropy(written, held_out, what="after")
        figures = {
            "num_calibration_tokens": calibration.num_tokens,
            "num_held_out_tokens": held_out.num_tokens,
            "perplexity_before": math.exp(before),
            "perplexity_after": math.exp(min(after, 700)),  # e^710 is none
        }
        add_figures(output_dir, figures)
        shutil.rmtree(_place(cfg))
    print(_summary(source, written, figures))


def _sections(cfg: DictConfig) -> dict[str, DictConfig]:
    """The steps' sections, by the key of each."""
    if isinstance(cfg.compress, ListConfig):
        return {f"compress[{index}]": section for index, section in enumerate(cfg.compress)}
    return {"compress": cfg.compress}


def _build_steps(cfg: DictConfig) -> list[Step]:
    def one(key: str, section: DictConfig) -> Step:
        step = within(key, partial(build, key, section))
        if not isinstance(step, Step):
            wanted = "a step of kd_recipes.compression, such as DepthPruning or Quantization"
            raise ConfigError(Problem(f"{key}._component_", section._component_, wanted))
        return step

    return gather(*(partial(one, key, section) for key, section in _sections(cfg).items()))


def _check_model(cfg: DictConfig, source: HFCheckpoint, tokenizer: Any) -> None:
    config = source.config
    max_seq_len = int(config.get("max_position_embeddings", 0))
    check_tokenizer(tokenizer, int(config["vocab_size"]), max_seq_len, model="checkpoint_dir")
    if cfg.sequence_length > max_seq_len:
        wanted = f"at most {max_seq_len}, the model's max_position_embeddings"
        raise ConfigError(Problem("sequence_length", cfg.sequence_length, wanted))


def _windows(cfg: DictConfig, tokenizer: Any) -> tuple[list[Any], list[Any]]:
    """Of the text to go by, and of other text, to judge by; they share no sample but where one is cut in two."""
    dataset, _ = build_dataset(cfg.dataset, tokenizer, "dataset")
    asked = cfg.num_calibration_tokens + cfg.num_held_out_tokens
    windows = calibration_windows(dataset, num_tokens=asked, sequence_length=cfg.sequence_length, seed=cfg.seed)
    num_tokens = sum(tokens.numel() for tokens, _ in windows)
    if num_tokens < asked:
        print(f"The data set has only {num_tokens} of the {asked} tokens asked for; all of them are shared out.")
    held_out: list[Any] = []
    wanted = num_tokens * cfg.num_held_out_tokens // asked
    while len(windows) > 1 and sum(tokens.numel() for tokens, _ in held_out) < wanted:
        held_out.append(windows.pop())
    if not held_out or not any(bool(valid[:, 1:].any()) for _, valid in held_out):
        remedy = "Take more text, or a shorter sequence_length"
        raise ConfigError(
            Problem("dataset", f"{num_tokens} tokens", "calibration text, and other text to judge by", remedy)
        )
    return windows, held_out


def calibration_windows(
    dataset: Any, *, num_tokens: int, sequence_length: int, seed: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Samples in random order, each cut into windows; never two in one, since no text has such a seam.

    Args:
        dataset: torchtune's: ``dataset[i]`` has ``tokens`` and, beside them, ``labels``.
        num_tokens: how many to take; fewer where the data set ends before.
        sequence_length: the longest window, in tokens.
        seed: of the order.

    Returns:
        For each window its ids and which of them are not masked, both ``[1, S]``.
    """
    windows: list[tuple[torch.Tensor, torch.Tensor]] = []
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


def _apply(cfg: DictConfig, source: HFCheckpoint, steps: Sequence[Step], text: Text) -> HFCheckpoint:
    """All steps in order; what one has left is kept until the next is done, so that a run cut off can go on."""
    place = _place(cfg)
    if not _is_begun(cfg):
        require_vacant(Path(cfg.output_dir))
        if place.is_dir():
            shutil.rmtree(place)
        place.mkdir(parents=True)
        write_json(place / "plan.json", _plan(cfg))
    names = [type(step).__name__ for step in steps]
    destinations = [*(place / f"{index:02d}_{name}" for index, name in enumerate(names[:-1])), Path(cfg.output_dir)]
    num_done = max((index + 1 for index, directory in enumerate(destinations) if _is_result(directory)), default=0)
    if num_done:
        tqdm.write(f"{', '.join(names[:num_done])}: done before")
        source = read_checkpoint(destinations[num_done - 1])
    left = range(num_done, len(steps))
    for index in tqdm(left, "compress", unit="step", initial=num_done, total=len(steps), disable=len(steps) == 1):
        source = steps[index].apply(source, destinations[index], text)
        if index > 0:
            shutil.rmtree(destinations[index - 1])
    return source


def _place(cfg: DictConfig) -> Path:
    """Where a run keeps its plan, and what lies between two steps, until all is done."""
    output_dir = Path(cfg.output_dir).absolute()
    return output_dir.with_name(f".{output_dir.name}.steps")


def _plan(cfg: DictConfig) -> dict[str, Any]:
    """What a run that goes on has in common with the one that was cut off: its settings, and the model's files."""
    return {"config": OmegaConf.to_container(cfg, resolve=True), "files": file_stamps(Path(cfg.checkpoint_dir))}


def _is_begun(cfg: DictConfig) -> bool:
    """Whether a run of the same plan was cut off."""
    try:
        return bool(json.loads((_place(cfg) / "plan.json").read_text(encoding="utf-8")) == _plan(cfg))
    except (OSError, ValueError):
        return False


def _is_result(directory: Path) -> bool:
    return (directory / RECORD).is_file()


def _is_written(cfg: DictConfig) -> bool:
    """Whether a run of the same plan has come so far that only the figures are missing.

    Raises:
        ConfigError: something else is in the output directory.
    """
    if _is_begun(cfg) and _is_result(Path(cfg.output_dir)):
        return True
    require_vacant(Path(cfg.output_dir))
    return False


def _summary(source: HFCheckpoint, written: HFCheckpoint, figures: dict[str, Any]) -> str:
    before, after = (sum(math.prod(spec.shape) for spec in checkpoint.specs) for checkpoint in (source, written))
    sizes = {"Blocks": "num_hidden_layers", "Channels": "hidden_size", "Neurons": "intermediate_size"}
    sizes |= {"Heads": "num_attention_heads", "KV heads": "num_key_value_heads"}
    changes = {
        label: (source.config[name], written.config[name])
        for label, name in sizes.items()
        if source.config.get(name) != written.config.get(name)
    }
    text = "\n" + "".join(f"{label + ':':11} {old} -> {new}\n" for label, (old, new) in changes.items())
    if not (source.schemes or written.schemes):  # of codes it is bytes that are there to count
        text += f"Parameters: {before:,} -> {after:,} ({after / before:.0%})\n"
    text += f"On disk:    {source.num_bytes / 1e6:,.1f} -> {written.num_bytes / 1e6:,.1f} MB\n"
    text += f"Perplexity: {figures['perplexity_before']:.2f} -> {figures['perplexity_after']:.2f}"
    text += f" on {figures['num_held_out_tokens']:,} tokens of other text, before it is distilled\n"
    text += f"Wrote {written.directory}"
    text += ", which transformers loads as it is. " if written.is_dense else ". "
    section = OmegaConf.load(written.directory / SECTIONS)
    return f"{text}To use it in a recipe (also in {SECTIONS}):\n\n{OmegaConf.to_yaml(section)}"


if __name__ == "__main__":
    from kd_recipes.entry import run_recipe

    raise SystemExit(run_recipe("compress"))
