"""Models that are loaded to be asked, not trained: their weights one at a time, each put into its place at once.

torchtune's checkpointers hand over all weights of all files; here each tensor of a file goes by itself through the same
functions that rename it and put its rows into torchtune's order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torchao.dtypes.nf4tensor import NF4Tensor, SubclassTensorArgs
from torchtune.models import convert_weights
from torchtune.models.gemma2._convert_weights import gemma2_hf_to_tune
from torchtune.models.phi3._convert_weights import phi3_hf_to_tune
from torchtune.models.qwen2._convert_weights import qwen2_hf_to_tune
from torchtune.modules.peft import DoRALinear, get_adapter_params
from torchtune.training import MODEL_KEY, FullModelHFCheckpointer, ModelType
from torchtune.training.checkpointing._utils import safe_torch_load

from kd_recipes.errors import ConfigError, Problem

_NF4_BLOCKS = 2**14  # whose codes are found at a time
_OTHERS = (ModelType.LLAMA3_VISION, ModelType.CLIP_TEXT, ModelType.T5_ENCODER, ModelType.REWARD)


def is_nf4(tensor: Tensor) -> bool:
    """Whether a weight is kept in NF4."""
    return isinstance(tensor, NF4Tensor)


def to_nf4(weight: Tensor, block_size: int = 64, scaler_block_size: int = 256) -> Tensor:
    """torchao's function of this name, but for codes found in float32 by bisection.

    torchao compares each weight with all 16 values, in the weight's own dtype: on a CPU that is slow, and takes 100 MB
    more. Apart from values half way between two it is ``torchao.dtypes.nf4tensor.to_nf4(weight)``.

    Args:
        weight: of a multiple of ``block_size * scaler_block_size`` elements.
        block_size: weights that share a scale.
        scaler_block_size: scales that share one.

    Raises:
        AssertionError: of another number of elements.
    """
    flat = weight.reshape(-1)
    scales = NF4Tensor.double_quantize_scalers(flat, block_size, scaler_block_size)
    smallest = torch.ones(block_size * scaler_block_size, dtype=weight.dtype, device=weight.device)
    values = NF4Tensor.from_tensor(smallest, block_size, scaler_block_size).nf4
    between = (values[1:].float() + values[:-1].float()) / 2
    packed = torch.empty(flat.numel() // 2, dtype=torch.uint8, device=weight.device)
    chunk = _NF4_BLOCKS * block_size
    for part, target in zip(flat.split(chunk), packed.split(chunk // 2), strict=True):
        blocks = part.float().view(-1, block_size)
        largest = blocks.abs().amax(1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
        codes = torch.bucketize(blocks / largest, between, out_int32=True).flatten().to(torch.uint8)
        target.copy_(codes[::2] << 4 | codes[1::2])
    kind = (weight.size(), weight.stride(), weight.storage_offset(), weight.dtype, weight.device, weight.requires_grad)
    sizes = (block_size, flat.numel() // block_size, scaler_block_size)
    tensor: Tensor = NF4Tensor(SubclassTensorArgs(*kind), *sizes, *scales, packed, values)
    return tensor


def map_tensors(tensor: Any, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A tensor, or a tensor of tensors such as torchao's, whose parts have become what ``function`` makes of them."""
    if not is_traceable_wrapper_subclass(tensor):
        return function(tensor)
    whole: Any = tensor
    names, context = whole.__tensor_flatten__()
    parts = {name: map_tensors(getattr(whole, name), function) for name in names}
    if isinstance(whole, NF4Tensor):  # alone keeps its device apart from that of its parts
        device = next(iter(parts.values())).device
        context = {**context, "tensor_meta": replace(context["tensor_meta"], device=device)}
    rebuilt: Tensor = type(whole).__tensor_unflatten__(parts, context, whole.shape, whole.stride())
    return rebuilt


def plain_tensors(tensor: Tensor) -> list[Tensor]:
    """What a tensor consists of in memory: itself, or codes, scales and whatever else there is."""
    parts: list[Tensor] = []

    def note(part: Tensor) -> Tensor:
        parts.append(part)
        return part

    map_tensors(tensor, note)
    return parts


