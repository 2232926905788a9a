"""The evaluation recipe on toy checkpoints, against transformers' own logits."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from kd_recipes import _torchtune
from kd_recipes.compression import read_checkpoint, sections
from kd_recipes.entry import run_recipe
from kd_recipes.exporting.gguf import write_gguf
from toy import Toys, run_tune, sentence, text_section, write_jsonl


@pytest.fixture
def config(toys: Toys, tmp_path: Path) -> Path:
    cfg = {
        "output_dir": str(tmp_path / "evaluation"),
        "models": {"student": str(toys.student), "teacher": str(toys.teacher)},
        "reference": "teacher",
        "tokenizer": {"_component_": "kd_recipes.tokenizers.hf_tokenizer", "path": str(toys.student)},
        "dataset": text_section(toys.data / "text.jsonl", tmp_path / "cache"),
        "batch_size": 2,
        "prompts": ["the cat", "a dog"],
        "max_new_tokens": 5,
        "device": "cpu",
        "dtype": "fp32",
    }
    OmegaConf.save(OmegaConf.create(cfg), tmp_path / "evaluate.yaml")
    return tmp_path / "evaluate.yaml"


def _oracle(toys: Toys) -> tuple[float, float, float]:
    """Perplexity of the student, its KL from the teacher and their agreement, document by document."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(toys.student)
    student, teacher = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (toys.student, toys.teacher))
    ce = kl = agree = count = 0.0
    for line in (toys.data / "text.jsonl").read_text().splitlines():
        ids = tokenizer(json.loads(line)["text"], add_special_tokens=False).input_ids
        ids = torch.tensor([[*ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            q, p = (F.log_softmax(model(ids).logits[0, :-1], -1) for model in (student, teacher))
        ce += F.nll_loss(q, ids[0, 1:], reduction="sum").item()
        kl += F.kl_div(q, p, reduction="sum", log_target=True).item()
        agree += (p.argmax(-1) == q.argmax(-1)).sum().item()
        count += len(q)
    return math.exp(ce / count), kl / count, agree / count


def test_equals_what_transformers_logits_give(config: Path, toys: Toys, tmp_path: Path) -> None:
    result = run_tune("run", "kd_recipes.evaluate", "--config", str(config), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    student, teacher = found["models"]
    perplexity, kl, agreement = _oracle(toys)
    text = student["text"]
    assert math.exp(text["cross_entropy"]["mean"]) == pytest.approx(perplexity, rel=1e-4)
    assert text["kl"]["mean"] == pytest.approx(kl, rel=1e-4)
    assert text["agreement"]["mean"] == pytest.approx(agreement, abs=1e-6)
    assert text["num_bytes"] == sum(len(_text_after_first_token(toys, line)) for line in _lines(toys))
    assert text["change"]["low"] < text["change"]["mean"] < text["change"]["high"]
    assert teacher["text"]["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    assert teacher["text"]["agreement"]["mean"] == 1
    assert teacher["text"]["change"] is None
    assert student["cost"]["num_bytes"] == (toys.student / "model.safetensors").stat().st_size
    assert student["cost"]["decode_tokens_per_second"] > 0
    assert [sample["prompt"] for sample in student["samples"]] == ["the cat", "a dog"]
    assert not (tmp_path / "evaluation" / ".reference").exists()
    assert "student" in (tmp_path / "evaluation" / "evaluation.md").read_text()
    assert "<svg" in (tmp_path / "evaluation" / "report.html").read_text()


def _lines(toys: Toys) -> list[str]:
    return [json.loads(line)["text"] for line in (toys.data / "text.jsonl").read_text().splitlines()]


def _text_after_first_token(toys: Toys, text: str) -> bytes:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(toys.student)
    return str(tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids[1:])).encode()


def _results(tmp_path: Path) -> dict[str, dict[str, Any]]:
    found = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    return {model["name"]: model for model in found["models"]}


def test_a_gguf_file_and_a_checkpoint_of_torchtunes_are_the_model_they_hold(
    config: Path, toys: Toys, tmp_path: Path
) -> None:
    found = sections(toys.student)
    write_gguf(read_checkpoint(toys.student), tmp_path / "student.gguf", "f32")
    _, state = _torchtune.load_checkpoint(found.checkpointer)
    torch.save(state, tmp_path / "student.pt")
    cfg = OmegaConf.load(config)
    checkpointer = {
        "_component_": "torchtune.training.FullModelTorchTuneCheckpointer",
        **{"checkpoint_dir": str(tmp_path), "checkpoint_files": ["student.pt"], "output_dir": str(tmp_path / "out")},
        "model_type": found.checkpointer.model_type,
    }
    cfg.models |= {
        "gguf": str(tmp_path / "student.gguf"),
        "torchtune": {"model": found.model, "checkpointer": checkpointer},
    }
    OmegaConf.save(cfg, config)
    assert run_recipe("evaluate", ["--config", str(config)]) == 0
    results = _results(tmp_path)
    for name in ("gguf", "torchtune"):
        for part in ("text", "samples", "diversity"):
            assert results[name][part] == results["student"][part], part
    assert results["gguf"]["cost"]["num_bytes"] == (tmp_path / "student.gguf").stat().st_size
    imported = tmp_path / "evaluation" / "imported" / "gguf" / "model.safetensors"
    inode = imported.stat().st_ino
    assert run_recipe("evaluate", ["--config", str(config), "max_batches=1"]) == 0
    assert imported.stat().st_ino == inode  # imported once


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("models", "models.bad: got 'models'"),
        ("missing.gguf", "models.bad: got 'missing.gguf', wanted a file that exists"),
        ("missing", "models.bad: got 'missing'"),
        ({"model": {}}, "sections `model` and `checkpointer`"),
        ({"model": {"_component_": "torch.nn.Linear"}, "checkpointer": {}}, "models.bad.checkpointer"),
    ],
)
def test_what_is_no_model_is_refused(config: Path, model: Any, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = OmegaConf.load(config)
    cfg.models.bad = model
    OmegaConf.save(cfg, config)
    assert run_recipe("evaluate", ["--config", str(config)]) == 2
    assert said in capsys.readouterr().err


def test_what_is_done_is_not_done_again(config: Path, toys: Toys, tmp_path: Path) -> None:
    assert run_recipe("evaluate", ["--config", str(config)]) == 0
    first = _results(tmp_path)
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "evaluation" / "models").iterdir()}
    (tmp_path / "evaluation" / "models" / "student.json").write_text("{")  # cut off while it was written
    assert run_recipe("evaluate", ["--config", str(config), f"models.again={toys.student}"]) == 0
    second = _results(tmp_path)
    now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "evaluation" / "models").iterdir()}
    assert now["teacher.json"] == times["teacher.json"]
    assert now["student.json"] > times["student.json"]
    assert second["teacher"] == first["teacher"]
    for name in ("student", "again"):
        for part in ("text", "samples", "diversity"):
            assert second[name][part] == first["student"][part], part
    assert run_recipe("evaluate", ["--config", str(config), "max_batches=1"]) == 0
    assert _results(tmp_path)["teacher"]["text"]["num_tokens"] < first["teacher"]["text"]["num_tokens"]


