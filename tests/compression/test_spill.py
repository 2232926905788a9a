"""Tensors on disk until they are written."""

from __future__ import annotations

from pathlib import Path

import torch

from kd_recipes.compression.spill import Spill, spilled


def test_a_dict_whose_tensors_are_in_files(tmp_path: Path) -> None:
    spill = Spill(tmp_path)
    turned = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T
    spill["a.weight"] = turned
    spill["b/../c"] = torch.ones(2)
    assert torch.equal(spill["a.weight"], turned)
    assert spill["a.weight"] is not spill["a.weight"]
    assert (list(spill), len(spill)) == (["a.weight", "b/../c"], 2)
    spill["a.weight"] = torch.zeros(1)
    assert spill["a.weight"].tolist() == [0.0]
    assert len([*tmp_path.iterdir()]) == 2
    del spill["a.weight"]
    spill["d"] = torch.full((1,), 3.0)
    assert {name: tensor.tolist() for name, tensor in spill.items()} == {"b/../c": [1.0, 1.0], "d": [3.0]}
    assert spill.get("a.weight") is None


def test_nothing_is_left(tmp_path: Path) -> None:
    with spilled(tmp_path / "made" / "model") as spill:
        spill["a"] = torch.ones(2)
        assert len([*(tmp_path / "made").rglob("*.safetensors")]) == 1
    assert not [*(tmp_path / "made").iterdir()]
