"""Continuations of one context in one sequence: the context is computed once for all choices of a question.

    context   The cat sat on
    branches                  the mat      a hot tin roof      it

Each branch sees the context and itself, and its positions go on from the context's, so that every token is predicted
as it would be in a sequence of its own. Two choices cost little more than one.
"""

# B sequences, S positions, N predicted tokens

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Tree:
    """A context and what may follow it.

    Args:
        context: ids, at least one.
        branches: the ids that follow, at least one each.
        requests: of each branch, whose it is.
    """

    context: list[int]
    branches: list[list[int]] = field(default_factory=list)
    requests: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Positions in the sequence: a branch's last token is predicted and predicts nothing."""
        return len(self.context) + sum(len(branch) - 1 for branch in self.branches)


@dataclass(frozen=True)
class TreeBatch:
    """What a decoder takes, and what to read off.

    Args:
        tokens_BS: ids, padded on the right.
        mask_BSS: which positions attend to which; None is causal, where no sequence has several branches.
        input_pos_BS: positions within context and branch; None with no mask.
        positions_N: in the flattened batch, where the branches' tokens are predicted, branch by branch.
        targets_N: their ids.
    """

    tokens_BS: Tensor
    mask_BSS: Tensor | None
    input_pos_BS: Tensor | None
    positions_N: Tensor
    targets_N: Tensor

    def to(self, device: torch.device) -> TreeBatch:
        """The same batch on a device."""
        moved = (None if tensor is None else tensor.to(device) for tensor in vars(self).values())
        return TreeBatch(*moved)  # type: ignore[arg-type]


def plant(requests: Iterable[tuple[Sequence[int], Sequence[int]]], max_length: int) -> list[Tree]:
    """Trees of requests, longest first.

    Args:
        requests: context, one id at least, and continuation, 1 to ``max_length``. What is longer than a sequence and
            the token that it predicts last loses its beginning, as with lm-evaluation-harness's own models; contexts
            cut at several places are not shared.
        max_length: positions of a sequence.
    """
    trees: list[Tree] = []
    newest: dict[tuple[int, ...], Tree] = {}
    for index, (context, continuation) in enumerate(requests):
        kept = [*context, *continuation][-(max_length + 1) :][: -len(continuation)]
        tree = newest.get(tuple(kept))
        # a branch is worth the mask that it takes where its context is the longer part
        if tree is None or len(kept) < len(continuation) or tree.length + len(continuation) - 1 > max_length:
            tree = newest[tuple(kept)] = Tree(kept)
            trees.append(tree)
        tree.branches.append(list(continuation))
        tree.requests.append(index)
    return sorted(trees, key=lambda tree: -tree.length)


def batches(trees: Sequence[Tree], max_tokens: int) -> Iterator[list[Tree]]:
    """Trees in their order, as many at a time as fit into so many tokens, padding included; one at least."""
    batch: list[Tree] = []
    longest = 0
    for tree in trees:
        longest = max(longest, tree.length)
        if batch and (len(batch) + 1) * longest > max_tokens:
            yield batch
            batch, longest = [], tree.length
        batch.append(tree)
    if batch:
        yield batch


def collate(trees: Sequence[Tree]) -> TreeBatch:
    """The sequences of some trees, side by side."""
    width = max(tree.length for tree in trees)
    tokens_BS = torch.zeros(len(trees), width, dtype=torch.long)
    input_pos_BS = torch.arange(width).repeat(len(trees), 1)
    branch_BS = torch.zeros(len(trees), width, dtype=torch.long)  # 0 is what all of a sequence sees
    positions, targets = [], []
    for row, tree in enumerate(trees):
        start = len(tree.context)
        tokens_BS[row, :start] = torch.tensor(tree.context)
        for number, branch in enumerate(tree.branches, start=1):
            end = start + len(branch) - 1
            tokens_BS[row, start:end] = torch.tensor(branch[:-1])
            input_pos_BS[row, start:end] = len(tree.context) + torch.arange(len(branch) - 1)
            branch_BS[row, start:end] = number if len(tree.branches) > 1 else 0
            positions += [row * width + place for place in (len(tree.context) - 1, *range(start, end))]
            targets += branch
            start = end
    read_off = (torch.tensor(positions), torch.tensor(targets))
    if not branch_BS.any():
        return TreeBatch(tokens_BS, None, None, *read_off)
    is_seen_BSS = (branch_BS[:, None] == 0) | (branch_BS[:, None] == branch_BS[..., None])
    return TreeBatch(tokens_BS, is_seen_BSS.tril(), input_pos_BS, *read_off)
