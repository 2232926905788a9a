"""What TensorBoard shows besides curves: charts of several, texts side by side, settings, the model, histograms."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtune.modules import TransformerDecoder
from tqdm import tqdm

from kd_recipes._torchtune.logging import tensorboard_writer
from kd_recipes.errors import one_line
from kd_recipes.monitoring.symptoms import SYMPTOMS, Vitals

_BESIDE = [s.name for s in SYMPTOMS if f"teacher_{s.name}" in Vitals.__dataclass_fields__]
_ALONE = [s.name for s in SYMPTOMS if s.name not in _BESIDE]
# Category -> chart -> tags, as regular expressions that have to match to the end.
LAYOUT: Mapping[str, Mapping[str, Sequence[str]]] = {
    "Distillation": {
        "KL to the teacher: training, held out": ["kd/forward_kl", "held_out/kl"],
        "cross entropy: training, held out": ["loss/cross_entropy", "held_out/cross_entropy"],
        "cross entropy on held-out text: teacher, student": [
            "held_out/teacher_(.+/)?cross_entropy",
            "held_out/cross_entropy",
        ],
        # the teacher's, and that of each one of a mixture
        "cross entropy on training text: teacher, student": ["kd/teacher_(.+/)?cross_entropy", "loss/cross_entropy"],
        "entropy on held-out text: teacher, student": ["held_out/teacher_entropy", "held_out/student_entropy"],
        "entropy on training text: teacher, student": ["kd/teacher_entropy", "kd/student_entropy"],
        "agreement with the teacher: training, held out": ["kd/agreement", "held_out/agreement"],
        "accuracy: training, held out": ["quality/accuracy", "held_out/accuracy"],
        "objective: kd_ratio, temperature": ["kd/kd_ratio", "kd/temperature"],
    },
    "Health: student, teacher": {name: [f"health/{name}", f"health/teacher_{name}"] for name in dict.fromkeys(_BESIDE)},
    "Health": {name: [f"health/{name}"] for name in dict.fromkeys(_ALONE)},
    "Cost": {
        "seconds of a step": ["time/.*"],
        "memory, GiB": ["memory/.*_gib"],
        "throughput": ["throughput/.*"],
    },
}
# What people try several values of, by dotted name; of a section all that is in it.
TUNED = (
    *("kd_ratio", "temperature", "teacher_temperature", "kd_loss", "label_smoothing", "feature_losses"),
    *("token_weights", "student_constraints", "optimizer", "lr_scheduler", "clip_grad_norm", "batch_size"),
    *("gradient_accumulation_steps", "epochs", "max_steps", "seed", "dtype", "model.num_layers", "model.embed_dim"),
    *("model.lora_rank", "model.lora_alpha"),
)
COMPARED = ("held_out/perplexity", "held_out/cross_entropy", "held_out/kl", "held_out/agreement", "held_out/accuracy")
_SAMPLED = 2**20  # elements of a weight that its histogram is made of; all of 100 million would take seconds
_GRAPH_TOKENS = 8


class Board:
    """Writes to the same place as a metric logger; does nothing for any logger but torchtune's TensorBoardLogger.

    Args:
        logger: a torchtune metric logger, open.
    """

    def __init__(self, logger: Any) -> None:
        self._writer = tensorboard_writer(logger)

    def describe(self, config: Mapping[str, Any]) -> None:
        """The layout of the custom-scalars page, the config as text, and its tuned settings for the HPARAMS page.

        Runs are compared there by the latest values of :data:`COMPARED`, while they run, too.

        Args:
            config: nested and plain, without secrets.
        """
        if self._writer is None:
            return
        from torch.utils.tensorboard.summary import hparams

        charts = {
            category: {title: ["Multiline", [f"^{tag}$" for tag in tags]] for title, tags in charts.items()}
            for category, charts in LAYOUT.items()
        }
        self._writer.add_custom_scalars(charts)
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        self._writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()))
        # add_hparams would begin a run of its own beside this one
        for summary in hparams(dict(tuned_settings(config)), dict.fromkeys(COMPARED))[:2]:
            self._writer._get_file_writer().add_summary(summary)

    def finish(self) -> None:
        """The run has come to its end."""
        if self._writer is not None:
            from torch.utils.tensorboard.summary import hparams

            self._writer._get_file_writer().add_summary(hparams({}, {})[2])

    def samples(self, step: int, samples: Sequence[Mapping[str, str]]) -> None:
        """Texts side by side.

        Args:
            step: updates made.
            samples: a row each: heading of a column -> text, which can be anything that a model may say.
        """
        if self._writer is not None and samples:
            self._writer.add_text("samples", markdown_table(samples), step)

    def histograms(self, step: int, parameters: Mapping[str, Tensor]) -> None:
        """Distributions of weights, and of the gradients that they have; of what is split, this process's part.

        Args:
            step: updates made.
            parameters: by name.
        """
        if self._writer is None:
            return
        for name, parameter in parameters.items():
            for kind, tensor in (("weights", parameter), ("gradients", parameter.grad)):
                if tensor is not None and len(values := _some(tensor)):
                    self._writer.add_histogram(f"{kind}/{name}", values, step)

    def graph(self, model: TransformerDecoder) -> None:
        """The model's graph; a line on the screen where it cannot be traced.

        Takes 3 seconds for 30 blocks on an idle CPU, and 8 on a busy one. Not for a model that several processes share:
        they would wait.

        Args:
            model: with its weights, with or without its head; stays as it is.
        """
        if self._writer is None:
            return
        device = next(model.parameters()).device
        tokens_BS = torch.zeros(1, _GRAPH_TOKENS, dtype=torch.long, device=device)
        devices = [device] if device.type == "cuda" else []
        try:
            # dropout may draw; and torch warns of all that a trace takes for constant
            with torch.random.fork_rng(devices), torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # traced here, since the writer would trace it three times and change the mode of its modules
                traced = torch.jit.trace(Logits(model), (tokens_BS,), check_trace=False)
                self._writer.add_graph(traced, tokens_BS)
        except Exception as error:  # compiled blocks, tensors of a class of their own, and whatever is to come
            tqdm.write(f"no graph in TensorBoard, since the model cannot be traced: {one_line(error)[:200]}")


class Logits(nn.Module):
    """Token ids -> logits, for a model that may have lost its head, or returns its inner states, too."""

    def __init__(self, model: TransformerDecoder) -> None:
        super().__init__()
        self.model = model
        self._is_headless = "unembed" in vars(model)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        output = self.model(tokens_BS)
        last: Tensor = output[-1] if isinstance(output, list) else output
        return self.model.output(last) if self._is_headless else last


def _some(tensor: Tensor) -> Tensor:
    """Some of a tensor's elements that are finite, in float32."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    flat = local.detach().flatten()
    values = flat[:: max(1, flat.numel() // _SAMPLED)].float().cpu()
    return values[values.isfinite()]


def tuned_settings(config: Mapping[str, Any]) -> dict[str, str | float]:
    """The settings that people try several values of, by dotted name; a component by its own name.

    Args:
        config: nested and plain.
    """
    flat = dict(_flatten(config))
    wanted = re.compile("|".join(rf"{re.escape(name)}(\.|$)" for name in TUNED))
    return {name: value for name, value in flat.items() if wanted.match(name)}


def _flatten(node: Any, name: str = "") -> Iterator[tuple[str, str | float]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key == "_component_":
                yield name, str(value).rpartition(".")[2]
            else:
                yield from _flatten(value, f"{name}.{key}" if name else str(key))
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from _flatten(value, f"{name}.{index}")
    elif isinstance(node, (int, float)) and not isinstance(node, bool):
        yield name, node
    elif node is not None:
        yield name, str(node)


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """A table whose cells show their texts as they are, whatever these look like to Markdown or HTML."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [[*map(_escape, columns)], ["---"] * len(columns)]
    lines += [[_escape(row.get(column, "")) for column in columns] for row in rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _escape(text: str) -> str:
    """Every character that might mean something as its number, line breaks as such, control characters shown."""
    spaced = re.sub(r"[^\S\n]", " ", text)
    visible = "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in spaced)
    numbered = re.sub(r"[^\w\s.,;:?']|_", lambda found: f"&#{ord(found[0])};", visible)
    return numbered.replace("\n", "<br>") or " "
