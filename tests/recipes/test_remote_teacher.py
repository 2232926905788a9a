"""A teacher that another process serves: what it teaches, what is asked when, and what is survived or refused."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from served import Served, free_port

from kd_recipes.entry import EXIT_BAD_INPUT, EXIT_STOPPED, run_recipe
from kd_recipes.teachers.cache.store import Store
from toy import VOCABULARY, Toys, distill, logged, lora_section, prepare, run_tune, text_section

WriteConfig = Callable[..., Path]
Write = Callable[..., Path]
Serve = Callable[..., Served]
REMOTE = "kd_recipes.teachers.RemoteTeacher"
ALL = 2 * VOCABULARY  # allowed to be asked for
TOLD = ("loss", "kd", "quality", "held_out")
ENCODING = "teacher.encoding._component_=kd_recipes.teachers"
KEY = "sk-not-to-be-seen-1234"


@pytest.fixture
def serve(toys: Toys, tmp_path: Path) -> Iterator[Serve]:
    """``serve(checkpoint, **faults)``: a server of the toy teacher, or of another checkpoint."""
    started: list[Served] = []

    def start(checkpoint: Path = toys.teacher, **faults: Any) -> Served:
        directory = tmp_path / f"server_{len(started)}"
        directory.mkdir()
        started.append(Served.toy(checkpoint, directory, **{"max_logprobs": ALL, **faults}).start())
        return started[-1]

    yield start
    for served in started:
        served.kill()


@pytest.fixture(scope="module")
def server(toys: Toys, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One without faults, for tests that do not count its questions."""
    served = Served.toy(toys.teacher, tmp_path_factory.mktemp("server")).start()
    yield served
    served.kill()


@pytest.fixture
def write(toys: Toys, write_config: WriteConfig, tmp_path: Path) -> Write:
    """``write(url, k, its settings, **settings)``: a distillation from a server, or with None from a model."""

    def config(url: str | None, k: int = 8, more: dict[str, Any] | None = None, **settings: Any) -> Path:
        held_out = text_section(toys.data / "held_out.jsonl", toys.data / "cache")
        section = None if url is None else {"_component_": REMOTE, "url": url, "k": k, **(more or {})}
        run = {} if url else {"output_dir": str(tmp_path / "online")}
        own = {"teacher": section, "eval_dataset": held_out, "health": None, "max_steps": 4, **run, **settings}
        return write_config(tmp_path, **own)

    return config


def _assert_same(tmp_path: Path, *, without: tuple[str, ...] = ("held_out/teacher_entropy",)) -> None:
    online, found = logged(tmp_path / "online"), logged(tmp_path / "run")
    assert found.keys() == online.keys()
    for step, values in online.items():
        for name, value in values.items():
            if name.split("/")[0] in TOLD and name not in without:
                assert found[step][name] == pytest.approx(value, rel=1e-4, abs=1e-4), (step, name)


def test_distils_as_from_the_teacher_itself(write: Write, serve: Serve, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"eval_every_n_steps": 2, "kd_ratio": 0.8, "gradient_accumulation_steps": 2}
    distill(write(None, **settings))
    served = serve()
    recipe = distill(write(served.url, VOCABULARY, **settings))
    assert recipe._teacher is not None
    assert recipe._teacher.online is None
    _assert_same(tmp_path)
    asked = [json.dumps(prompt) for prompt in served.questions]
    assert len(asked) == 2 + 16 + 3 * 6 + 8  # the first two compare tokenizers; four batches are asked for ahead


def test_packed_documents_are_asked_about_one_by_one(write: Write, serve: Serve, toys: Toys, tmp_path: Path) -> None:
    packed = {"dataset.packed": True, "dataset.split_across_pack": False, "max_steps": 1, "eval_dataset": None}
    distill(write(None, **packed))
    served = serve()
    distill(write(served.url, VOCABULARY, **packed))
    _assert_same(tmp_path)
    prompts = [prompt for prompt in served.questions[2:] if isinstance(prompt, list)]
    assert max(map(len, prompts)) < 60  # of packs of 128
    assert all(prompt[-1] == 0 for prompt in prompts)


