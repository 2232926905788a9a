"""The evaluation recipe on toy checkpoints, against transformers' own logits."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch.nn import functional as F

from kd_recipes.entry import run_recipe
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
        "prompt": "the cat",
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
    assert student["perplexity"] == pytest.approx(perplexity, rel=1e-4)
    assert student["held_out"]["kl"] == pytest.approx(kl, rel=1e-4)
    assert student["held_out"]["agreement"] == pytest.approx(agreement, abs=1e-6)
    assert teacher["held_out"]["kl"] == pytest.approx(0, abs=1e-6)
    assert teacher["held_out"]["agreement"] == 1
    assert student["num_bytes"] == (toys.student / "model.safetensors").stat().st_size
    assert "| student |" in (tmp_path / "evaluation" / "evaluation.md").read_text()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reference=tutor", "reference: got 'tutor', wanted one of student, teacher"),
        ("models.student=/nowhere", "models.student: got '/nowhere', wanted a Hugging Face checkpoint directory"),
        ("batch_size=0", "batch_size: got 0"),
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