def weights_of(checkpointer: Any) -> Iterator[tuple[str, Tensor]]:
    """What a checkpointer would load, under torchtune's names; of Hugging Face's files one tensor at a time.

    A tensor may be a view of its file: what is kept has to be copied.

    Raises:
        ConfigError: a model that is no decoder.
    """
    if not isinstance(checkpointer, FullModelHFCheckpointer):
        state = dict(checkpointer.load_checkpoint()[MODEL_KEY])
        while state:
            yield state.popitem()
        return
    convert = _converter(checkpointer)
    for path in checkpointer._checkpoint_paths:
        for name, tensor in _tensors_in(Path(path)):
            yield from convert({name: tensor}).items()


def _tensors_in(path: Path) -> Iterator[tuple[str, Tensor]]:
    if path.suffix != ".safetensors":
        state = safe_torch_load(path)  # mapped, not read
        while state:
            yield state.popitem()
        return
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
    for name in names:
        with safe_open(path, framework="pt") as file:  # one mapping for all would stay in memory to the end
            tensor = file.get_tensor(name)
        yield name, tensor
        del tensor


def _converter(checkpointer: FullModelHFCheckpointer) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """What the checkpointer itself makes torchtune's tensors with."""
    kind, config = checkpointer._model_type, checkpointer._config
    if kind in _OTHERS:
        wanted = "a decoder: others are not loaded a tensor at a time"
        raise ConfigError(Problem("model_type", kind.name, wanted))
    sizes: dict[str, Any] = {
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config.get("num_key_value_heads", config["num_attention_heads"]),
        "dim": config["hidden_size"],
    }
    if kind in (ModelType.PHI3_MINI, ModelType.PHI4):
        is_grouped = sizes["num_heads"] != sizes["num_kv_heads"]
        return partial(phi3_hf_to_tune, **(sizes if is_grouped else dict.fromkeys(sizes)))
    if kind is ModelType.QWEN2:
        return partial(qwen2_hf_to_tune, **sizes, tie_word_embeddings=config["tie_word_embeddings"])
    convert = gemma2_hf_to_tune if kind is ModelType.GEMMA2 else convert_weights.hf_to_tune
    return partial(convert, **sizes, head_dim=config.get("head_dim"))


class Assembly:
    """A model on the meta device that is given its weights one after the other.

    Args:
        model: changed in place.
        device: that it will compute on.
        dtype: that it will compute in.
    """

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self._model, self._device, self._dtype = model, device, dtype
        self._missing = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.problems: list[str] = []

    def prepare(self, name: str, tensor: Tensor, pack: Callable[[Tensor, torch.dtype], Tensor] | None) -> Tensor | None:
        """Put a weight on the device, in its format; None, with a problem noted, where it has no place.

        Args:
            name: torchtune's.
            tensor: as the file has it.
            pack: what makes of a weight, and the dtype to compute in, what takes its place; None to keep it as it is,
                or in NF4 where the model's builder has so.
        """
        shape = self._missing.pop(name, None)
        if shape is None:
            self.problems.append(f"{name} is in the file and not in the model")
            return None
        if shape != tensor.shape:
            self.problems.append(f"{name} is {list(tensor.shape)} in the file and {list(shape)} in the model")
            return None
        old = self._model.get_parameter(name)
        if isinstance(old, NF4Tensor):
            return to_nf4(tensor.to(self._device, self._dtype), old.block_size, old.scaler_block_size)
        if pack is not None:
            return pack(tensor.to(self._device), self._dtype)
        return tensor.to(self._device, self._dtype, copy=True)

    def place(self, name: str, tensor: Tensor) -> None:
        """Make a weight the model's."""
        module, _, leaf = name.rpartition(".")
        setattr(self._model.get_submodule(module), leaf, nn.Parameter(tensor, requires_grad=False))

    def finish(self) -> list[str]:
        """Set adapters, which no file has, to add nothing.

        Returns:
            What was wrong.
        """
        adapters = get_adapter_params(self._model)
        self.problems += [f"{name} is not in the file" for name in self._missing if name not in adapters]
        if self.problems:
            return self.problems
        for name in self._missing:
            self.place(name, torch.zeros(adapters[name].shape, dtype=self._dtype, device=self._device))
        for module in self._model.modules():
            if isinstance(module, DoRALinear):
                module.initialize_dora_magnitude()
        return []
