"""A recipe's process that outlived its pipeline or sweep is ended, and nothing else is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from kd_recipes import processes
from kd_recipes.processes import StopRequest, end_leftover

SLEEP = "import signal, sys, time; print('ready', flush=True); time.sleep(60)"
STUBBORN = SLEEP.replace("time;", "time; signal.signal(signal.SIGTERM, signal.SIG_IGN);")
Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """``start(code, *words)`` begins a process with these words on its command line."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(code: str, *words: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    "words",
    [
        ["/bin/tune", "run", "kd_recipes/distill"],
        ["/bin/tune", "run", "--nproc_per_node", "2", "kd_recipes/distill"],
        ["-u", "-m", "kd_recipes.distill"],  # of torchrun
        ["/somewhere/kd_recipes/distill.py"],
        ["-m", "kd_recipes"],
    ],
)
def test_a_recipe_s_process_is_ended(words: list[str], start: Start, tmp_path: Path) -> None:
    config = tmp_path / "distilled.yaml"
    left = start(SLEEP, *words, "--config", str(config))
    other = start(SLEEP, *words, "--config", str(tmp_path / "other.yaml"))
    end_leftover(config)
    assert left.wait(5) < 0
    assert other.poll() is None


@pytest.mark.parametrize(
    "words", [["-f"], ["kd_recipes/distill"], ["diff", "--config"], ["/kd_recipes/view.py", "--config"]]
)
def test_a_process_that_only_looks_at_the_config_is_left_alone(words: list[str], start: Start, tmp_path: Path) -> None:
    config = tmp_path / "kd_recipes" / "distilled.yaml"
    looks = start(SLEEP, *words, str(config))
    end_leftover(config)
    time.sleep(0.2)
    assert looks.poll() is None


def test_one_that_does_not_end_is_killed(start: Start, tmp_path: Path) -> None:
    config = tmp_path / "distilled.yaml"
    left = start(STUBBORN, "kd_recipes/distill", "--config", str(config))
    end_leftover(config, seconds=0.3)
    assert left.wait(5) == -9


def test_a_wait_is_said_and_a_signal_ends_it(start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "distilled.yaml"
    left = start(STUBBORN, "kd_recipes/distill", "--config", str(config))
    with StopRequest() as stop:
        threading.Timer(0.5, signal.raise_signal, [signal.SIGTERM]).start()
        begun = time.monotonic()
        end_leftover(config, stop, seconds=30)
    assert stop.number == signal.SIGTERM
    assert time.monotonic() - begun < 15
    assert left.poll() is None  # it saves itself
    assert f"distilled: an earlier run of it is not over (process {left.pid})" in capsys.readouterr().out


def test_another_user_s_process_is_no_error(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(process: psutil.Process) -> None:
        raise psutil.AccessDenied(process.pid)

    for name in ("terminate", "kill"):
        monkeypatch.setattr(psutil.Process, name, refuse)
    monkeypatch.setattr(processes, "_SECONDS_TO_DIE", 0.1)
    config = tmp_path / "distilled.yaml"
    left = start(SLEEP, "kd_recipes/distill", "--config", str(config))
    end_leftover(config, seconds=0.1)
    assert left.poll() is None


def test_this_process_is_not_ended(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from kd_recipes.processes import end_leftover\n"
        "end_leftover(Path(sys.argv[-1])); print('alive')"
    )
    words = ["kd_recipes/pipeline", "--config", str(tmp_path / "pipeline.yaml")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    assert subprocess.check_output([sys.executable, "-c", code, *words], env=environment) == b"alive\n"
