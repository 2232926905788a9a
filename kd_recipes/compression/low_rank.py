"""Matrices and stacks of matrices as products of smaller ones.

Two factors of rank R have R (O + I) parameters where the matrix had O I; they are trained as they are, take as many
multiplications, and fold back into a matrix (:class:`~kd_recipes.compression.ToDense`).
"""

# L blocks, O outputs, I inputs, R rank

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from kd_recipes._torchtune.names import to_hf
from kd_recipes.compression import decomposition
from kd_recipes.compression.checkpoint import HFCheckpoint, write_checkpoint
from kd_recipes.compression.convert import as_tune, to_file
from kd_recipes.compression.decomposition import Factors, num_factor_parameters
from kd_recipes.compression.form import Form
from kd_recipes.compression.spill import spilled
from kd_recipes.compression.step import Step
from kd_recipes.compression.stream import INPUT_OF, Block, Stream, Text
from kd_recipes.errors import ConfigError, Problem, gather
from kd_recipes.layers import LowRankLinear


@dataclass(frozen=True)
class LowRank(Step):
    """Factorize the linear layers of all blocks; exactly one of ``ratio``, ``energy`` and ``budget`` is given.

    Args:
        ratio: share of its parameters that each matrix keeps, in (0, 1).
        energy: share of its squared singular values that each matrix keeps at least, in (0, 1); one that this would
            not make smaller stays whole.
        budget: share of all these matrices' parameters that is kept, spread over them so that the squared relative
            errors of their outputs come out least.
        whiten: truncate what the outputs on the calibration text miss least (SVD-LLM,
            https://arxiv.org/abs/2403.07378), not what the weights do.
        three_factors: a square matrix of singular values between the two, U S V.
        multiple_of: ranks are multiples of this, for kernels and quantization groups.
        embedding_rank: of the embedding, and of the head where that is it or a matrix of its own; None for whole ones.

    Raises:
        ConfigError: none of the three or several, or one that leaves nothing.
    """

    ratio: float | None = None
    energy: float | None = None
    budget: float | None = None
    whiten: bool = True
    three_factors: bool = False
    multiple_of: int = 8
    embedding_rank: int | None = None

    def __post_init__(self) -> None:
        asked = {name: getattr(self, name) for name in ("ratio", "energy", "budget")}
        given = {name: value for name, value in asked.items() if value is not None}
        if len(given) > 1 or not (given or self.embedding_rank is not None):
            raise ConfigError(Problem(".ratio", asked, "exactly one of ratio, energy and budget"))
        for name, value in given.items():
            if not 0 < value < 1:
                raise ConfigError(Problem(f".{name}", value, "a share above 0 and below 1"))
        if self.multiple_of < 1:
            raise ConfigError(Problem(".multiple_of", self.multiple_of, "a whole number above 0"))

    def check(self, form: Form) -> Form:
        """See :class:`Step`."""
        form.require("decomposition")
        num_rows = int(form.config["vocab_size"])
        most = (num_rows * form.embed_dim - 1) // (num_rows + form.embed_dim)
        if self.embedding_rank is not None and not 1 <= self.embedding_rank <= most:
            wanted = f"from 1 to {most}, whose factors are smaller than the embedding"
            raise ConfigError(Problem(".embedding_rank", self.embedding_rank, wanted))
        if self.ratio is not None:
            for name, shape in form.shapes.items():
                self._by_ratio(name, shape)
        if self.budget is not None:
            shapes = [*form.shapes.values()] * form.num_layers
            decomposition.left_by_budget(
                shapes, self.budget, self.multiple_of, ".budget", three_factors=self.three_factors
            )
        multiple = self.multiple_of if self._asks_blocks else 0
        return replace(form, rank_multiple=multiple, table_rank=self.embedding_rank or 0)

    @property
    def _asks_blocks(self) -> bool:
        return (self.ratio, self.energy, self.budget) != (None, None, None)

    def _by_ratio(self, name: str, shape: tuple[int, int]) -> int:
        assert self.ratio is not None
        most = decomposition.rank_by_ratio(*shape, self.ratio, self.three_factors)
        rank = most // self.multiple_of * self.multiple_of
        if rank < 1:
            wanted = f"a ratio that leaves {name} ({shape[0]} x {shape[1]}) a rank of {self.multiple_of} (multiple_of)"
            raise ConfigError(Problem(".ratio", self.ratio, wanted))
        return rank

    def apply(self, source: HFCheckpoint, destination_dir: Path, text: Text) -> HFCheckpoint:
        """See :class:`Step`; prints what share of the parameters is left."""
        form = Form(source.config)
        budgeted = self._spread(source, text, form) if self.budget is not None else {}
        ranks: dict[str, list[int]] = {}

        def tensors() -> Iterator[tuple[str, Tensor]]:
            stream = Stream(source, text, "factorize")
            for block in stream:
                if self._asks_blocks:
                    self._factorize(block, form, budgeted, ranks)
                yield from block.tensors(source.config)
            yield from self._tables(stream, ranks)

        record = self.describe()
        written = write_checkpoint(source, destination_dir, tensors(), record=record, ranks=ranks)
        before, after = (sum(math.prod(spec.shape) for spec in of.specs) for of in (source, written))
        tqdm.write(f"Parameters: {after:,} of {before:,} ({after / before:.1%})")
        return written

    def _spread(self, source: HFCheckpoint, text: Text, form: Form) -> Mapping[str, int | None]:
        """A rank for each matrix, by the singular values of all of them."""
        values: dict[str, Tensor] = {}
        for block in Stream(source, text, "singular values"):
            grams = block.grams(list(INPUT_OF)) if self.whiten else {}
            for name in INPUT_OF:
                found = decomposition.singular_values(block.weight(name), grams.get(name))
                values[f"layers.{block.index}.{name}"] = found.cpu()
        shapes = {layer: form.shapes[layer.split(".", 2)[2]] for layer in values}
        assert self.budget is not None
        return decomposition.ranks_by_budget(values, shapes, self.budget, self.multiple_of, self.three_factors)

    def _factorize(
        self, block: Block, form: Form, budgeted: Mapping[str, int | None], ranks: dict[str, list[int]]
    ) -> None:
        grams = block.grams(list(INPUT_OF)) if self.whiten else {}
        for name, (rows, columns) in form.shapes.items():
            layer, weight_OI, gram_II = f"layers.{block.index}.{name}", block.weight(name), grams.get(name)
            if self.ratio is not None:
                rank: int | None = self._by_ratio(name, (rows, columns))
            elif self.energy is not None:
                values = decomposition.singular_values(weight_OI, gram_II)
                least = decomposition.rank_by_energy(values, self.energy)
                rank = -(-least // self.multiple_of) * self.multiple_of
            else:
                rank = budgeted[layer]
            if rank is None or num_factor_parameters(rank, rows, columns, self.three_factors) >= rows * columns:
                continue
            factors = decomposition.truncated_svd(weight_OI, rank, gram_II, three_factors=self.three_factors)
            bias = block.state.pop(f"{name}.bias", None)
            block.set_module(name, _as_layer(factors, bias))
            ranks[layer] = [rank, rank] if self.three_factors else [rank]

    def _tables(self, stream: Stream, ranks: dict[str, list[int]]) -> Iterator[tuple[str, Tensor]]:
        """The embedding, the head and the last norm."""
        source = stream.source
        gram_DD = stream.final_gram() if self.embedding_rank and self.whiten else None
        for name in source.names(None):
            for key, tensor in as_tune(source, [name]).items():
                state = {key: tensor}
                if tensor.ndim == 2 and self.embedding_rank is not None:
                    is_seen = key.startswith("output") or source.config.get("tie_word_embeddings", False)
                    weight_VD = tensor.to(stream.text.device, torch.float32)
                    factors = decomposition.truncated_svd(weight_VD, self.embedding_rank, gram_DD if is_seen else None)
                    layer = key.removesuffix(".weight")
                    ranks[layer] = [self.embedding_rank]
                    factored = {f"{layer}.u": factors.u_OR, f"{layer}.v": factors.v_RI}
                    state = {name: factor.to(tensor.dtype).cpu() for name, factor in factored.items()}
                yield from to_file(state, source.config)


def _as_layer(factors: Factors, bias: Tensor | None) -> LowRankLinear:
    (rows, rank), columns = factors.u_OR.shape, factors.v_RI.shape[1]
    has_three = factors.s_RR is not None
    layer = LowRankLinear(columns, rows, rank, bias=bias is not None, three_factors=has_three)
    values = {"u": factors.u_OR, "v": factors.v_RI, "s": factors.s_RR, "bias": bias}
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(values[name])  # type: ignore[arg-type]
    return layer


@dataclass(frozen=True)
class TensorDecomposition(Step):
    """Experimental: what a Tucker or tensor-train decomposition of stacked weights, through tensorly, would leave.

    The stack is decomposed and multiplied out again, so the result is a dense model of the quality that the
    decomposition has, and of the size that the model had; what the factors would hold is printed and recorded.

    Args:
        kind: ``tucker`` or ``tensor_train``.
        stack: ``layers``, the same projection of all blocks, or ``heads``, the heads of a projection in one block.
        ratio: share of the parameters that the factors have, in (0, 1).
        projections: which linear layers; queries, keys and values alone where heads are stacked.

    Raises:
        ConfigError: another kind, stack or projection, or a ratio that leaves nothing.
    """

    kind: Literal["tucker", "tensor_train"] = "tucker"
    stack: Literal["layers", "heads"] = "layers"
    ratio: float = 0.6
    projections: tuple[str, ...] = ("attn.q_proj", "attn.k_proj", "attn.v_proj")

    def __post_init__(self) -> None:
        wanted = {"kind": ("tucker", "tensor_train"), "stack": ("layers", "heads")}
        for name, known in wanted.items():
            if getattr(self, name) not in known:
                raise ConfigError(Problem(f".{name}", getattr(self, name), " or ".join(known)))
        if not 0 < self.ratio < 1:
            raise ConfigError(Problem(".ratio", self.ratio, "a share above 0 and below 1"))
        stackable = [name for name in INPUT_OF if self.stack == "layers" or name[-6:] in ("q_proj", "k_proj", "v_proj")]
        unknown = [name for name in self.projections if name not in stackable]
        if unknown or not self.projections:
            raise ConfigError(Problem(".projections", unknown, f"some of {', '.join(stackable)}"))

    def check(self, form: Form) -> Form:
        """See :class:`Step`."""
        form.require("tensor decomposition")
        decomposition.require_tensorly()
        sizes = dict.fromkeys(self._sizes(form, name) for name in self.projections)
        gather(*(partial(self._ranks, of_stack) for of_stack in sizes))
        return form

    def _sizes(self, form: Form, projection: str) -> tuple[int, int, int]:
        """Of a stack of this projection."""
        rows, columns = form.shapes[projection]
        if self.stack == "layers":
            return form.num_layers, rows, columns
        return rows // form.head_dim, form.head_dim, columns

    def _ranks(self, sizes: tuple[int, int, int]) -> tuple[int, ...]:
        ranks = decomposition.tucker_ranks if self.kind == "tucker" else decomposition.tensor_train_ranks
        return ranks(sizes, self.ratio)

    def apply(self, source: HFCheckpoint, destination_dir: Path, text: Text) -> HFCheckpoint:
        """See :class:`Step`; prints what the factors would hold."""
        form = Form(source.config)
        counts = {"before": 0, "after": 0}
        with spilled(destination_dir) as changed:
            for projection in tqdm(self.projections, "decompose", unit="projection"):
                names = [f"layers.{index}.{projection}.weight" for index in range(source.num_layers)]
                weights = list(as_tune(source, [to_hf(name) for name in names]).values())
                for name, new in zip(names, self._approximations(weights, form, counts), strict=True):
                    changed.update(to_file({name: new.to(weights[0].dtype)}, source.config))
            tqdm.write(f"Parameters of these projections: {counts['before']:,}, as factors {counts['after']:,}")
            whole = source.tensors(spec.name for spec in source.specs)
            tensors = ((name, changed.get(name, tensor)) for name, tensor in whole)
            record = {**self.describe(), "parameters": counts}
            return write_checkpoint(source, destination_dir, tensors, record=record)

    def _approximations(self, weights: list[Tensor], form: Form, counts: dict[str, int]) -> list[Tensor]:
        decompose = decomposition.tucker if self.kind == "tucker" else decomposition.tensor_train
        stack_LOI = torch.stack(weights).float()
        stacks = [stack_LOI] if self.stack == "layers" else stack_LOI.unflatten(1, (-1, form.head_dim)).unbind()
        results = []
        for stack in stacks:
            factors = decompose(stack, self.ratio)
            counts["before"] += stack.numel()
            counts["after"] += factors.num_parameters
            results.append(factors.stack)
        return list(results[0]) if self.stack == "layers" else [result.flatten(0, 1) for result in results]
