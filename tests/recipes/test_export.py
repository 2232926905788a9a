"""The export recipe as a user runs it, on toy students."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from kd_recipes.compression import LowRank, Quantization, read_checkpoint
from kd_recipes.config import find_config
from kd_recipes.entry import run_recipe
from toy import Toys, calibration

TUNE = Path(sys.executable).with_name("tune")
TEXT = calibration([(torch.arange(3, 67)[None], None)])


def words(student: Path, output_dir: Path, formats: str, *more: str) -> list[str]:
    return [
        *("--config", str(find_config("quickstart_export"))),
        *(f"checkpoint_dir={student}", f"output_dir={output_dir}", f"formats=[{formats}]"),
        *("prompts=['the cat sat','on the mat']", "num_new_tokens=8", "max_seq_len=64", *more),
    ]


def export(student: Path, output_dir: Path, formats: str) -> dict[str, Any]:
    assert run_recipe("export", words(student, output_dir, formats)) == 0
    found: dict[str, Any] = json.loads((output_dir / "export.json").read_text())["formats"]
    return found


def test_tune_runs_it(toys: Toys, tmp_path: Path) -> None:
    command = [str(TUNE), "run", "kd_recipes.export", *words(toys.student, tmp_path / "out", "hf,torch_export")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "export.json").read_text())["formats"]
    assert found.keys() == {"student", "hf", "torch_export"}
    for name in ("hf", "torch_export"):
        assert found[name]["kl"] < 1e-8
        assert found[name]["agreement"] == 1.0
        assert found[name]["same_continuations"] == 2
        assert found[name]["decode_tokens_per_second"] > 0
    assert found["torch_export"]["num_bytes"] == (tmp_path / "out" / "model.pt2").stat().st_size
    table = (tmp_path / "out" / "export.md").read_text()
    assert table in done.stdout
    assert [line.split(" |")[0] for line in table.splitlines()[2:]] == ["| student", "| hf", "| torch_export"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["export.json", "export.md", "hf", "model.pt2"]


def test_what_is_there_is_not_written_again(toys: Toys, tmp_path: Path) -> None:
    export(toys.student, tmp_path / "out", "hf")
    before = (tmp_path / "out" / "hf" / "model.safetensors").stat()
    assert export(toys.student, tmp_path / "out", "hf,hf_fp16").keys() == {"student", "hf", "hf_fp16"}
    assert (tmp_path / "out" / "hf" / "model.safetensors").stat().st_ino == before.st_ino
    export(toys.teacher, tmp_path / "out", "hf")  # another student
    assert (tmp_path / "out" / "hf" / "model.safetensors").stat().st_ino != before.st_ino


def test_codes_and_factors_become_what_transformers_loads(toys: Toys, tmp_path: Path) -> None:
    source = read_checkpoint(toys.student)
    coded = Quantization("int4_g32", None, method="round").apply(source, tmp_path / "coded", TEXT)
    assert export(coded.directory, tmp_path / "of_codes", "hf")["hf"]["kl"] < 1e-8
    factored = LowRank(ratio=0.5, whiten=False, multiple_of=4).apply(source, tmp_path / "factored", TEXT)
    found = export(factored.directory, tmp_path / "of_factors", "hf_fp32,torch_export")
    assert found["hf_fp32"]["kl"] < 1e-8
    assert found["torch_export"]["kl"] < 1e-8


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_llama_cpp_answers_as_the_student_does(toys: Toys, tmp_path: Path) -> None:
    found = export(toys.student, tmp_path / "out", "gguf_f32,gguf_q8_0,gguf_q4_k_m")
    assert found["gguf_f32"]["kl"] < 1e-4
    assert found["gguf_q8_0"]["kl"] < 0.05


def test_what_cannot_be_exported_is_said_before_anything_is_written(
    toys: Toys, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run_recipe("export", words(toys.student, out, "hf,onnx")) == 2
    assert "formats: got 'onnx', wanted some of hf, hf_fp32" in capfd.readouterr().err
    factored = LowRank(ratio=0.5, whiten=False).apply(read_checkpoint(toys.student), tmp_path / "factored", TEXT)
    assert run_recipe("export", words(factored.directory, out, "hf,gguf_trained")) == 2
    assert "products of factors" in capfd.readouterr().err
    assert not out.exists()
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert run_recipe("export", words(toys.student, out, "hf")) == 2
    assert "a new or empty directory" in capfd.readouterr().err


def test_a_file_that_answers_otherwise_is_an_error(
    toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from kd_recipes.exporting.formats import HuggingFace

    def another(self: Any, source: Any, path: Path, max_seq_len: int) -> None:
        write(self, read_checkpoint(toys.wide), path, max_seq_len)

    write = HuggingFace.write
    monkeypatch.setattr(HuggingFace, "write", another)
    assert run_recipe("export", words(toys.student, tmp_path / "out", "hf")) == 1
    assert "do not answer as it does: hf (KL" in capfd.readouterr().err


def test_a_file_that_cannot_be_loaded_is_an_error(
    toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from kd_recipes.exporting.formats import HuggingFace

    monkeypatch.setattr(HuggingFace, "write", lambda self, source, path, max_seq_len: path.mkdir(parents=True))
    assert run_recipe("export", words(toys.student, tmp_path / "out", "hf")) == 1
    assert "cannot be loaded by the program it is for" in capfd.readouterr().err
