"""A teacher behind llama-cpp-python's own server, which is started on a toy's GGUF file.

The server is no dependency: it takes minutes to build. KD_RECIPES_LLAMA_CPP names the Python of an environment that
has `llama-cpp-python[server]`, if it is not this one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from served import Served, free_port

from kd_recipes.batch import Batch
from kd_recipes.compression import read_checkpoint
from kd_recipes.exporting.gguf import write_gguf
from kd_recipes.teachers import OnlineTeacher, RemoteTeacher, Surroundings, Teacher
from kd_recipes.tokenizers import hf_tokenizer
from toy import VOCABULARY, Toys, distill, load_sections, logged, sentence

PYTHON = os.environ.get("KD_RECIPES_LLAMA_CPP", sys.executable)
DIALECT = {"dialect": "llama_cpp_python", "max_concurrency": 1}


def _has_server() -> bool:
    return (
        subprocess.run([PYTHON, "-c", "import llama_cpp.server.app"], capture_output=True, check=False).returncode == 0
    )


pytestmark = pytest.mark.skipif(not _has_server(), reason="no llama-cpp-python[server]: see KD_RECIPES_LLAMA_CPP")


@pytest.fixture(scope="module")
def server(toys: Toys, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("llama_cpp")
    file, port = directory / "teacher.gguf", free_port()
    write_gguf(read_checkpoint(toys.teacher), file)
    command = [PYTHON, "-m", "llama_cpp.server", "--model", str(file), "--logits_all", "true", "--n_ctx", "128"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--n_threads", "1", "--n_threads_batch", "1"]
    served = Served(command, port, directory / "none", directory / "server.log").start()
    yield served
    served.kill()


@pytest.fixture
def remote(server: Served, toys: Toys) -> Teacher:
    tokenizer = hf_tokenizer(str(toys.student))
    source = RemoteTeacher(server.url, k=VOCABULARY, **DIALECT)  # type: ignore[arg-type]

    def load(*_: Any) -> OnlineTeacher:
        raise AssertionError

    return source.open(Surroundings({}, tokenizer, VOCABULARY, torch.device("cpu"), load))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        sentence(3),
        "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\nsat on a mat<|im_end|>\n",
        "Größe: 東京 🎉\n\tand  more",
    ],
)
def test_what_it_says_is_what_the_model_says(text: str, remote: Teacher, toys: Toys) -> None:
    tokenizer = hf_tokenizer(str(toys.student))
    ids = torch.tensor([tokenizer.encode(text)])
    said = remote.signal(Batch(ids[:, :-1], ids[:, 1:]))
    assert said.ids_TK.shape[0] == ids.shape[1] - 1  # type: ignore[union-attr]
    log_p_TV = load_sections(toys.teacher)(ids[:, :-1])[0].detach().log_softmax(-1)
    for place, own in enumerate(ids[0, :-1].tolist()):
        known = dict(zip(said.ids_TK[place].tolist(), said.log_p_TK[place].tolist(), strict=True))  # type: ignore[union-attr]
        known = {index: log_p for index, log_p in known.items() if log_p > -torch.inf}
        assert len(known) > VOCABULARY / 3  # the toy's ids are mostly single bytes
        for index, log_p in known.items():
            assert log_p == pytest.approx(float(log_p_TV[place, index]), abs=0.1), (place, own, index)
        others = sorted(set(range(VOCABULARY)) - known.keys())
        tail = float(log_p_TV[place, others].logsumexp(-1))
        assert float(said.log_tail_T[place]) == pytest.approx(tail, abs=0.1)  # type: ignore[union-attr]


def test_distils_as_from_the_teacher_itself(
    server: Served, write_config: Callable[..., Path], tmp_path: Path, toys: Toys
) -> None:
    distill(write_config(tmp_path, output_dir=str(tmp_path / "online")))
    section = {"_component_": "kd_recipes.teachers.RemoteTeacher", "url": server.url, "k": VOCABULARY, **DIALECT}
    distill(write_config(tmp_path, teacher=section))
    online, found = logged(tmp_path / "online"), logged(tmp_path / "run")
    for step in (1, 2):
        whole, told = online[step]["kd/forward_kl"], found[step]["kd/forward_kl"]
        assert 0.4 * whole < told < whole + 0.01  # over the ids that have a text of their own, and all others as one
