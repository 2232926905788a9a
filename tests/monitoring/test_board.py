"""What TensorBoard is told, read back from its event files."""

from __future__ import annotations

import html
import json
import re
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from torch import Tensor, nn
from torchtune.modules.peft import get_adapter_params, set_trainable_params
from torchtune.training.metric_logging import DiskLogger, StdoutLogger, TensorBoardLogger

from kd_recipes import _torchtune
from kd_recipes._torchtune.logging import tensorboard_writer
from kd_recipes.batch import Batch
from kd_recipes.losses import QUALITIES, LossSum
from kd_recipes.models import llama, lora_llama
from kd_recipes.monitoring import Health, HealthMonitor, Vitals
from kd_recipes.monitoring.board import COMPARED, LAYOUT, Board, markdown_table, tuned_settings
from kd_recipes.monitoring.metrics import StepMeter, log
from kd_recipes.monitoring.timing import PHASES

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of what TensorBoard has copied into itself
    from tensorboard.plugin_util import markdown_to_safe_html

SIZES: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "embed_dim": 64, "intermediate_dim": 96}
SIZES |= {"vocab_size": 320, "max_seq_len": 64}
CONFIG = {
    "output_dir": "runs/a",
    "model": {"_component_": "kd_recipes.models.lora_llama", "lora_rank": 8, "vocab_size": 320},
    "kd_ratio": {"start": 1.0, "end": 0.5, "shape": "cosine"},
    "kd_loss": {"_component_": "kd_recipes.losses.SkewForwardKL", "alpha": 0.1},
    "feature_losses": [{"_component_": "kd_recipes.losses.HiddenStates", "weight": 2.0}],
    "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-3, "fused": True},
    "dataset": {"source": "json", "note": "```\n# no heading <b>no html</b>"},
    "temperature": 2.0,
    "teacher_temperature": None,
    "max_steps": 10,
}


def _read(directory: Path) -> EventAccumulator:
    events = EventAccumulator(str(directory), size_guidance={"tensors": 0, "histograms": 0})
    events.Reload()
    return events


def _text(events: EventAccumulator, tag: str) -> dict[int, str]:
    return {e.step: e.tensor_proto.string_val[0].decode() for e in events.Tensors(f"{tag}/text_summary")}


@pytest.fixture
def logger(tmp_path: Path) -> TensorBoardLogger:
    return TensorBoardLogger(str(tmp_path / "tb"), organize_logs=False)


# -------------------------------------------------------------------------------------------------------------- layout
def _step_metrics() -> dict[str, float]:
    """What a step of a run logs."""
    model = llama(num_layers=1, **SIZES)
    meter = StepMeter(torch.device("cpu"), model, [model])
    tokens_BS = torch.ones(2, 4, dtype=torch.long)
    names = ("cross_entropy", "divergence", "hidden_mse", *QUALITIES)
    sums = {name: torch.tensor(2.0, dtype=torch.float64) for name in names}
    for _ in meter.steps([[]]):
        for phase in PHASES[1:]:
            with meter.phase(phase):
                pass
        meter.add(LossSum(torch.tensor(1.0), sums, 2), Batch(tokens_BS, tokens_BS))
        metrics = meter.means(2, lambda sums: sums) | meter.finish(2)
    return metrics


def test_the_layout_draws_tags_that_are_logged(logger: TensorBoardLogger, tmp_path: Path) -> None:
    vitals = Vitals(**dict.fromkeys(Vitals.__dataclass_fields__, 0.5))
    monitor = HealthMonitor(Health())
    monitor.observe(1, vitals)
    held_out = (
        "kl",
        "cross_entropy",
        "teacher_cross_entropy",
        "teacher_entropy",
        "student_entropy",
        "agreement",
        "accuracy",
        "perplexity",
    )
    log(logger, "", _step_metrics() | {"kd/kd_ratio": 0.5, "kd/temperature": 1.0}, 1)
    log(logger, "held_out/", dict.fromkeys(held_out, 1.0), 1)
    log(logger, "health/", monitor.metrics(), 1)
    Board(logger).describe(CONFIG)
    logger.close()

    events = _read(tmp_path / "tb")
    layout = layout_pb2.Layout()
    layout.ParseFromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {(c.title, chart.title): list(chart.multiline.tag) for c in layout.category for chart in c.chart}
    assert {category for category, _ in charts} == set(LAYOUT)
    tags = events.Tags()["tensors"]
    for title, expressions in charts.items():
        for expression in expressions:  # as the plugin matches them
            assert any(re.match(expression, tag) for tag in tags), (title, expression)
    assert ["^kd/forward_kl$", "^held_out/kl$"] in charts.values()
    assert ["^held_out/teacher_entropy$", "^held_out/student_entropy$"] in charts.values()
    assert charts["Health: student, teacher", "self_bleu"] == ["^health/self_bleu$", "^health/teacher_self_bleu$"]
    drawn = [tag for tag in tags if tag.startswith("health/")]
    assert all(any(re.match(e, tag) for es in charts.values() for e in es) for tag in drawn)


