"""A teacher whose blocks wait in host memory, and are on the device two at a time.

Each block's weights are one piece of pinned host memory. Two buffers on the device take turns: while a block computes
from one of them, the next block is copied into the other. So the device has to hold two blocks, and the embedding, the
head and the norm; and a batch that computes as long on a block as its copy takes costs no time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchtune.modules import TransformerDecoder

from kd_recipes import _torchtune

_ALIGNMENT = 256  # bytes; what kernels may count on


class Offload:
    """Keeps a decoder's blocks in host memory, and brings each to the device in time.

    The model's parameters stay what they are to those who look: views of the buffers, on the device. All is done by
    hooks of the blocks, which have to run in their order, and are not to be compiled.

    Args:
        model: frozen; its blocks' weights are in host memory, all the rest is on the device. Changed in place.
        device: that it computes on. On a CPU blocks are copied all the same, which is of use to tests.
    """

    def __init__(self, model: TransformerDecoder, device: torch.device) -> None:
        blocks: list[nn.Module] = list(model.layers)
        size = max(_num_bytes(_layout(block)) for block in blocks)
        self._buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(min(2, len(blocks)))]
        self._hosts: list[Tensor] = []
        for index, block in enumerate(blocks):  # one block at a time is in memory twice
            self._hosts.append(_pack(block, pin=device.type == "cuda"))
            _point_into(block, self._buffers[self._place(index)])
            block.register_forward_pre_hook(lambda _block, _args, index=index: self._before(index))
        self._holds: list[int | None] = [None] * len(self._buffers)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # not before the last block has computed: with an odd number of them the first one's buffer is the last one's
        blocks[-1].register_forward_hook(lambda *_: self._fetch(0))

    def _place(self, index: int) -> int:
        return index % len(self._buffers)

    def _before(self, index: int) -> None:
        """A block is about to compute."""
        self._fetch(index)
        if self._stream is not None:  # no copy but this block's has been asked for since
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        if index + 1 < len(self._hosts):
            self._fetch(index + 1)

    def _fetch(self, index: int) -> None:
        """Have a block copied behind all computation asked for up to now, unless it is there, or on its way."""
        place = self._place(index)
        if self._holds[place] == index:
            return
        self._holds[place] = index
        target = self._buffers[place][: len(self._hosts[index])]
        if self._stream is None:
            target.copy_(self._hosts[index])
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            target.copy_(self._hosts[index], non_blocking=True)


def _layout(block: nn.Module) -> list[tuple[Tensor, int]]:
    """The tensors that a block's parameters consist of, and where each begins in the block's memory, in bytes."""
    begin, found = 0, []
    for parameter in block.parameters():
        for tensor in _torchtune.plain_tensors(parameter.detach()):
            found.append((tensor, begin))
            begin += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    return found


def _num_bytes(layout: list[tuple[Tensor, int]]) -> int:
    last, begin = layout[-1]
    return begin + last.nbytes


def _view(memory: Tensor, like: Tensor, begin: int) -> Tensor:
    flat = memory[begin : begin + like.nbytes].view(like.dtype)
    return flat.view(like.shape)


def _pack(block: nn.Module, *, pin: bool) -> Tensor:
    """A block's weights one behind the other, in host memory."""
    tensors = _layout(block)
    memory = torch.empty(_num_bytes(tensors), dtype=torch.uint8, pin_memory=pin)
    for tensor, begin in tensors:
        assert tensor.is_contiguous(), "a format whose tensors have gaps"
        _view(memory, tensor, begin).copy_(tensor)
    return memory


def _point_into(block: nn.Module, memory: Tensor) -> None:
    """Make a block's parameters views of a piece of memory that is laid out as the block was packed."""
    begins = iter([begin for _, begin in _layout(block)])

    def view(tensor: Tensor) -> Tensor:
        return _view(memory, tensor, next(begins))

    for module in block.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            weight: Any = _torchtune.map_tensors(parameter.detach(), view)
            setattr(module, name, nn.Parameter(weight, requires_grad=False))
