"""Directories are whole or absent, whatever happens; safetensors files are what the reference implementation writes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kd_recipes import storage
from kd_recipes.errors import ConfigError
from kd_recipes.storage import StorageError, atomic_directory, explain_disk_errors
from kd_recipes.tensor_files import MAX_HEADER_BYTES, TensorSpec, read_safetensors_header, write_safetensors

TENSORS = {
    "wide": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "scalar": torch.tensor(3, dtype=torch.int32),
    "half": torch.arange(5, dtype=torch.float32).to(torch.bfloat16),
    "strided": torch.arange(6, dtype=torch.float16).reshape(2, 3).T,
    "empty": torch.zeros(0, 4, dtype=torch.bool),
    "bytes": torch.arange(3, dtype=torch.uint8),
}


def specs_of(tensors: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_directory_appears_only_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    with atomic_directory(target) as temporary:
        (temporary / "a.txt").write_text("new")
        assert not target.exists()
    assert (target / "a.txt").read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_existing_directory_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old.txt").write_text("old")
    with atomic_directory(target) as temporary:
        (temporary / "new.txt").write_text("new")
    assert [path.name for path in target.iterdir()] == ["new.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failure_leaves_the_previous_directory(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old.txt").write_text("old")

    def fail_halfway() -> None:
        with atomic_directory(target) as temporary:
            (temporary / "half.txt").write_text("half")
            raise error

    with pytest.raises(error):
        fail_halfway()
    assert (target / "old.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_failed_rename_puts_the_previous_directory_back(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old.txt").write_text("old")
    with pytest.raises(FileNotFoundError), atomic_directory(target) as temporary:
        temporary.rmdir()
    assert (target / "old.txt").read_text() == "old"


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    target = tmp_path / "model"
    code = (
        "import os, pathlib; from kd_recipes.storage import atomic_directory\n"
        f"with atomic_directory(pathlib.Path({str(target)!r})) as t: (t / 'half').write_text('x'); os._exit(9)"
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert killed.returncode == 9
    assert len(list(tmp_path.iterdir())) == 1
    with atomic_directory(target):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_directory_moved_aside_by_a_killed_process_is_put_back(tmp_path: Path) -> None:
    target = tmp_path / "model"
    aside = tmp_path / f".model.old-{dead_pid()}"
    aside.mkdir()
    (aside / "old.txt").write_text("old")
    with pytest.raises(RuntimeError), atomic_directory(target):
        raise RuntimeError
    assert (target / "old.txt").read_text() == "old"


def test_directory_of_a_live_process_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / f".model.tmp-{os.getppid()}"
    other.mkdir()
    with atomic_directory(tmp_path / "model"):
        pass
    assert other.is_dir()


def test_scratch_is_gone_in_any_case(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    with storage.scratch_directory(target) as scratch:
        (scratch / "part").write_text("x")
        with atomic_directory(target) as temporary:  # the same path's, within
            (temporary / "a.txt").write_text((scratch / "part").read_text())
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    with pytest.raises(KeyboardInterrupt), storage.scratch_directory(target) as scratch:
        raise KeyboardInterrupt
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    with pytest.raises(StorageError, match="No space left"), storage.scratch_directory(target):
        raise OSError(errno.ENOSPC, "full")


def test_scratch_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    left = [tmp_path / f".model.scratch-{pid}" for pid in (dead_pid(), os.getpid(), os.getppid())]
    for path in left:
        path.mkdir()
    with storage.scratch_directory(tmp_path / "model") as scratch:
        assert {*tmp_path.iterdir()} == {scratch, left[2]}  # which a live process uses


def test_written_file_is_what_safetensors_reads(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, specs_of(TENSORS), iter(TENSORS.values()))
    loaded = load_file(path)
    assert list(read_safetensors_header(path).values()) == specs_of(TENSORS)
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    assert header["__metadata__"] == {"format": "pt"}


def test_header_of_a_file_that_safetensors_wrote(tmp_path: Path) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    save_file(contiguous, tmp_path / "model.safetensors", {"format": "pt"})
    header = read_safetensors_header(tmp_path / "model.safetensors")
    assert header == {spec.name: spec for spec in specs_of(contiguous)}


def test_one_tensor_is_held_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def make() -> torch.Tensor:
        tensor = torch.zeros(8)
        alive.append(weakref.ref(tensor))
        return tensor

    def tensors() -> Iterator[torch.Tensor]:
        for _ in range(4):
            assert not any(ref() is not None for ref in alive)
            yield make()

    write_safetensors(tmp_path / "x", [TensorSpec(str(i), torch.float32, (8,)) for i in range(4)], tensors())


@pytest.mark.parametrize(
    ("specs", "tensors", "message"),
    [
        ([TensorSpec("a", torch.float32, (2,))], [torch.zeros(3)], "a: got"),
        ([TensorSpec("a", torch.float32, (2,))], [torch.zeros(2, dtype=torch.float16)], "a: got"),
        ([TensorSpec("a", torch.float32, (2,))], [], "fewer tensors"),
        ([], [torch.zeros(2)], "more tensors"),
        ([TensorSpec("a", torch.float32, ())] * 2, [torch.zeros(())] * 2, "two tensors"),
        ([TensorSpec("a", torch.uint8, (1,)), TensorSpec("b", torch.float32, ())], [], "not aligned"),
    ],
)
def test_tensors_must_match_their_specs(
    tmp_path: Path, specs: list[TensorSpec], tensors: list[torch.Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_safetensors(tmp_path / "x", specs, tensors)


@pytest.mark.parametrize("keep", [0, 4, 30, -1])
def test_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, specs_of(TENSORS), TENSORS.values())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        read_safetensors_header(path)


@pytest.mark.parametrize(
    "header", ["[]", "{", '{"a": 1}', '{"a": {"dtype": "F3", "shape": [], "data_offsets": [0, 4]}}', "{}x" * 9]
)
def test_bad_header_is_refused(tmp_path: Path, header: str) -> None:
    path = tmp_path / "bad"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    with pytest.raises(ConfigError):
        read_safetensors_header(path)


def test_huge_header_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
    with pytest.raises(ConfigError, match="header"):
        read_safetensors_header(tmp_path / "bad")


def test_free_space_is_asked_of_the_nearest_parent(tmp_path: Path) -> None:
    storage.require_free_space(tmp_path / "not" / "yet", 1, key="output_dir")
    with pytest.raises(ConfigError, match=r"output_dir.*bytes free") as caught:
        storage.require_free_space(tmp_path / "not" / "yet", 10**18, key="output_dir")
    assert caught.value.problems[0].key == "output_dir"


def test_json_is_readable(tmp_path: Path) -> None:
    storage.write_json(tmp_path / "x.json", {"text": "▁é"})
    assert "▁é" in (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"text": "▁é"}


def test_what_a_disk_refuses_is_one_error_whoever_writes(tmp_path: Path) -> None:
    def python(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def rust(path: Path) -> None:
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    def chained(path: Path) -> None:
        try:
            python(path)
        except OSError as error:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos") from error

    for write in (python, rust, chained):
        with pytest.raises(StorageError, match="No space left on device"), atomic_directory(tmp_path / "new") as new:
            write(new)
    with pytest.raises(FileNotFoundError), atomic_directory(tmp_path / "new"):  # not the disk's fault
        (tmp_path / "nowhere").read_text()
    assert not list(tmp_path.iterdir())


def test_torch_on_a_full_disk_is_told_by_its_text(tmp_path: Path) -> None:
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")  # given a path
    with pytest.raises(StorageError, match="is the disk full"), explain_disk_errors(tmp_path):
        raise error
