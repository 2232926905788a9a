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


def run(config: str, path: Path, seconds: float | None = None) -> bool:
    """Whether a run came to its end before so many seconds had passed."""
    child = os.fork()
    if not child:
        fill._COMMIT_SECONDS = 0.0  # so that there are many moments to be killed at
        os._exit(run_recipe("cache_teacher", ["--config", config, f"teacher.path={path}"]))
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == 0


def content(path: Path) -> dict[bytes, bytes]:
    """The records by key; no key has two."""
    store = Store(path)
    entries = {key: store.find(key) for key in store}
    records = {key: bytes(store.read(entry)) for key, entry in entries.items() if entry is not None}
    num_bytes = sum(file.stat().st_size for file in path.glob("part-*.data"))
    assert num_bytes == sum(map(len, records.values())), "something was written twice"
    return records


def main(config: str, num_kills: int) -> None:
    """Print how many of the runs were killed while they wrote."""
    unbroken, killed = (Path(config).with_name(name) for name in ("unbroken", "killed"))
    started = time.monotonic()
    assert run(config, unbroken)
    whole = time.monotonic() - started
    moments, sizes = random.Random(0), set()
    for _ in range(num_kills):
        run(config, killed, moments.uniform(0, whole))
        sizes.add(len(Store(killed)))
    assert run(config, killed)
    assert content(killed) == content(unbroken)
    print(f"killed with {sorted(sizes)} of {len(content(unbroken))} records written")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
