"""The tutorials run, command by command, in the order in which a reader types them.

By default in a world of toys: the quickstart's teacher is a small one, and so are the configs' sizes. With ``-m slow``
the pages about the quickstart's model run as they are, downloads included.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from families import Family
from omegaconf import OmegaConf
from pages import DOCS, ROOT, blocks, commands, tune_run

from kd_recipes import _torchtune, cli, quickstart
from kd_recipes.compression import read_checkpoint
from kd_recipes.config import find_config
from kd_recipes.entry import run_recipe
from kd_recipes.exporting.formats import FORMATS
from toy import TUNE, save_model, save_tokenizer, sentence

# What the quickstart's configs and commands say of sizes, and what a toy has instead. Heads stay as many.
SMALLER = {
    "vocab_size": {49152: 320},
    "num_layers": {30: 6, 20: 4},
    "num_blocks": {20: 4},
    "embed_dim": {576: 288},
    "intermediate_dim": {1536: 128},
    "max_seq_len": {8192: 1024, 2048: 1024, 256: 64},
    "num_calibration_tokens": {2048: 256, 8192: 256},
    "max_steps": {30: 2, 20: 2},
    "num_warmup_steps": {4: 1},
    "max_new_tokens": {32: 4, 48: 4},
    "num_new_tokens": {32: 4},
    "num_prompts": {8: 2},
    "max_batches": {6: 2},
    "max_eval_batches": {4: 1, 100: 2, 10: 2},
    "log_graph": {True: False},
    "dtype": {"auto": "fp32"},
}
SIZES = {
    "hidden_size": 288,
    "intermediate_size": 128,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 1024,
}
PAGES = ("first_distillation", "own_pair", "onto_a_device", "into_torchtune", "worse_than_fine_tuning")


def smaller(text: str) -> str:
    """A config or a command with a toy's sizes."""
    for key, values in SMALLER.items():
        for large, small in values.items():
            text = re.sub(rf"\b{key}(: |=){large}\b", rf"{key}\g<1>{small}", text)
    return text.replace("train[:1000]", "train[:60]")


@dataclass(frozen=True)
class World:
    """A directory in which a reader works.

    Args:
        cwd: of the commands; also what a page calls /tmp.
        families: toy pairs of larger models.
    """

    cwd: Path
    families: dict[str, Family]

    def type(self, words: list[str]) -> None:
        """Do what a command does, and see that it worked."""
        words = [re.sub(r"(^|=)/tmp/", rf"\1{self.cwd}/", smaller(word)) for word in words]
        if run := tune_run(words):
            assert run_recipe(run.recipe, ["--config", str(self._toy(run.config)), *self._possible(run.overrides)]) == 0
        elif words == ["python", "-m", "kd_recipes.quickstart"]:
            for recipe, config, *overrides in self._quickstart():
                assert run_recipe(recipe, ["--config", str(self._toy(config)), *overrides]) == 0
        elif words[:2] == ["tune", "cp"]:
            shutil.copyfile(_torchtune_configs() / f"{words[2]}.yaml", words[3])
        elif words[0] == "kd-recipes":
            assert cli.main(words[1:]) == 0
        elif words[0] in ("open", "tensorboard"):
            assert Path(words[-1]).exists()
        else:
            assert words[:2] in (["pip", "install"], ["tune", "download"])

    def _quickstart(self) -> Iterator[list[str]]:
        """Its steps that are still to be done, each by itself at a toy's size; the downloads are there already."""
        root = Path("runs/quickstart")
        gguf = quickstart.fetch(quickstart.MODEL, root / "downloads")
        quickstart.write_text(quickstart.fetch(quickstart.TEXT, root / "downloads"), root / "data")
        steps = {
            "teacher": ["import_gguf", "import_gguf", f"gguf_file={gguf}", f"output_dir={root / 'teacher'}"],
            "pruned": ["compress", "prune_depth"],
            "distilled": ["distill", "quickstart"],
            "evaluation": ["evaluate", "quickstart_evaluate"],
        }
        yield from (words for result, words in steps.items() if not (root / result).exists())

    def _toy(self, name: str) -> Path:
        """A config with a toy's sizes: of the reader's own, of torchtune's, or a shipped one."""
        theirs = _torchtune_configs() / f"{name}.yaml"
        source = theirs if theirs.is_file() else find_config(name)
        text = source.read_text(encoding="utf-8")
        toy = self.cwd / "toys" / f"{source.stem}.yaml"
        toy.parent.mkdir(exist_ok=True)
        toy.write_text(smaller(text).replace("/tmp/", f"{self.cwd}/"))
        if "Qwen2" in text:
            family = self.families["qwen"]
            cfg = OmegaConf.load(toy)
            models = family.lora if "lora" in cfg.model._component_ else family.full
            data = [word for word in family.overrides(Path(cfg.output_dir), models) if word.startswith("dataset.")]
            held_out = [word.replace("dataset.", "eval_dataset.") for word in data] if "eval_dataset" in cfg else []
            words = [*family.overrides(Path(cfg.output_dir), models), *held_out]
            words.append("optimizer._component_=torch.optim.AdamW")
            cfg.teacher_checkpointer.checkpoint_files = ["model.safetensors"]
            OmegaConf.save(_torchtune.merge_overrides(cfg, words), toy)
        return toy

    def _possible(self, overrides: list[str]) -> list[str]:
        """Formats whose programs are here."""
        if importlib.util.find_spec("llama_cpp"):
            return overrides
        return [word.replace(", gguf_trained", "") if word.startswith("formats=") else word for word in overrides]


