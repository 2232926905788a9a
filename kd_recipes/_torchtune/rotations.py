"""Rotary positions while text is generated: looked up once a step, and applied in one product where they can be.

torchtune's modules look them up for the queries and for the keys of every block, and rotate in seven kernels: at one
token a step, a tenth of what a small model takes.
"""

# B sequences, S positions, H heads, E channels of a head, P pairs of them

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.models.qwen2 import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import RotaryPositionalEmbeddings

Rotate = Callable[[Tensor], Tensor]


@contextmanager
def fast_rotations(model: nn.Module) -> Iterator[None]:
    """Rotate faster for a while, where the kind is known; equal up to rounding.

    Args:
        model: called with the positions ``[B, S]`` of its tokens, another tensor in each call.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if look_up := _KINDS.get(type(module)):
                stack.enter_context(replaced(module, forward=_remembering(module, look_up)))
        yield


def _remembering(module: Any, look_up: Callable[[Tensor, torch.dtype], Rotate]) -> Callable[..., Tensor]:
    """A ``forward`` for the module, ``[B, S, H, E]`` rotated, that looks up each tensor of positions once."""
    seen_BS: Tensor | None = None
    rotate: Rotate = torch.clone

    def forward(x_BSHE: Tensor, *, input_pos: Tensor) -> Tensor:
        nonlocal seen_BS, rotate
        if input_pos is not seen_BS:
            seen_BS, rotate = input_pos, look_up(module.cache[input_pos].unsqueeze(2), x_BSHE.dtype)
        return rotate(x_BSHE)

    return forward


def _pairs(cache_BS1P2: Tensor, _dtype: torch.dtype) -> Rotate:
    """Neighbouring channels are the parts of a complex number, which is turned; in float32, as torchtune does it."""
    turn_BS1P = torch.view_as_complex(cache_BS1P2.float())

    def rotate(x_BSHE: Tensor) -> Tensor:
        numbers_BSHP = torch.view_as_complex(x_BSHE.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(numbers_BSHP * turn_BS1P).flatten(-2).type_as(x_BSHE)

    return rotate


def _halves(cache_BS1X: Tensor, dtype: torch.dtype) -> Rotate:
    """A channel is turned with the one that is half a head away."""
    cos_BS1E, sin_BS1E = cache_BS1X.to(dtype).chunk(2, -1)
    first, second = sin_BS1E.chunk(2, -1)
    sin_BS1E = torch.cat((-first, second), -1)  # the sign here, and not for every head

    def rotate(x_BSHE: Tensor) -> Tensor:
        first, second = x_BSHE.chunk(2, -1)
        return x_BSHE * cos_BS1E + torch.cat((second, first), -1) * sin_BS1E

    return rotate


_KINDS = {
    RotaryPositionalEmbeddings: _pairs,
    Llama3ScaledRoPE: _pairs,
    Qwen2RotaryPositionalEmbeddings: _halves,
}


@contextmanager
def replaced(module: nn.Module, **attributes: Any) -> Iterator[None]:
    """Other attributes of a module for a while; those of the instance are seen before its methods and submodules."""
    own = vars(module)
    before = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del own[name]
        own.update(before)