def test_batches_are_asked_about_before_they_are_needed(write: Write, serve: Serve) -> None:
    served = serve()
    recipe = prepare(write(served.url, more={"num_ahead": 3}, eval_dataset=None))
    assert recipe._teacher is not None
    before, seen = len(served.questions), []
    batches = list(recipe._loader.batches())
    ahead = recipe._teacher.ahead(batches)
    first = next(ahead)
    assert first is batches[0]
    end = time.monotonic() + 20
    while len(served.questions) - before < 8 and time.monotonic() < end:
        time.sleep(0.02)
    assert len(served.questions) - before == 8  # of two documents each
    seen = [first, *ahead]
    assert [*map(id, seen)] == [*map(id, batches)]
    recipe.cleanup()


def test_faults_of_a_server_are_outlasted(
    write: Write, serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distill(write(None, eval_dataset=None))
    served = serve(**{"500": [3, 9], "429": [5], "cut": [7], "hang": [6]})
    distill(write(served.url, VOCABULARY, {"timeout_s": 2.0, "max_concurrency": 2}, eval_dataset=None))
    _assert_same(tmp_path)
    out = capsys.readouterr().out
    assert 'it answers 500: {"error": {"message": "not now"}}' in out
    assert "it answers again" in out


def _when(served: Served, num_questions: int, act: Callable[[], None]) -> threading.Thread:
    """Do something as soon as a server has been asked so often."""

    def watch() -> None:
        end = time.monotonic() + 60
        while len(served.questions) < num_questions and time.monotonic() < end:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_a_server_that_is_killed_and_restarted(
    write: Write, serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distill(write(None, eval_dataset=None))
    served = serve(nap=0.1)

    def restart() -> None:
        served.kill()
        time.sleep(1)
        served.start()

    config = write(served.url, VOCABULARY, {"num_ahead": 1, "max_concurrency": 1, "max_wait_s": 120}, eval_dataset=None)
    watcher = _when(served, 7, restart)
    distill(config)
    watcher.join()
    _assert_same(tmp_path)
    out = capsys.readouterr().out
    assert re.search(r"asking again for up to 120 s", out)
    assert "it answers again" in out


def test_a_server_that_stays_away_ends_the_run_with_a_checkpoint(
    write: Write, serve: Serve, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    served = serve(nap=0.1)
    teacher = {"num_ahead": 0, "max_concurrency": 1, "max_wait_s": 1.5}
    config = write(served.url, more=teacher, eval_dataset=None, save_every_n_steps=None)
    watcher = _when(served, 7, served.kill)
    assert run_recipe("distill", ["--config", str(config)]) == EXIT_STOPPED
    watcher.join()
    message = capfd.readouterr().err
    assert re.search(rf"{served.url} gave no answer to completions in \d s \(max_wait_s\) and \d tries", message)
    assert "resume_from_checkpoint=True" in message
    assert [*(tmp_path / "run" / "checkpoints").glob("step_*")]
    served.start()
    assert run_recipe("distill", ["--config", str(config), "resume_from_checkpoint=True"]) == 0


def test_a_run_that_waits_for_a_server_can_be_asked_to_end(
    write: Write, serve: Serve, toys: Toys, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    served = serve(nap=0.05)

    def leave() -> None:
        served.kill()
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    teacher = {"num_ahead": 0, "max_concurrency": 1, "max_wait_s": 120}
    draws = {"model": lora_section(toys.student, lora_dropout=0.5), "gradient_accumulation_steps": 2}
    config = write(served.url, more=teacher, eval_dataset=None, save_every_n_steps=None, **draws)
    distill(config, f"output_dir={tmp_path / 'unbroken'}")
    watcher = _when(served, len(served.questions) + 13, leave)  # within a step, of two micro-batches
    begun = time.monotonic()
    assert run_recipe("distill", ["--config", str(config)]) == 128 + signal.SIGTERM
    assert time.monotonic() - begun < 60
    watcher.join()
    step = int(re.search(r"SIGTERM after step (\d), which is saved", capfd.readouterr().err)[1])  # type: ignore[index]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")] == [f"step_{step:08}"]
    served.start()
    distill(config, "resume_from_checkpoint=True")
    unbroken, found = logged(tmp_path / "unbroken"), logged(tmp_path / "run")
    assert {step: values["loss/total"] for step, values in found.items()} == {
        step: values["loss/total"] for step, values in unbroken.items()
    }


def test_the_key_is_seen_by_nobody(
    write: Write, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    served = serve(key=KEY, **{"500": [4]})
    monkeypatch.setenv("TEACHER_KEY", KEY)
    config = write(served.url, more={"api_key_env": "TEACHER_KEY"}, eval_dataset=None)
    assert run_recipe("distill", ["--config", str(config)]) == 0
    monkeypatch.setenv("TEACHER_KEY", f"{KEY}-wrong")
    served.kill()  # its second life counts from 0: no fault
    served.start()
    assert run_recipe("distill", ["--config", str(config), f"output_dir={tmp_path}/wrong"]) == EXIT_BAD_INPUT
    said = capfd.readouterr()
    assert re.search(r"teacher.url: got .*answers 401.*wrong key: Bearer \(the key\).*api_key_env", said.err)
    written = [said.out, said.err, *(p.read_bytes().decode(errors="ignore") for p in _files(tmp_path / "run"))]
    assert not any(KEY in text for text in written)


def _files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


REFUSED: list[tuple[list[str], str]] = [
    (
        ["temperature=2.0"],
        r"temperature: got 2.0, wanted 1.0, at which servers tell probabilities.*teacher_temperature",
    ),
    (["kd_loss._component_=torchtune.modules.loss.ForwardKLLoss"], "kd_loss: got 'ForwardKLLoss'"),
    (["health._component_=kd_recipes.monitoring.Health", "health.action=raise_temperature"], "health.action"),
    (["teacher.k=21"], r"teacher.url: .*answers 400: .*prompt logprobs of 21.*greater"),
    (["teacher.k=0"], "teacher.k: got 0"),
    (["teacher.dialect=tgi"], "teacher.dialect: got 'tgi', wanted one of vllm, llama_cpp_python"),
    (["teacher.timeout_s=0"], "teacher.timeout_s"),
    (["teacher.url=http://me:hidden@127.0.0.1/v1"], "teacher.url: got 'http://127.0.0.1/v1 with more in it'"),
    (["teacher.url=http://127.0.0.1/v1?hidden"], "teacher.url: got 'http://127.0.0.1/v1 with more in it'"),
    (["teacher.url=127.0.0.1"], "teacher.url: got"),
    (["teacher.api_key_env=sk-hidden"], r"teacher.api_key_env: got '\(not shown\)'"),
    ([f"teacher.url=http://127.0.0.1:{free_port()}/v1", "teacher.max_wait_s=0.1"], "teacher.url: .*refused"),
    (["feature_losses._component_=kd_recipes.losses.HiddenStates"], "feature_losses"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_what_does_not_suit_is_refused_before_anything_is_loaded(
    overrides: list[str],
    message: str,
    write: Write,
    server: Served,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loads(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("kd_recipes._torchtune.load_checkpoint", loads)
    config = write(server.url)
    capfd.readouterr()
    assert run_recipe("distill", ["--config", str(config), *overrides]) == EXIT_BAD_INPUT
    found = capfd.readouterr()
    assert re.search(message, found.err)
    assert "hidden" not in found.err + found.out


def test_another_tokenizer_is_named(write: Write, serve: Serve, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_recipe("distill", ["--config", str(write(serve(shift=1).url))]) == EXIT_BAD_INPUT
    assert re.search(
        r"tokenizer.path: got .token 0 of a text is id \d+ for the server and id \d+, '.*'", capfd.readouterr().err
    )


def _cached(write: Write, served: Served, tmp_path: Path, k: int = 8, **settings: Any) -> Path:
    """A config of a cache that is made of a server, without a teacher that would run here."""
    teacher = {
        "_component_": "kd_recipes.teachers.CachedTeacher",
        "path": str(tmp_path / "cache"),
        "encoding": {"_component_": "kd_recipes.teachers.TopK", "k": k},
        "source": {"_component_": REMOTE, "url": served.url, "k": k},
    }
    own = {"recipe": None, "teacher_model": None, "teacher_checkpointer": None, "output_dir": str(tmp_path / "run")}
    return write(None, **{**own, "teacher": teacher, **settings})


def test_a_cache_is_made_of_a_server(
    write: Write, serve: Serve, toys: Toys, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    distill(write(None, eval_every_n_steps=2))
    served = serve()
    config = _cached(write, served, tmp_path, VOCABULARY, eval_every_n_steps=2)
    assert run_recipe("cache_teacher", ["--config", str(config), "check=True"]) == 0
    assert len(Store(tmp_path / "cache")) == 30
    num_asked = len(served.questions)
    assert run_recipe("cache_teacher", ["--config", str(config)]) == 0
    assert len(served.questions) == num_asked + 3  # the tokenizer, and whether it is the same teacher
    served.kill()
    distill(config)
    rough = {name for step in logged(tmp_path / "run").values() for name in step if "loss" not in name}
    _assert_close(tmp_path, rough)
    other = serve(toys.student)
    capfd.readouterr()
    assert run_recipe("cache_teacher", ["--config", str(config), f"teacher.source.url={other.url}"]) == EXIT_BAD_INPUT
    assert "teacher.source.url: got 'a server whose model has" in capfd.readouterr().err


def _assert_close(tmp_path: Path, names: set[str]) -> None:
    online, found = logged(tmp_path / "online"), logged(tmp_path / "run")
    for step, values in found.items():
        for name in names & values.keys():
            if name.split("/")[0] in TOLD:
                assert values[name] == pytest.approx(online[step][name], rel=2e-3, abs=2e-3), (step, name)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.encoding.k=9"], "teacher.encoding: got .*'k': 9.*at most 8"),
        (
            ["~teacher.encoding.k", "teacher.encoding._component_=kd_recipes.teachers.RandomSampling"],
            "teacher.encoding",
        ),
        (
            ["teacher.source._component_=torch.nn.Identity", "~teacher.source.k", "~teacher.source.url"],
            "teacher.source",
        ),
        (["teacher.source.dialect=tgi"], "teacher.source.dialect"),
        (["temperature=2.0"], "temperature: got 2.0"),
        (["teacher.source=null"], "teacher_model: got None.*\n.*teacher_checkpointer: got None"),
    ],
)
def test_a_cache_that_a_server_cannot_fill_is_refused(
    overrides: list[str], message: str, write: Write, server: Served, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = _cached(write, server, tmp_path)
    assert run_recipe("cache_teacher", ["--config", str(config), *overrides]) == EXIT_BAD_INPUT
    assert re.search(message, capfd.readouterr().err)
    assert not (tmp_path / "cache").exists()


def test_fewer_ids_than_a_cache_has_are_not_added_to_it(
    write: Write, server: Served, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = _cached(write, server, tmp_path)
    assert run_recipe("cache_teacher", ["--config", str(config), "~eval_dataset"]) == 0
    fewer = ("teacher.encoding=null", "teacher.source.k=4")
    assert run_recipe("cache_teacher", ["--config", str(config), *fewer]) == EXIT_BAD_INPUT
    assert re.search("teacher.encoding: got .*'k': 8.*of the cache.*at most 4", capfd.readouterr().err)


def test_each_process_asks_about_its_own_rows(write: Write, serve: Serve, tmp_path: Path) -> None:
    served = serve()
    config = write(served.url, max_steps=2, eval_dataset=None, more={"num_ahead": 0})
    done = run_tune("run", "--nproc_per_node", "2", "kd_recipes.distill", "--config", str(config), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    prompts = [json.dumps(prompt) for prompt in served.questions if isinstance(prompt, list) and prompt[-1] == 0]
    assert len(prompts) == len(set(prompts)) == 2 * 2 * 2
