"""Two hosts with a network between them: they do what one does, and are cut off from each other and go on."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from toy import TUNE, distill, logged, save_config, saved_weights

WriteConfig = Callable[..., Path]
RUN = {"optimizer": {"_component_": "torch.optim.SGD", "lr": 0.01}, "batch_size": 2, "epochs": 100}


class Hosts:
    """Two hosts in network namespaces of this one.

    Args:
        names: of the namespaces.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def start(self, *words: str, log: Path) -> list[subprocess.Popen[str]]:
        """``tune run`` on both."""
        launcher = [str(TUNE), "run", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_id", "1"]
        launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "10.77.0.1:29511", "--max-restarts", "5"]
        settings = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        environment = {**os.environ, **settings, "PYTHONPATH": str(Path(__file__).parents[1])}
        processes = []
        for number, name in enumerate(self.names, start=1):
            # torchrun finds out which host it is from the host's name, which both have
            own = ["--local_addr", f"10.77.0.{number}", "--rdzv_conf", f"is_host={number == 1}"]
            command = ["ip", "netns", "exec", name, *launcher, *own, *words]
            with log.with_suffix(f".{number}").open("w") as file:
                processes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=file, text=True))
        return processes

    def connect(self, is_up: bool) -> None:
        """Take the second host's network down, or up again."""
        ip("-n", self.names[1], "link", "set", "eth0", "up" if is_up else "down")


def ip(*words: str) -> None:
    """Run ``ip``."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    names = [f"kd{os.getpid() % 10_000}{side}" for side in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for number, name in enumerate(names, start=1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        yield Hosts(names)
    except OSError as error:
        pytest.skip(f"no network namespaces can be made here: {error}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _outputs(log: Path) -> str:
    return "\n".join(log.with_suffix(f".{number}").read_text() for number in (1, 2))


def _assert_same(run: Path, expected: Path) -> None:
    got, wanted = saved_weights(run), saved_weights(expected)
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (got[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


def test_two_hosts_do_what_one_does(hosts: Hosts, write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(tmp_path, **RUN, max_steps=3)
    distill(config, "batch_size=4", f"output_dir={tmp_path / 'one'}")
    processes = hosts.start("kd_recipes.distill", "--config", str(config), log=tmp_path / "log")
    assert [process.wait(timeout=200) for process in processes] == [0, 0], _outputs(tmp_path / "log")
    _assert_same(tmp_path / "run", tmp_path / "one")


@pytest.mark.parametrize("seconds", [4, pytest.param(30, marks=pytest.mark.slow)])
def test_a_host_that_is_cut_off_and_back_again_goes_on(
    seconds: int, hosts: Hosts, write_config: WriteConfig, tmp_path: Path
) -> None:
    """For less than the processes wait for each other, and for longer: then they are started again."""
    config = write_config(tmp_path, **RUN, max_steps=40, save_every_n_steps=4, distributed_timeout=15)
    distill(config, "batch_size=4", f"output_dir={tmp_path / 'one'}")
    slow = {"_component_": "toy.fail", "how": "nap", "rank": 0, "at": 0, "marker": "-"}
    config = save_config(OmegaConf.load(config), config, token_weights=slow)
    settings = ["resume_from_checkpoint=auto", f"output_dir={tmp_path / 'two'}"]
    processes = hosts.start("kd_recipes.distill", "--config", str(config), *settings, log=tmp_path / "log")
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "two" / "checkpoints").glob("step_*")) and time.monotonic() < deadline:
            time.sleep(0.2)
        hosts.connect(False)
        time.sleep(seconds)
        assert processes[0].poll() is None
        hosts.connect(True)
        assert [process.wait(timeout=200) for process in processes] == [0, 0], _outputs(tmp_path / "log")
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
    assert list(logged(tmp_path / "two")) == list(range(1, 41))
    _assert_same(tmp_path / "two", tmp_path / "one")
