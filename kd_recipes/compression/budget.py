"""So many parameters, by fewer blocks, or narrower ones, or both: a small search finds out which."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from kd_recipes.compression.checkpoint import HFCheckpoint, write_checkpoint
from kd_recipes.compression.depth import DepthPruning
from kd_recipes.compression.form import Form
from kd_recipes.compression.step import Step
from kd_recipes.compression.stream import Text, cross_entropy
from kd_recipes.compression.width import WidthPruning, narrowed_config
from kd_recipes.errors import ConfigError, Problem
from kd_recipes.storage import scratch_directory

_CLOSE = 0.02  # of the budget, that a candidate may stay below it


@dataclass(frozen=True)
class Candidate:
    """A shape that meets the budget."""

    num_blocks: int
    num_kv_heads: int
    embed_dim: int
    intermediate_dim: int
    num_parameters: int


@dataclass(frozen=True)
class Budget(Step):
    """Prune depth and width to a number of parameters, in the proportion that costs the least loss on the text.

    Candidates differ in blocks, key-value heads and channels; the neurons make up the budget. Each is pruned, and
    its loss before any distillation measured; the best one is kept.

    Args:
        num_parameters: how many, a tied head counted once; a number below 1 is a share of the model's.
        num_candidates: how many shapes are tried.
        narrow_stream: whether key-value heads and channels may go, too.
        multiple_of: neurons and channels are multiples of this.
        protected: as in :class:`DepthPruning`.

    Raises:
        ConfigError: a budget or a number of candidates that leaves nothing.
    """

    num_parameters: float
    num_candidates: int = 6
    narrow_stream: bool = False
    multiple_of: int = 32
    protected: Sequence[int] = (0, -1)

    def __post_init__(self) -> None:
        if not 0 < self.num_parameters < math.inf:
            raise ConfigError(Problem(".num_parameters", self.num_parameters, "a number, or a share below 1"))
        for name in ("num_candidates", "multiple_of"):
            if getattr(self, name) < 1:
                raise ConfigError(Problem(f".{name}", getattr(self, name), "a whole number above 0"))

    def candidates(self, form: Form) -> list[Candidate]:
        """Shapes that meet the budget to within 2%, spread evenly from the deepest to the shallowest.

        Raises:
            ConfigError: there is none.
        """
        budget = self.num_parameters * (form.num_parameters if self.num_parameters < 1 else 1)
        channels, groups = [form.embed_dim], [form.num_kv_heads]
        if self.narrow_stream:
            step = max(self.multiple_of, form.embed_dim // 8 // self.multiple_of * self.multiple_of)
            rounded = form.embed_dim // self.multiple_of * self.multiple_of
            channels += [size for size in (rounded - step, rounded - 2 * step) if size > 0]
            groups += [size for size in (form.num_kv_heads - 1,) if size > 0]
        found = [
            candidate
            for num_blocks in range(form.num_layers, max(len(self.protected), 1) - 1, -1)
            for embed_dim in channels
            for num_groups in groups
            if (candidate := self._fitting(form, budget, num_blocks, num_groups, embed_dim)) is not None
        ]
        if not found:
            wanted = f"a budget that some shape meets; the model has {form.num_parameters:,} parameters"
            raise ConfigError(Problem(".num_parameters", self.num_parameters, wanted))
        if len(found) <= self.num_candidates:
            return found
        places = [round(i * (len(found) - 1) / max(1, self.num_candidates - 1)) for i in range(self.num_candidates)]
        return [found[place] for place in dict.fromkeys(places)]

    def _fitting(self, form: Form, budget: float, num_blocks: int, num_groups: int, embed_dim: int) -> Candidate | None:
        """The shape with as many neurons as the budget allows."""

        def count(num_neurons: int) -> int:
            config = narrowed_config(form, num_neurons, num_groups, embed_dim)
            return replace(form, config={**config, "num_hidden_layers": num_blocks}).num_parameters

        per_step = count(self.multiple_of) - count(0)
        steps = min(int((budget - count(0)) // per_step), form.intermediate_dim // self.multiple_of)
        num_neurons = steps * self.multiple_of
        if steps < 1 or not (1 - _CLOSE) * budget <= count(num_neurons) <= budget:
            return None
        # fewer than a third of the neurons with all the blocks is never the best, and takes the turn of a better one
        if num_neurons < form.intermediate_dim // 3:
            return None
        return Candidate(num_blocks, num_groups, embed_dim, num_neurons, count(num_neurons))

    def check(self, form: Form) -> Form:
        """See :class:`Step`; what is left is any of the candidates."""
        form.require("pruning of widths")
        forms = []
        for shape in self.candidates(form):
            shallow = self._depth(shape).check(form)
            config = narrowed_config(shallow, shape.intermediate_dim, shape.num_kv_heads, shape.embed_dim)
            forms.append(replace(shallow, config=config))
        return replace(forms[0], alternatives=tuple(forms[1:]))

    def _depth(self, shape: Candidate) -> DepthPruning:
        return DepthPruning(num_blocks=shape.num_blocks, protected=self.protected)

    def apply(self, source: HFCheckpoint, destination_dir: Path, text: Text) -> HFCheckpoint:
        """See :class:`Step`; prints the candidates and their losses."""
        shapes = self.candidates(Form(source.config))
        losses: list[float] = []
        best, kept = 0, source
        with scratch_directory(destination_dir) as place:
            for index, shape in enumerate(tqdm(shapes, "candidates", unit="shape")):
                pruned = self._prune(source, place / str(index), shape, text)
                losses.append(cross_entropy(pruned, text))
                lost = index
                if index == 0 or losses[index] < losses[best]:
                    lost, best, kept = best, index, pruned
                if lost != best:  # so that the disk holds two at a time
                    shutil.rmtree(place / str(lost), ignore_errors=True)  # there is none of the source itself
            tqdm.write(report(shapes, losses, best))
            rows = [{**asdict(shape), "loss": loss} for shape, loss in zip(shapes, losses, strict=True)]
            record = {**self.describe(), "candidates": rows}
            tensors = kept.tensors([spec.name for spec in kept.specs])
            return write_checkpoint(kept, destination_dir, tensors, record=record)

    def _prune(self, source: HFCheckpoint, place: Path, shape: Candidate, text: Text) -> HFCheckpoint:
        is_shallower = shape.num_blocks < source.num_layers
        pruned = self._depth(shape).apply(source, place / "depth", text) if is_shallower else source
        form = Form(pruned.config)
        method = WidthPruning(shape.intermediate_dim, shape.num_kv_heads, shape.embed_dim, self.multiple_of)
        if method.sizes(form) == (form.intermediate_dim, form.num_kv_heads, form.embed_dim):
            return pruned
        narrow = method.apply(pruned, place / "width", text)
        if is_shallower:
            shutil.rmtree(pruned.directory)
        return narrow


def report(shapes: Sequence[Candidate], losses: Sequence[float], best: int) -> str:
    """A table of the candidates, the best marked."""
    lines = ["blocks  KV heads  channels  neurons   parameters    loss"]
    for index, (shape, loss) in enumerate(zip(shapes, losses, strict=True)):
        lines.append(
            f"{shape.num_blocks:6}  {shape.num_kv_heads:8}  {shape.embed_dim:8}  {shape.intermediate_dim:7}"
            f"  {shape.num_parameters:11,}  {loss:6.3f}{'  <- kept' if index == best else ''}"
        )
    return "\n".join(lines)
