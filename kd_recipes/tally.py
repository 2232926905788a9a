"""Bytes of tensors as they come and go, whatever makes them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tally(TorchDispatchMode):
    """Counts the bytes of tensors that are made while it is entered, and are still there.

    Args:
        changed: called with the bytes of each tensor's memory when it comes, and with their negative when it goes.

    Attributes:
        peak: the most that they were.
    """

    def __init__(self, changed: Callable[[int], object] | None = None) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._changed = changed
        self._live: dict[int, tuple[int, object]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._count((args, kwargs), is_new=False)  # views of what was there before are made of nothing
        output = func(*args, **kwargs)
        self._count(output, is_new=True)
        self.peak = max(self.peak, self._now)
        return output

    def _count(self, tree: Any, is_new: bool) -> None:
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)):
            key = id(storage)
            if key not in self._live:
                size = storage.nbytes() if is_new else 0
                self._live[key] = (size, weakref.ref(storage, partial(self._forget, key)))
                self._change(size)

    def _forget(self, key: int, _: object) -> None:
        self._change(-self._live.pop(key)[0])

    def _change(self, size: int) -> None:
        self._now += size
        if self._changed is not None and size:
            self._changed(size)
