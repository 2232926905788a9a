"""A server process that a test starts, kills and starts again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parent / "teachers" / "completion_server.py"


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass
class Served:
    """A server process on this machine.

    Args:
        command: that starts it.
        port: that it listens at.
        log: file to which it writes its questions.
        output: file for what it prints.
    """

    command: Sequence[str]
    port: int
    log: Path
    output: Path
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @classmethod
    def toy(cls, checkpoint: Path, directory: Path, **faults: Any) -> Served:
        """One that speaks vLLM's protocol: see completion_server.py."""
        port, log = free_port(), directory / "questions.jsonl"
        command = [sys.executable, str(SCRIPT), str(port), str(checkpoint), str(log), json.dumps(faults)]
        return cls(command, port, log, directory / "server.log")

    @property
    def url(self) -> str:
        """Of the API."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def questions(self) -> list[Any]:
        """Prompts that it was asked about."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [json.loads(line)[1] for line in lines]

    def start(self, *, timeout: float = 120) -> Served:
        """Start it, and wait until it listens."""
        with self.output.open("ab") as output:
            paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
            self._process = subprocess.Popen(self.command, stdout=output, stderr=output, env=environment)
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if self._process.poll() is not None:
                break
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return self
            except OSError:
                time.sleep(0.05)
        raise RuntimeError(f"no server: {self.output.read_text()[-2000:]}")

    def kill(self) -> None:
        """As a machine that fails."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None
