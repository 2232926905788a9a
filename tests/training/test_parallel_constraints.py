"""Constraints in two processes, whose weights are split: the same student as in one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kd_recipes.compression import Sparsification, read_checkpoint, sections
from kd_recipes.lattices import Scheme
from kd_recipes.parts import load_model
from toy import Toys, calibration, logged, run_tune, saved_weights

WriteConfig = Callable[..., Path]
COMPRESSION = "kd_recipes.compression"
KEEP = {"_component_": f"{COMPRESSION}.KeepZeros"}
GRADUAL = {"_component_": f"{COMPRESSION}.GradualSparsity", "pattern": "2:4"}
QAT = {
    "_component_": f"{COMPRESSION}.QuantizationAwareTraining",
    "scheme": "gguf_q4_0",
    "embeddings": "gguf_q8_0",
}
SGD = {"_component_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}


def _weights(directory: Path) -> dict[str, Tensor]:
    cfg = sections(directory)
    device = torch.device("cpu")
    return load_model("model", cfg.model, cfg.checkpointer, dtype=torch.float32, device=device).model.state_dict()


@pytest.fixture
def run(toys: Toys, write_config: WriteConfig, tmp_path: Path) -> Callable[..., Path]:
    """``run(num_processes, *overrides, **settings)``: where the run is; four samples a step, of a sparse student."""
    sparse = tmp_path / "sparse"
    text = calibration([(torch.arange(40).reshape(2, 20), None)])
    Sparsification(pattern="2:4").apply(read_checkpoint(toys.student), sparse, text)

    def start(num_processes: int, *overrides: str, dense: bool = False, **settings: Any) -> Path:
        directory = tmp_path / f"{num_processes}"
        directory.mkdir(exist_ok=True)
        place = {"checkpoint_dir": str(toys.student if dense else sparse)}
        checkpointer = {**place, "checkpoint_files": ["model.safetensors"], "output_dir": "${output_dir}"}
        student = {
            "model": {"_component_": "kd_recipes.models.from_checkpoint", **place},
            "checkpointer": {"_component_": f"{COMPRESSION}.CompressedCheckpointer", **checkpointer},
        }
        defaults = {"optimizer": SGD, "clip_grad_norm": 0.5, "batch_size": 4 // num_processes, "max_steps": 4}
        config = write_config(directory, **{**student, **defaults, **settings})
        launcher = [] if num_processes == 1 else ["--nproc_per_node", str(num_processes)]
        done = run_tune("run", *launcher, "kd_recipes.distill", "--config", str(config), *overrides, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        return directory / "run"

    return start


def _assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (got[name] - tensor).norm() <= tolerance * tensor.norm(), name


def test_zeros_are_kept_by_two_processes(run: Callable[..., Path], tmp_path: Path) -> None:
    one, two = run(1, student_constraints=KEEP), run(2, student_constraints=KEEP)
    _assert_close(saved_weights(two), saved_weights(one), 1e-5)
    before, after = load_file(tmp_path / "sparse" / "model.safetensors"), load_file(two / "final" / "model.safetensors")
    linears = [name for name, weight in before.items() if ".layers." in name and weight.ndim == 2]
    assert len(linears) == 14
    assert all(torch.equal(before[name] == 0, after[name] == 0) for name in linears)
    assert not any(torch.equal(before[name], after[name]) for name in linears)


@pytest.mark.parametrize("constraint", [GRADUAL, {**GRADUAL, "pattern": "unstructured", "sparsity": 0.6}])
def test_connections_are_taken_by_two_processes(constraint: Any, run: Callable[..., Path]) -> None:
    runs = [run(number, dense=True, student_constraints=constraint) for number in (1, 2)]
    one, two = (load_file(where / "final" / "model.safetensors") for where in runs)
    linears = [name for name, weight in one.items() if ".layers." in name and weight.ndim == 2]
    equal = torch.cat([((one[name] == 0) == (two[name] == 0)).flatten() for name in linears])
    assert equal.float().mean() > 0.999
    share = torch.cat([(two[name] == 0).flatten() for name in linears]).float().mean()
    assert share == pytest.approx(constraint.get("sparsity", 0.5), abs=0.01)  # of whole rows of 64 or 96
    assert logged(runs[1])[4]["compression/sparsity"] == pytest.approx(float(share), abs=1e-3)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_same_codes_from_two_processes(dtype: str, run: Callable[..., Path]) -> None:
    settings = {"student_constraints": [KEEP, QAT], "dtype": dtype}
    one, two = run(1, **settings), run(2, **settings)
    first, second = (load_file(where / "final" / "model.safetensors") for where in (one, two))
    assert first.keys() == second.keys()
    assert sum(name.endswith(".codes") for name in first) == 15
    if dtype == "fp32":
        equal = [(first[name] == second[name]).flatten() for name in first if name.endswith(".codes")]
        assert torch.cat(equal).float().mean() > 0.999
    shipped = _weights(two / "final")
    _assert_close(shipped, _weights(one / "final"), 1e-3 if dtype == "fp32" else 0.1)
    trained = saved_weights(two)
    for name, weight in trained.items():  # what was trained, on its lattice
        if weight.ndim == 2:
            scheme = Scheme.parse(QAT["embeddings" if name.startswith("tok") else "scheme"])
            step = weight.unflatten(1, (-1, 32)).abs().amax(-1) / scheme.code_range[1]
            assert ((shipped[name] - weight).unflatten(1, (-1, 32)).abs() <= 2 * step[..., None]).all(), name
    assert all((shipped[name] == 0)[weight == 0].all() for name, weight in trained.items() if "layers" in name)


def test_recomputed_and_resumed_in_two_processes(run: Callable[..., Path], tmp_path: Path) -> None:
    settings = {"student_constraints": [KEEP, QAT], "enable_activation_checkpointing": True}
    whole = load_file(run(2, **settings) / "final" / "model.safetensors")
    parts = tmp_path / "parts"
    run(2, "max_steps=2", f"output_dir={parts}", **settings)
    run(2, f"output_dir={parts}", "resume_from_checkpoint=True", **settings)
    resumed = load_file(parts / "final" / "model.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
