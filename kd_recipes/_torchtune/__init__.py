"""The only door to torchtune's internals, so that what they are and how they bite stands in one place."""

from __future__ import annotations

import re
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torchtune import config as tune_config
from torchtune import training
from torchtune.config._errors import InstantiationError
from torchtune.config._utils import _get_component_from_path, _merge_yaml_and_cli_args
from torchtune.data import padded_collate_packed, padded_collate_sft
from torchtune.models.gemma2._attention import Gemma2Attention
from torchtune.modules import MultiHeadAttention, TiedLinear, TransformerDecoder
from torchtune.modules.peft import (
    DoRALinear,
    get_adapter_params,
    get_adapter_state_dict,
    get_lora_module_names,
    get_merged_lora_ckpt,
    set_trainable_params,
)
from torchtune.utils import get_logger

from kd_recipes._torchtune.caches import Decoding as Decoding
from kd_recipes._torchtune.caches import decoding as decoding
from kd_recipes._torchtune.frozen import Assembly as Assembly
from kd_recipes._torchtune.frozen import is_nf4 as is_nf4
from kd_recipes._torchtune.frozen import map_tensors as map_tensors
from kd_recipes._torchtune.frozen import plain_tensors as plain_tensors
from kd_recipes._torchtune.frozen import to_nf4 as to_nf4
from kd_recipes._torchtune.frozen import weights_of as weights_of
from kd_recipes._torchtune.heads import Headless as Headless
from kd_recipes._torchtune.heads import take_head as take_head
from kd_recipes._torchtune.heads import without_head as without_head
from kd_recipes.batch import IGNORE_INDEX
from kd_recipes.errors import ConfigError, Problem


