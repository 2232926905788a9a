"""All that differs between one process and many. In one process each operation is the identity.

No recipe asks whether it is distributed; it asks for a sum, and in one process the sum is the number itself. Models
are split by FSDP2 as torchtune splits them, block by block, but for one thing: the head's weight stays whole from the
forward pass of a micro-batch to its backward pass, because the loss multiplies by it outside of the model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map
from torchtune.modules import TransformerDecoder

from kd_recipes import _torchtune
from kd_recipes.errors import RunError

Summable = TypeVar("Summable", int, Tensor)
T = TypeVar("T")


def world_size() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main_process() -> bool:
    """Whether this process is the first of those that torchrun has started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def local_device(name: str) -> torch.device:
    """This process's device of a kind: with several processes on a machine, each has the GPU of its own number."""
    device = torch.device(name)
    is_shared = world_size() > 1 and "LOCAL_RANK" in os.environ
    return torch.device(name, int(os.environ["LOCAL_RANK"])) if is_shared and name == "cuda" else device


@dataclass(frozen=True)
class Sharding:
    """How a model is split over the processes.

    Args:
        dtype: that it computes in; its weights keep their own, in which gradients are added up, too.
        reshard_after_forward: give a block's weights back after its forward pass, and gather them again backward:
            less memory, half as much traffic again.
        layers: names of modules that are split by themselves besides the blocks.
        cpu_offload: keep weights, gradients and the optimizer's state in host memory.
    """

    dtype: torch.dtype
    reshard_after_forward: bool = True
    layers: tuple[str, ...] = ()
    cpu_offload: bool = False


@dataclass(frozen=True)
class Parallel:
    """Where this process stands among those of the run.

    Args:
        rank: of this process, from 0.
        world_size: how many processes there are.
        device: of this process's models.
        mesh: the processes in rows that hold a whole model each; None for a single process.
        group: in which they meet to talk, in host memory; the default one if None.
        name: of that group, by which :meth:`late` knows its meetings.
    """

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh | None = None
    group: dist.ProcessGroup | None = None
    name: str = "training"

    @classmethod
    def start(cls, device: torch.device, *, shard_size: int | None = None, timeout: float = 600) -> Parallel:
        """Meet the other processes that torchrun has started.

        Args:
            device: of this process's models.
            shard_size: processes that share a model; all of them if None.
            timeout: seconds that a process waits for another before it gives up.
        """
        size = world_size()
        if size == 1:
            return cls(0, 1, device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        shape = (size // (shard_size or size), shard_size or size)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
        return cls(dist.get_rank(), size, device, mesh)

    def aside(self, name: str, timeout: float) -> Parallel:
        """The same processes in a group of its own, for a thread that works beside the one that trains."""
        if self.world_size == 1:
            return self
        return replace(self, group=dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)), name=name)

    @property
    def is_main(self) -> bool:
        """Whether this process reads and writes files, logs and draws progress."""
        return self.rank == 0

    def shard(self, model: TransformerDecoder, how: Sharding) -> None:
        """Split a model in place, and move it to the device.

        The main process's weights count; elsewhere the model may be on the meta device.
        """
        if self.mesh is None:
            return
        state = model.state_dict() if self.is_main else {}
        model.to("meta")
        settings: dict[str, Any] = {
            "mesh": self.mesh,
            "mp_policy": MixedPrecisionPolicy(param_dtype=how.dtype, reduce_dtype=torch.float32),
            "offload_policy": CPUOffloadPolicy() if how.cpu_offload else OffloadPolicy(),
        }
        for module in _torchtune.modules_to_shard(model, how.layers):
            fully_shard(module, reshard_after_forward=how.reshard_after_forward, **settings)
        fully_shard(model, reshard_after_forward=False, **settings)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # sums over tokens have been divided by all tokens already
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
        model.to_empty(device="cpu" if how.cpu_offload else self.device)
        options = StateDictOptions(
            full_state_dict=True, broadcast_from_rank0=True, strict=False, cpu_offload=how.cpu_offload
        )
        set_model_state_dict(model, state, options=options)
        _torchtune.compute_positions(model, self.device)

    def replicate(self, module: nn.Module) -> None:
        """Give a module on this process's device the main process's weights; its gradients want :meth:`sum_grads`."""
        if self.world_size > 1:
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor.detach(), 0)

    def sum_grads(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients of replicated parameters; those of split ones are when they are computed."""
        if self.world_size > 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)

    def sum(self, value: Summable) -> Summable:
        """A number or a tensor of numbers in host memory, added up over all processes."""
        if self.world_size == 1:
            return value
        total = torch.as_tensor(value).clone()
        self._arrive()
        dist.all_reduce(total)
        return total if isinstance(value, Tensor) else type(value)(total.item())

    def gather(self, tree: T) -> T:
        """Tensors in whatever nesting, whole, in host memory; what is returned elsewhere than on main is of no use."""
        return tree_map(self._whole, tree)  # type: ignore[no-any-return]

    def _whole(self, leaf: Any) -> Any:
        if isinstance(leaf, DTensor):
            on_device: Any = leaf.detach().to(self.device)
            whole = on_device.full_tensor()
            return whole.cpu() if self.is_main else None
        return leaf.detach() if isinstance(leaf, Tensor) else leaf

    def each(self, value: T) -> list[T]:
        """Every process's value, by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        self._arrive()
        dist.all_gather_object(values, value, group=self.group)
        return values

    def _arrive(self) -> None:
        """Leave word that this process has come to its next meeting with the others, for :meth:`late`."""
        _store().add(self._meetings(self.rank), 1)

    def _meetings(self, rank: int) -> str:
        return f"kd_recipes/meetings/{self.name}/{rank}"

    def late(self) -> list[int]:
        """The processes that have not come to the meeting that this one has come to last."""
        if self.world_size == 1:
            return []
        try:
            meetings = [_store().add(self._meetings(rank), 0) for rank in range(self.world_size)]
        except RuntimeError:  # the store has gone with the process that kept it
            return []
        return [rank for rank, count in enumerate(meetings) if count < meetings[self.rank]]

    def on_main(self, action: Callable[[], T]) -> T:
        """What the main process gets by doing something, which the others wait for.

        Raises:
            Exception: the main process's own.
            RunError: elsewhere, that the main process has failed.
        """
        result, failure = None, None
        if self.is_main:
            try:
                result = action()
            except Exception as error:
                failure = error
        result, text = self.each((result, None if failure is None else str(failure)))[0]
        if failure is not None:
            raise failure
        if text is not None:
            raise RunError(f"process 0 failed: {text}")
        return result  # type: ignore[return-value]

    def stop(self) -> None:
        """Part from the other processes."""
        if dist.is_initialized() and self.world_size > 1:
            dist.destroy_process_group()


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()
