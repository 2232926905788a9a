"""Fill a cache while being killed, again and again, and compare it with one that was left alone.

For test_cache_teacher.py. Each run is a fork, so that torch is imported once: starting each would take minutes.

    python tests/teachers/kill_often.py CONFIG NUM_KILLS
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from kd_recipes.entry import run_recipe
from kd_recipes.teachers.cache import fill
from kd_recipes.teachers.cache.store import Store


def start(config: str, path: Path) -> int:
    """A process that fills the cache."""
    child = os.fork()
    if not child:
        fill._COMMIT_SECONDS = 0.0  # so that there are many moments to be killed at
        os._exit(run_recipe("cache_teacher", ["--config", config, f"teacher.path={path}"]))
    return child


def kill(child: int, index: Path, seconds: float) -> None:
    """Kill a process so long after it has written something."""
    before = index.stat().st_size if index.exists() else 0
    while not os.waitpid(child, os.WNOHANG)[0]:
        if index.exists() and index.stat().st_size > before:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return
        time.sleep(1e-4)


def content(path: Path) -> dict[bytes, bytes]:
    """The records by key; no key has two."""
    store = Store(path)
    entries = {key: store.find(key) for key in store}
    records = {key: bytes(store.read(entry)) for key, entry in entries.items() if entry is not None}
    num_bytes = sum(file.stat().st_size for file in path.glob("part-*.data"))
    assert num_bytes == sum(map(len, records.values())), "something was written twice"
    return records


def main(config: str, num_kills: int) -> None:
    """Print how many records there were after each kill."""
    unbroken, killed = (Path(config).with_name(name) for name in ("unbroken", "killed"))
    assert os.waitpid(start(config, unbroken), 0)[1] == 0
    moments, sizes = random.Random(0), []
    for _ in range(num_kills):
        kill(start(config, killed), killed / "part-00000.index", moments.uniform(0, 0.02))
        sizes.append(len(Store(killed)))
    assert os.waitpid(start(config, killed), 0)[1] == 0
    assert content(killed) == content(unbroken)
    print(f"killed with {sizes} of {len(content(unbroken))} records written")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
