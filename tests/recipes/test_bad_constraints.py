"""Constraints that a student cannot be held to: refused, with a remedy, before any weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input import Rejected

from kd_recipes.compression import LowRank, Quantization, Sparsification, Step, ToDense, form_of, read_checkpoint
from kd_recipes.errors import ConfigError
from toy import Toys, calibration, lora_section

COMPRESSION = "kd_recipes.compression"
KEEP = {"_component_": f"{COMPRESSION}.KeepZeros"}
GRADUAL = {"_component_": f"{COMPRESSION}.GradualSparsity"}
QAT = {"_component_": f"{COMPRESSION}.QuantizationAwareTraining", "scheme": "gguf_q4_0"}
KEY = "student_constraints"


def _student(checkpoint: Path, constraints: Any) -> dict[str, Any]:
    place = {"checkpoint_dir": str(checkpoint)}
    checkpointer = {**place, "checkpoint_files": ["model.safetensors"], "output_dir": "${output_dir}"}
    return {
        "model": {"_component_": "kd_recipes.models.from_checkpoint", **place},
        "checkpointer": {"_component_": f"{COMPRESSION}.CompressedCheckpointer", **checkpointer},
        KEY: constraints,
    }


def _made(toys: Toys, tmp_path: Path, step: Step) -> Path:
    text = calibration([(torch.arange(40).reshape(2, 20), None)])
    return step.apply(read_checkpoint(toys.student), tmp_path / "made", text).directory


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        ({**QAT, "scheme": "int4_g48"}, f"{KEY}.scheme: got 'int4_g48', wanted a group size that divides 64 inputs"),
        ({**QAT, "embeddings": "int4_g48"}, f"{KEY}.embeddings: got 'int4_g48', wanted a group size that divides 64"),
        ({**QAT, "scheme": "int9"}, f"{KEY}.scheme: got 'int9', wanted gguf_q8_0"),
        ({**QAT, "embeddings": "fp4"}, f"{KEY}.embeddings: got 'fp4', wanted gguf_q8_0"),
        ({**QAT, "overrides": {"*.w2": "nf4"}}, f"{KEY}.overrides.*.w2: got 'nf4', wanted gguf_q8_0"),
        ({**QAT, "overrides": {"layers.2.*": None}}, f"{KEY}.overrides: got ['layers.2.*'], wanted patterns of layers"),
        ({**QAT, "overrides": {"output": "int8"}}, f"{KEY}.overrides: got ['output'], wanted patterns"),  # it is tied
        ([QAT, QAT], f"{KEY}: got 'QuantizationAwareTraining twice'"),
        (KEEP, f"{KEY}._component_: got 'KeepZeros', wanted a student that has zeros to keep"),
        ([QAT, KEEP], f"{KEY}[1]._component_: got 'KeepZeros', wanted a student that has zeros"),
        ({**GRADUAL, "sparsity": 1.0}, f"{KEY}.sparsity: got 1.0, wanted a share of zeros above 0 and below 1"),
        ({**GRADUAL, "sparsity": 0.6, "pattern": "2:4"}, f"{KEY}.sparsity: got 0.6, wanted a share of zeros"),
        ({**GRADUAL, "begin": 0.7, "end": 0.7}, f"{KEY}.end: got [0.7, 0.7], wanted 0 <= begin < end <= 1"),
        ({**GRADUAL, "end": 1.5}, f"{KEY}.end: got [0.0, 1.5], wanted 0 <= begin < end <= 1"),
        ({**GRADUAL, "every_n_steps": 0}, f"{KEY}.every_n_steps: got 0, wanted a whole number above 0"),
        ({**GRADUAL, "pattern": "1:4"}, f"{KEY}.pattern: got '1:4', wanted unstructured or 2:4"),
        ({**GRADUAL, "sparsty": 0.5}, f"{KEY}"),
        (
            [{**QAT, "scheme": "binary_g32"}, GRADUAL],
            f"{KEY}[0].scheme: got 'binary_g32', wanted a scheme that has a z",
        ),
        ({"_component_": "torch.nn.Identity"}, f"{KEY}._component_: got 'torch.nn.Identity', wanted one of KeepZeros"),
        ({"_component_": f"{COMPRESSION}.Sparsification"}, f"{KEY}._component_: got 'kd_recipes.compression.Sparsifi"),
    ],
)
def test_a_dense_student(constraints: Any, message: str, rejected: Rejected, toys: Toys) -> None:
    assert message in rejected(**_student(toys.student, constraints))


def test_all_problems_at_once(rejected: Rejected, toys: Toys) -> None:
    found = rejected(**_student(toys.student, [KEEP, {**QAT, "scheme": "int4_g48"}, {**GRADUAL, "sparsity": 2}]))
    assert [line.split(":")[0] for line in found.splitlines()] == [
        f"  - {KEY}[0]._component_",
        f"  - {KEY}[1].scheme",
        f"  - {KEY}[2].sparsity",
    ]


@pytest.mark.parametrize("constraint", [KEEP, QAT, GRADUAL])
def test_adapters(constraint: Any, rejected: Rejected, toys: Toys) -> None:
    found = rejected(**{"model": lora_section(toys.student), KEY: constraint})
    assert f"{KEY}: got 'a student with adapters', wanted one of which all weights are trained" in found


def test_a_checkpointer_that_cannot_write_codes(rejected: Rejected) -> None:
    found = rejected(**{KEY: QAT})
    assert "checkpointer._component_: got 'torchtune.training.FullModelHFCheckpointer'" in found
    assert "Name kd_recipes.compression.CompressedCheckpointer" in found


@pytest.mark.parametrize(
    ("pattern", "constraints", "message"),
    [
        ("2:4", {**QAT, "scheme": "binary_g32"}, f"{KEY}.scheme: got 'binary_g32', wanted a scheme that has a zero"),
        ("unstructured", [KEEP, {**QAT, "scheme": "binary"}], f"{KEY}[1].scheme: got 'binary', wanted a scheme that"),
        ("2:4", GRADUAL, f"{KEY}.pattern: got 'unstructured', wanted 2:4, as the student's zeros are"),
    ],
)
def test_a_sparse_student(
    pattern: Any, constraints: Any, message: str, rejected: Rejected, toys: Toys, tmp_path: Path
) -> None:
    sparse = _made(toys, tmp_path, Sparsification(pattern=pattern))
    assert message in rejected(**_student(sparse, constraints))


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (GRADUAL, f"{KEY}._component_: got 'sparse training of factors', wanted whole matrices"),
        (QAT, f"{KEY}.scheme: got 'gguf_q4_0', wanted a group size that divides 8 inputs"),
    ],
)
def test_a_student_of_factors(constraint: Any, message: str, rejected: Rejected, toys: Toys, tmp_path: Path) -> None:
    low_rank = _made(toys, tmp_path, LowRank(ratio=0.5))
    assert message in rejected(**_student(low_rank, constraint))


def test_codes_are_no_start_for_gradual_sparsity(rejected: Rejected, toys: Toys, tmp_path: Path) -> None:
    codes = _made(toys, tmp_path, Quantization("int2_g32", method="round"))
    message = rejected(**_student(codes, GRADUAL))
    assert (
        f"{KEY}._component_: got 'a student in int2_g32', wanted one whose weights are not on a lattice yet" in message
    )


def test_a_step_after_quantization_says_so(toys: Toys, tmp_path: Path) -> None:
    """Codes have zeros by chance, which are no reason of their own."""
    codes = _made(toys, tmp_path, Quantization("int2_g32", method="round"))
    with pytest.raises(ConfigError, match="off their lattice"):
        LowRank(ratio=0.5).check(form_of(read_checkpoint(codes)))
    dense = tmp_path / "dense"
    ToDense().apply(read_checkpoint(codes), dense, calibration([]))
    assert form_of(read_checkpoint(codes)).zeros == form_of(read_checkpoint(dense)).zeros == "none"
