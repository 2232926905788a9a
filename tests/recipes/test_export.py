"""The export recipe as a user runs it, on toy students."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input import WriteConfig
from safetensors.torch import load_file, save_file

from kd_recipes.compression import LowRank, Quantization, ToDense, read_checkpoint
from kd_recipes.config import find_config
from kd_recipes.entry import run_recipe
from kd_recipes.errors import RunError
from kd_recipes.exporting.formats import FORMATS, GGUF
from toy import Toys, calibration, lora_section, save_model, save_tokenizer

needs_llama_cpp = pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
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


@pytest.fixture(scope="module")
def exported(toys: Toys, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished export, and what it has printed."""
    output_dir = tmp_path_factory.mktemp("exported") / "out"
    command = [str(TUNE), "run", "kd_recipes.export", *words(toys.student, output_dir, "hf,torch_export")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "archive file" not in done.stderr  # torch warns of a package that is not named .pt2
    return output_dir, done.stdout


def test_each_file_has_a_limit(toys: Toys, tmp_path: Path) -> None:
    dense = read_checkpoint(toys.student)
    assert all(0 < form.most_kl(dense) <= 4 for form in FORMATS.values())
    assert FORMATS["gguf_q8_0"].most_kl(dense) == 0.05
    assert {FORMATS[name].most_kl(dense) for name in ("gguf_q4_0", "gguf_q4_k_m", "executorch_8da4w")} == {4.0}
    coded = Quantization("8da4w_g32", None, method="round").apply(dense, tmp_path / "coded", TEXT)
    assert FORMATS["executorch_8da4w"].most_kl(coded) == 0.05
    assert FORMATS["hf"].most_kl(coded) == 0.05  # it rounds inputs
    some = Quantization("8da4w_g32", overrides={"*.w2": None}, method="round").apply(dense, tmp_path / "some", TEXT)
    assert FORMATS["executorch_8da4w"].most_kl(some) == 4.0  # of what is on no lattice nothing is known


def test_tune_runs_it(exported: tuple[Path, str]) -> None:
    output_dir, said = exported
    found = json.loads((output_dir / "export.json").read_text())["formats"]
    assert found.keys() == {"student", "hf", "torch_export"}
    for name in ("hf", "torch_export"):
        assert found[name]["kl"] < 1e-8
        assert found[name]["agreement"] == 1.0
        assert found[name]["same_continuations"] == 2
        assert found[name]["decode_tokens_per_second"] > 0
        assert found[name]["peak_memory_bytes"] > found[name]["num_bytes"] / 10
    assert found["torch_export"]["num_bytes"] == (output_dir / "model.pt2").stat().st_size
    table = (output_dir / "export.md").read_text()
    assert table in said
    assert found["hf"]["same_tokens"] is True
    assert found["torch_export"]["same_tokens"] is None
    reference = found["student"]["decode_tokens_per_second"]
    cell = f"{found['hf']['decode_tokens_per_second']:.1f} ({found['hf']['decode_tokens_per_second'] / reference:.2f})"
    assert "| prefill, tokens/s | decode, tokens/s | peak, MB |" in table
    assert f" | {cell} | " in table
    assert [line.split(" |")[0] for line in table.splitlines()[2:]] == ["| student", "| hf", "| torch_export"]
    assert sorted(path.name for path in output_dir.iterdir()) == ["export.json", "export.md", "hf", "model.pt2"]


def test_what_is_there_is_not_written_again_and_what_answers_otherwise_is_an_error(
    toys: Toys,
    exported: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from kd_recipes.exporting.formats import HuggingFace

    def another(self: Any, source: Any, path: Path, max_seq_len: int) -> None:
        write(self, read_checkpoint(toys.wide), path, max_seq_len)

    write = HuggingFace.write
    monkeypatch.setattr(HuggingFace, "write", another)
    out = shutil.copytree(exported[0], tmp_path / "out")
    before = (out / "hf" / "model.safetensors").stat().st_ino
    assert run_recipe("export", words(toys.student, out, "hf,hf_fp16")) == 1
    said = capfd.readouterr().err
    assert "do not answer as it does: hf_fp16 (KL" in said
    assert ", limit 0.05). What is removed is written again" in said
    assert (out / "hf" / "model.safetensors").stat().st_ino == before


def test_another_chat_template_is_another_student_and_nothing_stale_stays_beside(
    toys: Toys, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    student, out = shutil.copytree(toys.student, tmp_path / "student"), tmp_path / "out"
    export(student, out, "hf,hf_fp16,hf_bf16")
    (out / "hf_bf16" / "README.md").write_text("what I found out about it")
    (out / "notes.txt").write_text("mine")
    (out / "model.pt2").write_bytes(b"mine, too")
    capfd.readouterr()
    (student / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert export(student, out, "hf,torch_export").keys() == {"student", "hf", "torch_export"}
    said = capfd.readouterr()
    assert (out / "hf" / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    assert f"{out / 'hf_fp16'} removed: it is of another student" in said.out + said.err
    assert f"{out / 'model.pt2'} is not as export has written it: kept as model.pt2.kept-1" in said.out + said.err
    assert (out / "model.pt2.kept-1").read_bytes() == b"mine, too"
    assert (out / "hf_bf16.kept-1" / "README.md").read_text() == "what I found out about it"
    names = {"export.json", "export.md", "hf", "hf_bf16.kept-1", "model.pt2", "model.pt2.kept-1", "notes.txt"}
    assert {path.name for path in out.iterdir()} == names


def test_a_copy_of_the_student_is_the_same_and_one_that_fails_changes_nothing(
    toys: Toys,
    exported: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail(self: Any, source: Any, path: Path, max_seq_len: int) -> None:
        raise RunError("no more")

    monkeypatch.setattr("kd_recipes.exporting.formats.HuggingFace.write", fail)
    out = shutil.copytree(exported[0], tmp_path / "out")
    before = {path: path.stat() for path in out.rglob("*")}
    copy = shutil.copytree(toys.student, tmp_path / "copy", copy_function=shutil.copyfile)  # with times of its own
    assert run_recipe("export", words(toys.wide, out, "hf")) == 1
    assert "no more" in capfd.readouterr().err
    assert {path: path.stat().st_ino for path in out.rglob("*")} == {p: before[p].st_ino for p in before}
    assert export(copy, out, "hf,torch_export").keys() == {"student", "hf", "torch_export"}
    assert (out / "model.pt2").stat().st_ino == before[out / "model.pt2"].st_ino


def test_other_prompts_measure_again_and_write_nothing_again(
    toys: Toys, exported: tuple[Path, str], tmp_path: Path
) -> None:
    out = shutil.copytree(exported[0], tmp_path / "out")
    before = (out / "hf" / "model.safetensors").stat().st_ino
    assert run_recipe("export", [*words(toys.student, out, "hf"), "prompts=['a cat']"]) == 0
    found = json.loads((out / "export.json").read_text())
    assert found["formats"].keys() == {"student", "hf"}
    assert found["files"].keys() == {"hf", "torch_export"}  # still there, and known for the day of another student
    assert found["formats"]["hf"]["num_continuations"] == 1
    assert (out / "hf" / "model.safetensors").stat().st_ino == before


def test_what_a_killed_export_has_left_is_removed(toys: Toys, exported: tuple[Path, str], tmp_path: Path) -> None:
    """A process that no longer is there: its number is above all that Linux gives."""
    out = shutil.copytree(exported[0], tmp_path / "out")
    (out / ".q4_k_m.gguf.scratch-4194305").mkdir()
    (out / ".q4_k_m.gguf.scratch-4194305" / "whole.gguf").write_bytes(b"GGUF")
    (out / ".f16.gguf.tmp-4194305").write_bytes(b"GGUF")
    export(toys.student, out, "hf")
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


def test_a_record_that_is_not_one_is_refused(toys: Toys, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "export.json").write_text("[]")
    assert run_recipe("export", words(toys.student, tmp_path, "hf")) == 2
    assert "wanted the record of an export" in capfd.readouterr().err


def test_adapters_alone_are_refused_with_the_way_to_merge_them(
    toys: Toys, write_config: WriteConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides = {"model": lora_section(toys.student), "save_adapter_weights_only": True, "max_steps": 1}
    config = write_config(tmp_path, **overrides)
    assert run_recipe("distill", ["--config", str(config)]) == 0
    final = tmp_path / "run" / "final"
    assert run_recipe("export", words(final, tmp_path / "out", "hf")) == 2
    said = capfd.readouterr().err
    remedy = "resume_from_checkpoint=True save_adapter_weights_only=False"
    assert f"It holds adapters alone. Run the distillation again with {remedy}" in said
    assert run_recipe("distill", ["--config", str(config), *remedy.split()]) == 0
    assert export(final, tmp_path / "out", "hf")["hf"]["kl"] < 1e-8


def test_a_tokenizer_that_gguf_cannot_hold_is_refused_once_before_anything_is_written(
    toys: Toys, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    student = shutil.copytree(toys.student, tmp_path / "student")
    tokenizer = json.loads((student / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"String": "a"}, "behavior": "Isolated", "invert": False}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, tokenizer["pre_tokenizer"]]}
    (student / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert run_recipe("export", words(student, tmp_path / "out", "hf,gguf_f16,gguf_q8_0,gguf_q4_k_m")) == 2
    assert capfd.readouterr().err.count("another way to split text") == 1
    assert not (tmp_path / "out").exists()


def test_codes_and_factors_become_what_transformers_loads(
    toys: Toys, exported: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = read_checkpoint(toys.student)
    coded = Quantization("int4_g32", None, method="round").apply(source, tmp_path / "coded", TEXT)
    out = shutil.copytree(exported[0], tmp_path / "of_codes")  # of another student: written again
    found = export(coded.directory, out, "hf")
    assert found.keys() == {"student", "hf"}
    assert found["hf"]["kl"] < 1e-8
    factored = LowRank(ratio=0.5, whiten=False, multiple_of=4).apply(source, tmp_path / "factored", TEXT)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    found = export(factored.directory, tmp_path / "of_factors", "hf_factors")
    assert found["hf_factors"]["kl"] < 1e-8
    assert found["hf_factors"]["num_bytes"] < found["student"]["num_bytes"] * 1.1


@needs_llama_cpp
def test_llama_cpp_answers_as_the_student_does(toys: Toys, tmp_path: Path) -> None:
    found = export(toys.student, tmp_path / "out", "gguf_f32,gguf_bf16,gguf_q8_0,gguf_q4_k_m")
    assert found["gguf_f32"]["kl"] < 1e-4
    assert found["gguf_f32"]["agreement"] == 1.0
    assert found["gguf_q8_0"]["kl"] < 0.05
    assert found["gguf_q8_0"]["num_bytes"] < found["gguf_bf16"]["num_bytes"] < found["gguf_f32"]["num_bytes"]
    assert {found[name]["same_tokens"] for name in found if name != "student"} == {True}


@needs_llama_cpp
@pytest.mark.parametrize("scheme", ["gguf_q8_0", "gguf_q4_0", "ternary_g256", "binary_g128"])
def test_llama_cpp_computes_with_what_was_trained(toys: Toys, tmp_path: Path, scheme: str) -> None:
    coded = Quantization(scheme, "gguf_q8_0", method="round")
    source = coded.apply(read_checkpoint(toys.wide), tmp_path / "coded", TEXT)
    found = export(source.directory, tmp_path / "out", "gguf_trained,gguf_f32")
    assert found["gguf_f32"]["kl"] < 1e-4
    assert found["gguf_trained"]["kl"] < 0.05  # it rounds what comes into a layer
    assert found["gguf_trained"]["agreement"] > 0.7
    assert found["gguf_trained"]["num_bytes"] < found["gguf_f32"]["num_bytes"] / 2


@needs_llama_cpp
@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("qwen2", {}),
        ("qwen2", {"head_dim": 24, "tie_word_embeddings": False}),  # pruned heads: written as a Llama with biases
        ("llama", {"head_dim": 24}),
        ("llama", {"rope_scaling": LLAMA3_ROPE, "max_position_embeddings": 16_384}),
    ],
)
def test_llama_cpp_has_the_same_architecture(tmp_path: Path, model_type: str, settings: dict[str, Any]) -> None:
    save_model(tmp_path / "model", model_type, **settings)
    save_tokenizer(tmp_path / "model")
    assert export(tmp_path / "model", tmp_path / "out", "gguf_f32")["gguf_f32"]["kl"] < 1e-4


@pytest.mark.skipif(find_spec("executorch") is None, reason="executorch is not installed")
def test_executorch_answers_as_the_student_does(toys: Toys, tmp_path: Path) -> None:
    found = export(toys.student, tmp_path / "out", "executorch_fp32,executorch_8da4w")
    assert found["executorch_fp32"]["kl"] < 1e-6
    assert found["executorch_fp32"]["same_continuations"] == 2
    assert found["executorch_8da4w"]["num_bytes"] < found["executorch_fp32"]["num_bytes"] / 2


@pytest.mark.skipif(find_spec("executorch") is None, reason="executorch is not installed")
def test_executorch_computes_with_what_was_trained(toys: Toys, tmp_path: Path) -> None:
    coded = Quantization("8da4w_g32", "8da8w", method="round")
    source = coded.apply(read_checkpoint(toys.student), tmp_path / "coded", TEXT)
    assert export(source.directory, tmp_path / "out", "executorch_8da4w")["executorch_8da4w"]["kl"] < 0.01


@pytest.mark.slow
def test_a_compiled_graph_answers_as_the_student_does(toys: Toys, tmp_path: Path) -> None:
    assert export(toys.student, tmp_path / "out", "aoti")["aoti"]["kl"] < 1e-8


def test_what_is_not_installed_is_said_with_the_commands_that_install_it(
    toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kd_recipes.exporting.formats.find_spec", lambda name: None)
    assert run_recipe("export", words(toys.student, tmp_path / "out", "gguf_f16,executorch_8da4w")) == 2
    said = capfd.readouterr().err
    wanted = "wanted the packages gguf, llama_cpp. pip install gguf, and pip install llama-cpp-python"
    assert f"formats: got 'gguf_f16', {wanted}" in said
    assert "pip install --no-deps executorch==" in said
    assert not (tmp_path / "out").exists()


def test_what_executorch_needs_and_no_deps_has_left_out_is_said(
    toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def find(name: str) -> object:
        if name == "ruamel.yaml":
            raise ModuleNotFoundError  # as where there is no ruamel at all
        return None if name == "flatbuffers" else name

    monkeypatch.setattr("kd_recipes.exporting.formats.find_spec", find)
    assert run_recipe("export", words(toys.student, tmp_path / "out", "hf,executorch_fp32")) == 2
    commands = "pip install flatbuffers ruamel.yaml sortedcontainers tabulate"
    wanted = f"formats: got 'executorch_fp32', wanted the packages flatbuffers, ruamel.yaml. {commands}\n"
    assert wanted in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@needs_llama_cpp
def test_llama_cpp_rounds_what_a_later_export_knows_how_to_remove(
    toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    given = []

    def refuse(whole: bytes, unfinished: bytes, settings: Any) -> int:
        given.append(Path(whole.decode()).relative_to(tmp_path).as_posix())
        return 1

    monkeypatch.setattr("llama_cpp.llama_model_quantize", refuse)
    assert run_recipe("export", words(toys.student, tmp_path / "out", "gguf_q4_k_m")) == 1
    assert given == [f"out/.q4_k_m.gguf.scratch-{os.getpid()}/whole.gguf"]
    assert "llama.cpp could not write q4_k_m.gguf" in capfd.readouterr().err


@needs_llama_cpp
@pytest.mark.parametrize("name", ["gguf_q8_0", "gguf_q4_0"])
def test_a_broken_file_is_an_error_however_few_its_bits(
    toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    def damaged(self: Any, source: Any, path: Path, max_seq_len: int) -> None:
        weights = load_file(source.directory / "model.safetensors")
        weights["model.norm.weight"] *= -50  # what was likeliest is least likely
        broken = shutil.copytree(source.directory, tmp_path / "broken")
        save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
        write(self, read_checkpoint(broken), path, max_seq_len)

    write = GGUF.write
    monkeypatch.setattr(GGUF, "write", damaged)
    assert run_recipe("export", words(toys.student, tmp_path / "out", name)) == 1
    assert f"do not answer as it does: {name} (KL" in capfd.readouterr().err


def test_hf_of_products_of_factors_keeps_their_dtype(toys: Toys, tmp_path: Path) -> None:
    source = read_checkpoint(toys.student)
    low_rank = LowRank(ratio=0.5, whiten=False, multiple_of=4)
    for name in ("fp32", "bf16"):
        dense = ToDense(dtype=name).apply(source, tmp_path / name, TEXT)  # type: ignore[arg-type]
        factored = low_rank.apply(dense, tmp_path / f"factored_{name}", TEXT)
        FORMATS["hf"].write(factored, tmp_path / f"hf_{name}", 64)
        written = read_checkpoint(tmp_path / f"hf_{name}")
        assert {spec.dtype for spec in written.specs} == {spec.dtype for spec in factored.specs}
        assert written.config["dtype"] == {"fp32": "float32", "bf16": "bfloat16"}[name]


def test_prompts_that_do_not_fit_are_refused(toys: Toys, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_recipe("export", words(toys.student, tmp_path / "out", "hf", "max_seq_len=10")) == 2
    assert "which with num_new_tokens are at most 10" in capfd.readouterr().err


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


def test_a_file_that_cannot_be_loaded_is_an_error(
    toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from kd_recipes.exporting.formats import Graph

    def damaged(self: Any, source: Any, path: Path, max_seq_len: int) -> None:
        path.write_bytes(b"PK")

    monkeypatch.setattr(Graph, "write", damaged)
    assert run_recipe("export", words(toys.student, tmp_path / "out", "torch_export")) == 1
    assert "cannot be loaded by the program it is for" in capfd.readouterr().err