def _torchtune_configs() -> Path:
    spec = importlib.util.find_spec("recipes")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "configs"


@pytest.fixture(scope="module")
def quickstart_done(families: dict[str, Family], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a quickstart has run, from a GGUF file and a file of texts as it downloads them."""
    cwd = tmp_path_factory.mktemp("quickstart")
    downloads = cwd / "runs" / "quickstart" / "downloads"
    downloads.mkdir(parents=True)
    save_model(cwd / "source", num_hidden_layers=6, seed=3, rope_theta=100_000.0, **SIZES)
    save_tokenizer(cwd / "source")
    FORMATS["gguf_f32"].write(read_checkpoint(cwd / "source"), downloads / Path(quickstart.MODEL.member).name, 128)
    extract = " ".join(sentence(i) for i in range(8))
    pages = {str(i): {"title": f"Page {i}", "extract": sentence(i) + extract} for i in range(300)}
    (downloads / Path(quickstart.TEXT.member).name).write_text(json.dumps(pages))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        World(cwd, families).type(["python", "-m", "kd_recipes.quickstart"])
    return cwd


@pytest.mark.timeout(900)  # a dozen recipes, each with models to load, perhaps beside other tests
@pytest.mark.parametrize("name", PAGES)
def test_a_page_runs(
    name: str, quickstart_done: Path, families: dict[str, Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    shutil.copytree(quickstart_done / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    world = World(tmp_path, families)
    for words in commands(page):
        world.type(words)
        for block in blocks(page, "yaml"):  # of which the first line says where it goes
            if match := re.match(r"# at the end of (\S+)\n", block):
                append_once(tmp_path / match[1], block)
    for block in blocks(page, "python"):
        exec(compile(block, f"{name}.md", "exec"), {})
    if name == "worse_than_fine_tuning":  # the teacher as its own student
        first = json.loads(Path("runs/check/history.jsonl").read_text().partition("\n")[0])
        assert abs(first["values"]["kl"]) < 1e-6


def append_once(file: Path, block: str) -> None:
    if file.is_file() and block not in file.read_text(encoding="utf-8"):
        file.write_text(file.read_text(encoding="utf-8") + block, encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("name", ["first_distillation", "onto_a_device", "worse_than_fine_tuning"])
def test_a_page_runs_as_it_is(name: str, tmp_path: Path) -> None:
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    if (ROOT / "runs" / "quickstart" / "evaluation").is_dir():  # made by `make quickstart` already
        shutil.copytree(ROOT / "runs" / "quickstart", tmp_path / "runs" / "quickstart")
    environment = {**os.environ, "PATH": f"{TUNE.parent}{os.pathsep}{os.environ['PATH']}"}
    for words in commands(page):
        if words[0] not in ("pip", "open", "tensorboard"):
            subprocess.run(words, cwd=tmp_path, env=environment, check=True)
    for block in blocks(page, "python"):
        subprocess.run([sys.executable, "-c", block], cwd=tmp_path, env=environment, check=True)