# ---------------------------------------------------------------------------------------------------------- config
def merge_overrides(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Merge command-line overrides into a config as ``tune run`` does.

    Raises:
        ValueError: an override that is neither ``key=value`` nor ``~key``.
    """
    flags = [word for word in overrides if word.startswith("--")]
    if flags:
        raise ValueError(f"flags are not settings: {flags}; write key=value")
    yaml = Namespace(**OmegaConf.to_container(cfg, resolve=False))  # type: ignore[arg-type]
    kept = [word for word in overrides if not _drops_section(yaml, word)]
    return _merge_yaml_and_cli_args(yaml, kept)  # type: ignore[no-any-return]


def _drops_section(yaml: Namespace, word: str) -> bool:
    """Carry out ``~section`` or ``section=null``; torchtune refuses the one and sets ``_component_`` by the other."""
    match = re.fullmatch(r"~(\w+)|(\w+)=(?:null|None|~|)", word)
    name = (match.group(1) or match.group(2)) if match else None
    section = getattr(yaml, name, None) if name else None
    is_section = isinstance(section, dict) and "_component_" in section
    if is_section:
        delattr(yaml, str(name))
    return is_section


def locate(path: str) -> Callable[..., Any]:
    """The object that a ``_component_`` names.

    Raises:
        ValueError: it cannot be imported, or cannot be called.
    """
    try:
        component = _get_component_from_path(path)
    except InstantiationError as error:
        raise ValueError(str(error)) from error
    if not callable(component):
        raise ValueError(f"{path} is a {type(component).__name__}, which cannot be called")
    return component  # type: ignore[no-any-return]


def instantiate(cfg: DictConfig | None, *args: Any, **kwargs: Any) -> Any:
    """Build what a ``_component_`` section describes; None for no section."""
    return tune_config.instantiate(cfg, *args, **kwargs)


# ---------------------------------------------------------------------------------------------------------- models
def modules_to_shard(model: TransformerDecoder, names: Sequence[str] = ()) -> list[nn.Module]:
    """The blocks of a decoder, and modules of these names, innermost first; the head is left to the root.

    Raises:
        ConfigError: a name that no module has.
    """
    named = {name: module for name, module in model.named_modules() if name}
    if unknown := [name for name in names if name not in named]:
        wanted = f"names of modules such as {', '.join(name for name, _ in model.named_children())}"
        raise ConfigError(Problem("custom_sharded_layers", unknown, wanted))
    output = model.output
    head = output.tied_module if isinstance(output, TiedLinear) else output
    is_apart = partial(training.get_shard_conditions, names_to_match=list(names))
    return [module for name, module in reversed(named.items()) if module is not head and is_apart(name, module)]


def compute_positions(model: nn.Module, device: torch.device) -> None:
    """Compute the tables of rotations again, which are in no checkpoint, after a model was on the meta device."""
    with device:
        for module in model.modules():
            if hasattr(module, "rope_init"):
                module.rope_init()  # type: ignore[operator]


def build_model(cfg: DictConfig, *, dtype: torch.dtype, device: torch.device) -> TransformerDecoder:
    """A model without its weights."""
    with training.set_default_dtype(dtype), device:
        return instantiate(cfg)


def load_weights(model: TransformerDecoder, state: dict[str, Tensor]) -> list[str]:
    """Load a state dict, leaving adapters as they were initialized.

    Returns:
        Problems, as texts: keys that the model lacks or the state lacks, shapes that differ.
    """
    adapters = get_adapter_params(model)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    wrong = [
        f"{name} is {list(tensor.shape)} in the file and {list(shapes[name])} in the model"
        for name, tensor in state.items()
        if name in shapes and shapes[name] != tensor.shape
    ]
    if wrong:
        return wrong
    missing, unexpected = model.load_state_dict(state, strict=False)
    problems = [f"{name} is not in the file" for name in missing if name not in adapters]
    problems += [f"{name} is in the file and not in the model" for name in unexpected]
    if not problems:
        for module in (
            m for m in model.modules() if isinstance(m, DoRALinear)
        ):  # DoRA's magnitude is the norm of the weight just loaded
            module.initialize_dora_magnitude()
    return problems


def freeze_all_but_adapters(model: TransformerDecoder) -> bool:
    """Train the adapters alone where there are any; returns whether there are."""
    adapters = get_adapter_params(model)
    if adapters:
        set_trainable_params(model, adapters)
    return bool(adapters)


# ---------------------------------------------------------------------------------------------------- checkpointers
def load_checkpoint(cfg: DictConfig) -> tuple[Any, dict[str, Tensor]]:
    """Instantiate a torchtune checkpointer and load its model's weights.

    Returns:
        The checkpointer, which a later :func:`save_checkpoint` needs, and the weights under torchtune's names.
    """
    checkpointer = build_checkpointer(cfg)
    return checkpointer, dict(checkpointer.load_checkpoint()[training.MODEL_KEY])


def build_checkpointer(cfg: DictConfig) -> Any:
    """A checkpointer that has looked for its files, and has no output directory yet."""
    # checkpointers make their output directory when they are built; ours is made when there is something to write
    with tempfile.TemporaryDirectory() as unused:
        return instantiate(OmegaConf.merge(cfg, {"output_dir": unused}))  # type: ignore[arg-type]


@dataclass(frozen=True)
class ModelSize:
    """What a model's builder decides.

    Args:
        num_rows: of the embedding and the head, padding of the vocabulary included.
        embed_dim: width of the residual stream.
        num_layers: blocks.
        max_seq_len: positions.
        num_heads: of queries in the first block; 0 where its attention is none of torchtune's.
        num_kv_heads: of keys and values.
    """

    num_rows: int
    embed_dim: int
    num_layers: int
    max_seq_len: int
    num_heads: int = 0
    num_kv_heads: int = 0


def model_size(model: TransformerDecoder) -> ModelSize:
    """The sizes of a model, which may be on the meta device."""
    num_rows, embed_dim = model.tok_embeddings.weight.shape
    attentions = [getattr(block, "attn", None) for block in model.layers]
    is_known = all(isinstance(attention, (MultiHeadAttention, Gemma2Attention)) for attention in attentions)
    first: Any = attentions[0]
    heads = (first.num_heads, first.num_kv_heads) if is_known else ()
    return ModelSize(num_rows, embed_dim, len(model.layers), model.max_seq_len, *heads)


def save_checkpoint(checkpointer: Any, contents: dict[str, Any], directory: Path, adapter_only: bool = False) -> None:
    """Write a model the way its checkpointer does, into exactly this directory.

    Args:
        checkpointer: the one that loaded the base weights; it knows their names, shards and companion files.
        contents: ``model`` (weights under torchtune's names), and for LoRA ``adapter`` and ``adapter_config``.
        directory: where the files go; made if need be.
        adapter_only: leave the merged weights out.
    """
    # the checkpointers write to <output_dir>/epoch_<n>; everything they write is wanted one level up
    checkpointer._output_dir = directory
    get_logger("WARNING")  # what a checkpointer says of its temporary files would tear the progress bar
    checkpointer.save_checkpoint(contents, epoch=0, intermediate_checkpoint=False, adapter_only=adapter_only)
    written = directory / "epoch_0"
    for path in written.iterdir():
        # beside merged weights transformers, where peft is installed, would take an adapter for one to be added
        target = directory if adapter_only or not path.name.startswith("adapter_") else directory / "adapter"
        target.mkdir(exist_ok=True)
        path.rename(target / path.name)
    written.rmdir()


def merged_student(weights: Mapping[str, Tensor], model_cfg: DictConfig, dtype: torch.dtype) -> dict[str, Any]:
    """What :func:`save_checkpoint` takes, for a full or an adapted model; the weights are not touched.

    Args:
        weights: the student's state, whole.
        model_cfg: the section that built it; its LoRA settings say how to merge.
        dtype: of the weights to be written; a merge is computed in the model's own.
    """
    state = {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}
    adapter_state = {name: tensor.clone() for name, tensor in get_adapter_state_dict(state).items()}
    if not adapter_state:
        return {training.MODEL_KEY: {name: tensor.to(dtype) for name, tensor in state.items()}}
    rank, alpha = model_cfg.lora_rank, model_cfg.lora_alpha
    modules = get_lora_module_names(
        list(model_cfg.lora_attn_modules),
        model_cfg.get("apply_lora_to_mlp", False),
        model_cfg.get("apply_lora_to_output", False),
    )
    adapter_config = {"r": rank, "lora_alpha": alpha, "target_modules": modules, "peft_type": "LORA"}
    merged = get_merged_lora_ckpt(state, rank=rank, alpha=alpha)  # adds in place, hence the clones
    return {
        training.MODEL_KEY: {name: tensor.to(dtype) for name, tensor in merged.items()},
        training.ADAPTER_KEY: adapter_state,
        training.ADAPTER_CONFIG: adapter_config,
    }


# ------------------------------------------------------------------------------------------------------------- data
def stream_of(dataset: Any) -> tuple[Any, Callable[[Mapping[str, Any]], dict[str, Any]]] | None:
    """The rows of a data set that is read as a stream, and what makes a sample of one; None where it has a length."""
    source = getattr(dataset, "_data", None)
    return (
        (source, dataset._prepare_sample) if hasattr(source, "set_epoch") and not hasattr(source, "__len__") else None
    )


def collate(padding_idx: int, packed: bool) -> Callable[[list[Any]], dict[str, Tensor]]:
    """torchtune's collate function: ``tokens`` and ``labels`` ``[B, S]``; packed, also ``mask`` and ``input_pos``."""
    if packed:
        return padded_collate_packed  # type: ignore[no-any-return]
    return partial(padded_collate_sft, padding_idx=padding_idx, ignore_idx=IGNORE_INDEX)