def test_metrics_of_a_step_are_in_their_groups() -> None:
    groups: dict[str, set[str]] = {}
    for tag in _step_metrics():
        group, _, name = tag.partition("/")
        groups.setdefault(group, set()).add(name)
    assert groups["loss"] == {"total", "cross_entropy", "divergence", "hidden_mse"}
    assert groups["quality"] == {"accuracy"}
    assert groups["kd"] == set(QUALITIES) - {"accuracy"}
    assert {*PHASES, "step"} <= groups["time"]
    assert groups["memory"] == {"process_gib"}
    assert groups["throughput"] == {"tokens_per_second"}  # and no share of the peak, which a CPU's is not known


# ---------------------------------------------------------------------------------------------------- config, hparams
def test_config_and_tuned_settings_are_written(logger: TensorBoardLogger, tmp_path: Path) -> None:
    board = Board(logger)
    board.describe(CONFIG)
    board.finish()
    logger.close()
    assert [path.name for path in (tmp_path / "tb").iterdir() if path.is_dir()] == []  # no run beside the run
    events = _read(tmp_path / "tb")
    shown = markdown_to_safe_html(_text(events, "config")[0])
    assert shown.startswith("<pre><code>output_dir: runs/a\nmodel:\n")
    assert "<b>" not in shown
    assert "<h1>" not in shown

    metadata = events.summary_metadata
    data = {
        tag: plugin_data_pb2.HParamsPluginData.FromString(metadata[tag].plugin_data.content)
        for tag in metadata
        if tag.startswith("_hparams_")
    }
    start = data["_hparams_/session_start_info"].session_start_info.hparams
    values = {name: value.number_value or value.string_value for name, value in start.items()}
    assert values == tuned_settings(CONFIG)
    assert values == {
        "model.lora_rank": 8,
        "kd_ratio.start": 1.0,
        "kd_ratio.end": 0.5,
        "kd_ratio.shape": "cosine",
        "kd_loss": "SkewForwardKL",
        "kd_loss.alpha": 0.1,
        "feature_losses.0": "HiddenStates",
        "feature_losses.0.weight": 2.0,
        "optimizer": "AdamW",
        "optimizer.lr": 1e-3,
        "optimizer.fused": "True",
        "temperature": 2.0,
        "max_steps": 10,
    }
    compared = data["_hparams_/experiment"].experiment.metric_infos
    assert tuple(info.name.tag for info in compared) == COMPARED
    assert data["_hparams_/session_end_info"].session_end_info.status == 1  # STATUS_SUCCESS


# --------------------------------------------------------------------------------------------------------------- texts
NASTY = "| a | `b` **c** <script>alert(1)</script>\n\n# d\n![x](http://e.f/g.png) [h](javascript:i) &lt; &amp; \\| _j_"


def test_texts_stand_side_by_side_as_they_are(logger: TensorBoardLogger, tmp_path: Path) -> None:
    rows = [{"prompt": "Why?", "teacher": NASTY, "student": "Because.\nSo."}, {"prompt": "1. a\x00\r", "student": ""}]
    board = Board(logger)
    board.samples(10, rows)
    board.samples(20, rows[:1])
    board.samples(30, [])
    logger.close()
    texts = _text(_read(tmp_path / "tb"), "samples")
    assert set(texts) == {10, 20}
    shown = markdown_to_safe_html(texts[10])
    assert re.findall(r"<th>(.*?)</th>", shown) == ["prompt", "teacher", "student"]
    cells = [html.unescape(cell.replace("<br>", "\n")) for cell in re.findall(r"<td>(.*?)</td>", shown, re.DOTALL)]
    assert cells == ["Why?", NASTY, "Because.\nSo.", "1. a�", "", ""]
    assert not re.search(r"<(?!/?(table|thead|tbody|tr|th|td|br)\b)", shown)


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=30))
def test_any_text_is_shown_as_it_is(text: str) -> None:
    shown = markdown_to_safe_html(markdown_table([{"a": text, "b": "end"}]))
    assert not re.search(r"<(?!/?(table|thead|tbody|tr|th|td|br)\b)", shown)
    cells = [html.unescape(cell.replace("<br>", "\n")) for cell in re.findall(r"<td>(.*?)</td>", shown, re.DOTALL)]
    assert len(cells) == 2
    printable = [char for char in cells[0] if not char.isspace() and char != "\N{REPLACEMENT CHARACTER}"]
    assert printable == [char for char in text if char.isprintable() and not char.isspace() and char != "\ufffd"]


