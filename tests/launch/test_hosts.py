"""Two hosts, joined by 1 Gb/s and 5 ms: they train as one does, and where one is gone the other says so and ends.

The hosts are network namespaces of this machine (benchmarks/scaling/hosts.py), which need root.
"""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from benchmarks.scaling.hosts import Hosts, available
from tests.support import ROOT
from tests.support.launch import SECONDS, child_environment, wait_until
from tests.support.rounding import TRAINED

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.slow,
    pytest.mark.skipif(available() is not None, reason=f"no hosts can be made here: {available()}"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="two hosts would share the GPUs, which these tests hide"),
]

TIMEOUT_S = 8  # parallel.timeout_s
SETTINGS = [
    "--config", "configs/quickstart.yaml", "train.micro_batch_size=2", "data.eval=null", "log.sample_prompts=[]",
    "log.every=1",
]  # fmt: skip


class Run:
    """launch/train.py on some hosts at once."""

    def __init__(self, hosts: Hosts, directory: Path, launcher: str, *overrides: str, only: int | None = None):
        self.hosts, self.directory = hosts, directory
        directory.mkdir()
        (directory / "hostfile").write_text("".join(f"{name} slots=1\n" for name in hosts.names))
        script = ["launch/train.py", *SETTINGS, f"output_dir={directory}", *overrides]
        self.wait_s = TIMEOUT_S if only is not None else SECONDS
        self.started = {}
        for host in range(2) if only is None else [only]:
            command = [sys.executable, *self.launcher(launcher, host), *script]
            with (directory / f"host-{host}.txt").open("w") as file:
                self.started[host] = hosts.popen(
                    host, command, stdout=file, stderr=subprocess.STDOUT, env=child_environment(), cwd=ROOT
                )

    def launcher(self, name: str, host: int) -> list[str]:
        first = self.hosts.names[0]
        if name == "deepspeed":
            options = [f"--hostfile={self.directory / 'hostfile'}", "--no_ssh", f"--node_rank={host}"]
            return ["-m", "deepspeed.launcher.runner", *options, f"--master_addr={first}", "--master_port=29500"]
        options = ["--nnodes=2", "--nproc-per-node=1", f"--rdzv-conf=join_timeout={self.wait_s}"]
        meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={first}:29400", "--rdzv-id=run"]
        return ["launch/torchrun.py", *options, *meeting]

    def printed(self, host: int) -> str:
        return (self.directory / f"host-{host}.txt").read_text(errors="replace")

    def ends(self) -> list[int]:
        return [process.wait(SECONDS) for process in self.started.values()]

    def losses(self) -> list[float]:
        path = self.directory / "metrics.jsonl"
        return [json.loads(line)["loss"] for line in path.read_text().splitlines()] if path.exists() else []

    def error(self, host: int) -> str:
        (line,) = [line for line in self.printed(host).splitlines() if line.startswith("error: ")]
        return line


@pytest.fixture(scope="module")
def one_host(tmp_path_factory) -> list[float]:
    """Losses of two ranks on this machine."""
    directory = tmp_path_factory.mktemp("one") / "run"
    command = [
        sys.executable, "launch/torchrun.py", "--standalone", "--nproc-per-node=2", "launch/train.py", *SETTINGS,
        "train.steps=6", f"output_dir={directory}",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, env=child_environment(), cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_the_link_has_the_rate_and_the_delay_that_it_was_given():
    receive = (
        "import socket, time; s = socket.create_server(('', 5000)); print(flush=True); c, _ = s.accept(); n = 0\n"
        "t = time.monotonic()\nwhile b := c.recv(1 << 20): n += len(b)\n"
        "print(n * 8 / 1e6 / (time.monotonic() - t))"
    )
    send = (
        "import socket, time; c = socket.create_connection(('host-0', 5000)); t = time.monotonic()\n"
        "d = socket.create_connection(('host-0', 5000)); print((time.monotonic() - t) * 1e3); d.close()\n"
        "for _ in range(100): c.sendall(bytes(1 << 20))"
    )
    with Hosts(2, mbit=1000, delay_ms=5.0) as hosts:
        pipe = {"stdout": subprocess.PIPE, "text": True}
        receiver = hosts.popen(0, [sys.executable, "-c", receive], **pipe)
        receiver.stdout.readline()
        sender = hosts.popen(1, [sys.executable, "-c", send], **pipe)
        round_trip_ms, rate = float(sender.communicate()[0]), float(receiver.communicate()[0])
    assert round_trip_ms >= 10 and rate < 1050  # a busy machine may be late


@pytest.mark.parametrize(("launcher", "strategy"), [("c10d", "fsdp"), ("deepspeed", "zero3")])
def test_two_hosts_train_as_one(one_host, launcher, strategy, tmp_path):
    # The names lead to 127.0.1.1, as on Debian, which is where gloo would listen by itself.
    with Hosts(2, mbit=1000, delay_ms=5.0, loopback_names=True) as hosts:
        run = Run(hosts, tmp_path / "run", launcher, "train.steps=6", f"parallel.strategy={strategy}")
        assert run.ends() == [0, 0], run.printed(0)[-3000:] + run.printed(1)[-3000:]
    assert run.losses() == pytest.approx(one_host, rel=TRAINED)


@pytest.mark.parametrize(("launcher", "gone"), [("c10d", 0), ("deepspeed", 1)])
def test_a_host_that_loses_power_is_named_by_the_other(launcher, gone, tmp_path):
    with Hosts(2, mbit=1000, delay_ms=5.0) as hosts:
        run = Run(hosts, tmp_path / "run", launcher, "train.steps=100000", f"parallel.timeout_s={TIMEOUT_S}")
        assert wait_until(lambda: len(run.losses()) > 2, SECONDS), run.printed(0)[-3000:]
        hosts.kill(gone)
        assert all(run.ends())
        assert wait_until(lambda: hosts.processes(1 - gone) == [], SECONDS)
    error = run.error(1 - gone)
    assert f"rank {1 - gone} (host-{1 - gone}) has " in error
    assert (
        "rank 1 (host-1), which no longer answers" if gone else "on host-0, which keeps the run's store"
    ) in error


def test_a_host_that_never_comes_is_told_by_the_one_that_waits(tmp_path):
    cases = [("c10d", 1), ("deepspeed", 0)]
    lines = {}

    def alone(launcher: str, only: int) -> None:
        with Hosts(2) as hosts:
            run = Run(
                hosts, tmp_path / f"{launcher}-{only}", launcher, f"parallel.timeout_s={TIMEOUT_S}", only=only
            )
            assert all(run.ends())
            lines[launcher, only] = run.error(only)

    threads = [threading.Thread(target=alone, args=case) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(lines) == sorted(cases)
    assert "no sign of rank 1 of 2; those of host-0 are here" in lines["deepspeed", 0]
    assert "host-1 does not reach host-0:29400" in lines["c10d", 1]