def test_what_was_asked_otherwise_is_asked_again(config: Path, toys: Toys, tmp_path: Path) -> None:
    """The text, the reference and its weights may change under the same config; each result says what it is of."""
    cfg = OmegaConf.load(config)
    text, teacher = tmp_path / "text.jsonl", tmp_path / "teacher"
    shutil.copyfile(toys.data / "text.jsonl", text)
    shutil.copytree(toys.teacher, teacher)
    cfg.dataset = text_section(text, tmp_path / "cache")
    cfg.models.teacher, cfg.prompts, cfg.num_prompts = str(teacher), None, 0
    OmegaConf.save(cfg, config)

    def found(*overrides: str) -> dict[str, dict[str, Any]]:
        assert run_recipe("evaluate", ["--config", str(config), *overrides]) == 0
        return {name: model["text"] for name, model in _results(tmp_path).items()}

    first = found()
    text.write_text("".join(text.read_text().splitlines(keepends=True)[:10]))
    shorter = found()
    assert all(shorter[name]["num_tokens"] < first[name]["num_tokens"] for name in first)
    swapped = found("reference=student")
    assert swapped["student"]["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    assert swapped["teacher"]["kl"]["mean"] > 0.01
    weights = load_file(teacher / "model.safetensors")
    save_file({name: weight * 0.9 for name, weight in weights.items()}, teacher / "model.safetensors")
    found("~models.student")  # as an evaluation does that is cut off after the reference
    assert found()["student"]["kl"]["mean"] != pytest.approx(shorter["student"]["kl"]["mean"], rel=1e-3)


def test_two_processes_find_what_one_does(config: Path, toys: Toys, tmp_path: Path) -> None:
    questions = [{"question": "the cat", "choices": ["sat", "dog", "tree"], "answer": index % 3} for index in range(7)]
    tasks = f"tasks=[{write_jsonl(tmp_path / 'pets.jsonl', questions)}]"
    assert run_recipe("evaluate", ["--config", str(config), tasks]) == 0
    one = _results(tmp_path)
    arguments = ("run", "--nproc_per_node", "2", "kd_recipes.evaluate", "--config", str(config), tasks)
    result = run_tune(*arguments, f"output_dir={tmp_path / 'two' / 'evaluation'}", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    two = _results(tmp_path / "two")
    for name in ("student", "teacher"):
        assert two[name]["text"]["by_sequence"]["num_tokens"] == one[name]["text"]["by_sequence"]["num_tokens"]
        assert two[name]["text"]["kl"]["mean"] == pytest.approx(one[name]["text"]["kl"]["mean"], rel=1e-5, abs=1e-7)
        assert two[name]["tasks"]["pets"]["choices"] == one[name]["tasks"]["pets"]["choices"]
        assert two[name]["samples"] == one[name]["samples"]
    assert sum(one["student"]["tasks"]["pets"]["changed"]) == 7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reference=tutor", "reference: got 'tutor', wanted one of student, teacher"),
        ("models.student=/nowhere", "models.student: got '/nowhere', wanted a Hugging Face checkpoint directory"),
        ("batch_size=0", "batch_size: got 0"),
        ("tasks=[no_such.jsonl]", "no_such"),
        ("num_prompts=-1", "num_prompts: got -1"),
        ("max_new_tokens=100000", "prompts: got '1000"),
        ("models.a/b=x", "models.a/b: got 'a/b', wanted a name of letters"),
    ],
)
def test_bad_input(
    override: str, message: str, config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_recipe("evaluate", ["--config", str(config), override]) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "evaluation").exists()


def test_models_of_different_vocabularies_are_not_compared(
    config: Path, toys: Toys, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(toys.student, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.__getitem__)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(content))
    assert run_recipe("evaluate", ["--config", str(config), f"models.other={other}"]) == 2
    error = capfd.readouterr().err
    assert "models.other" in error
    assert "wanted the token-to-id map of the reference" in error


def test_text_that_a_model_cannot_reach_is_refused(
    config: Path, toys: Toys, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    long = write_jsonl(tmp_path / "long.jsonl", [{"text": sentence(0, 2000)}])
    assert run_recipe("evaluate", ["--config", str(config), f"dataset.data_files={long}"]) == 2
    assert "Set tokenizer.max_seq_len" in capfd.readouterr().err