# ---------------------------------------------------------------------------------------------------------- histograms
def test_histograms_of_weights_and_gradients(logger: TensorBoardLogger, tmp_path: Path) -> None:
    model = llama(num_layers=1, **SIZES)
    model(torch.arange(8)[None]).sum().backward()
    parameters = dict(model.named_parameters())
    untouched = nn.Parameter(torch.full((4,), torch.nan))
    large = nn.Parameter(torch.randn(2**12, 2**10, dtype=torch.bfloat16))
    board = Board(logger)
    board.histograms(3, {**parameters, "nan": untouched, "large": large})
    logger.close()
    events = _read(tmp_path / "tb")
    tags = set(events.Tags()["histograms"])
    assert tags == {f"{kind}/{name}" for kind in ("weights", "gradients") for name in parameters} | {"weights/large"}
    (event,) = events.Histograms("gradients/layers.0.attn.q_proj.weight")
    gradient = model.layers[0].attn.q_proj.weight.grad
    assert event.step == 3
    assert event.histogram_value.num == gradient.numel()
    assert event.histogram_value.sum == pytest.approx(gradient.sum().item(), rel=1e-3, abs=1e-4)
    (event,) = events.Histograms("weights/large")
    assert event.histogram_value.num == 2**20
    assert event.histogram_value.max == pytest.approx(large.max().item(), rel=0.3)


# --------------------------------------------------------------------------------------------------------------- graph
def _snapshot(model: nn.Module) -> Any:
    modes = [(name, module.training, sorted(vars(module))) for name, module in model.named_modules()]
    grads = [
        (name, p.requires_grad, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()
    ]
    return modes, grads, {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()


def _assert_same(one: Any, two: Any) -> None:
    assert one[0] == two[0]
    assert [g[:2] for g in one[1]] == [g[:2] for g in two[1]]
    pairs = [(a[2], b[2]) for a, b in zip(one[1], two[1], strict=True)]
    pairs += [(one[2][name], two[2][name]) for name in two[2]] + [(one[3], two[3])]
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", ["full", "headless", "lora", "recomputed"])
def test_the_graph_of_a_student_leaves_it_alone(kind: str, logger: TensorBoardLogger, tmp_path: Path) -> None:
    lora = {"lora_attn_modules": ["q_proj", "v_proj"], "lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.5}
    model = lora_llama(num_layers=2, **SIZES, **lora) if kind == "lora" else llama(num_layers=2, **SIZES)
    if kind == "lora":
        set_trainable_params(model, get_adapter_params(model))
    if kind != "full":
        _torchtune.Headless(model, recompute_activations=kind == "recomputed")
    model(torch.arange(8)[None]).sum().backward()
    model.layers[0].eval()  # a mode of its own
    before = _snapshot(model)
    Board(logger).graph(model)
    _assert_same(before, _snapshot(model))
    logger.close()
    nodes = {node.name: node for node in _read(tmp_path / "tb").Graph().node}
    scopes = "\n".join(nodes)
    assert "layers" in scopes
    assert "q_proj" in scopes
    shapes = {
        tuple(dim.size for dim in shape.dim)
        for node in nodes.values()
        for shape in node.attr["_output_shapes"].list.shape
    }
    assert (1, 8, 320) in shapes  # the logits, although the head is off
    assert (1, 8, 64) in shapes


class _Untraceable(nn.Module):
    """Its backbone is on a device that traces nothing, as it were."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, tokens_BS: Tensor) -> dict[str, object]:
        return {"logits": self.weight, "what": object()}


def test_a_model_that_cannot_be_traced_is_a_line_on_the_screen(
    logger: TensorBoardLogger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled = llama(num_layers=1, **SIZES)
    compiled.layers[0].compile()
    board = Board(logger)
    for model in (_Untraceable(), compiled):
        board.graph(model)  # type: ignore[arg-type]
        said = capsys.readouterr()
        assert said.err == ""
        (line,) = said.out.splitlines()
        assert line.startswith("no graph in TensorBoard, since the model cannot be traced: ")
    log(logger, "", {"loss/total": 1.0}, 1)
    logger.close()
    assert _read(tmp_path / "tb").Tags()["tensors"] == ["loss/total"]


@pytest.mark.slow
def test_the_graph_of_thirty_blocks_takes_seconds(logger: TensorBoardLogger) -> None:
    model = llama(49152, 30, 9, 3, 576, 8192, intermediate_dim=1536)
    start = time.perf_counter()
    Board(logger).graph(model)
    seconds = time.perf_counter() - start
    print(f"\ngraph of 30 blocks: {seconds:.1f} s")
    assert seconds < 30


# ------------------------------------------------------------------------------------------------------- other loggers
def test_other_loggers_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for other in (StdoutLogger(), DiskLogger(str(tmp_path), filename="log.txt")):
        assert tensorboard_writer(other) is None
        capsys.readouterr()
        board = Board(other)
        board.describe({"unserializable": object()})
        board.samples(1, [{"prompt": "a"}])
        board.histograms(1, {"a": torch.ones(1)})
        board.graph(nn.Module())  # type: ignore[arg-type]
        board.finish()
        assert capsys.readouterr().out == ""
        other.close()
    assert (tmp_path / "log.txt").read_text() == ""


def test_a_config_is_plain_json(logger: TensorBoardLogger) -> None:
    assert json.loads(json.dumps(tuned_settings(CONFIG))) == tuned_settings(CONFIG)
    assert tuned_settings({"optimizer_in_bwd": True, "temperature": None}) == {}
