"""How much a run writes to disk, by its config and the headers of its student's files."""

from __future__ import annotations

import math

from omegaconf import DictConfig

from kd_recipes.headers import file_bytes, read_specs


def bytes_to_write(cfg: DictConfig) -> dict[str, int]:
    """What a run needs at least: one export, two with held-out evaluation; the checkpoints kept, and one more, since
    an old one goes when the new one is whole; the best student's state, where `health` may go back to it."""
    if (size := file_bytes(cfg, "checkpointer")) is None:
        return {}
    exports = 0 if cfg.save_adapter_weights_only else size * (1 if cfg.eval_dataset is None else 2)
    if "lora_rank" in cfg.model:
        return {"students": exports}
    num_parameters = sum(math.prod(spec.shape) for spec in read_specs(cfg.checkpointer).values())
    return {"students": exports, "checkpoints": num_parameters * _checkpoint_bytes(cfg) * num_checkpoints(cfg)}


def num_checkpoints(cfg: DictConfig) -> int:
    """Most checkpoints that are on disk at a time."""
    found = min(_num_saves(cfg), int(cfg.keep_last_n_checkpoints) + 1)
    if cfg.eval_dataset is not None and (cfg.health or {}).get("action") == "restore_best":
        found += 2  # the best student's state, and a better one's before the old one goes
    return found


def _num_saves(cfg: DictConfig) -> int:
    if cfg.save_every_n_steps is None or cfg.max_steps is None:
        return int(cfg.epochs)
    return max(1, int(cfg.max_steps) // int(cfg.save_every_n_steps))


def _checkpoint_bytes(cfg: DictConfig) -> int:
    """Of a parameter in a checkpoint: the weight, or its float32 copy, and Adam's two moments."""
    is_bf16 = cfg.dtype == "bf16"
    weights = 2 if is_bf16 and not cfg.master_weights else 4
    is_adam = str(cfg.optimizer._component_).rpartition(".")[2] in ("Adam", "AdamW")
    moment = 2 if is_bf16 and not cfg.master_weights else 4
    return weights + 2 * moment * is_adam
