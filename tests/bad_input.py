"""What the tests of bad input share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

WriteConfig = Callable[..., Path]
Rejected = Callable[..., str]
SAVING = ("save_every_n_steps=1", "max_steps=2")


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """Modification time and size of a directory and all that is in it."""
    found = [directory, *directory.rglob("*")] if directory.exists() else []
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in found}


def problems(stderr: str) -> str:
    """The message, without the progress bars before it."""
    assert "Traceback" not in stderr
    _, head, message = stderr.partition("kd_recipes.distill cannot run:\n")
    assert head
    assert all(line.startswith("  - ") for line in message.splitlines()), message
    return message


def use(checkpoint: Path) -> str:
    """The override that makes a checkpoint the student's."""
    return f"checkpointer.checkpoint_dir={checkpoint}"
