"""launch/train.py under `deepspeed` and `torchrun`: on one node and on two, mistakes, a dead rank, a busy port.

No test may leave a process behind: see `support.launch.Launch`.
"""

import importlib.util
import json
import os
import re
import signal
import socket
import sys
from pathlib import Path

import pytest
import torch
import yaml

from dora_dist.errors import UserError
from tests.support import ROOT
from tests.support.launch import SECONDS, Launch, free_port, wait_until
from tests.support.ranks import Ranks
from tests.support.rounding import TRAINED

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module", params=["deepspeed", "torchrun"])
def launcher(request) -> str:
    if request.param == "deepspeed" and torch.cuda.is_available():
        pytest.skip("the deepspeed launcher would show its processes the GPUs, which these tests hide")
    return request.param


@pytest.fixture(scope="module")
def start(launcher, tiny_llama, tiny_rows, tmp_path_factory):
    """Starts a launch: `node` of two nodes with a process each, or (None) two processes on one."""
    directory = tmp_path_factory.mktemp("launch")
    config, hosts = directory / "c.yaml", directory / "hosts"
    settings = {
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "dora": {"rank": 2, "targets": ["q_proj", "down_proj"]},
        "data": {"train": str(tiny_rows), "seq_len": 48},
        "train": {"steps": 3, "micro_batch_size": 4, "lr": 0.02},
        "parallel": {"strategy": "zero3", "timeout_s": 60},
    }
    config.write_text(yaml.safe_dump(settings))
    hosts.write_text("node-a slots=1\nnode-b slots=1\n")

    def start(output_dir: Path, *overrides: str, port: int | None = None, node: int | None = None) -> Launch:
        if launcher == "deepspeed":
            module, one_node = "deepspeed.launcher.runner", ["--num_gpus=2"]
            two_nodes = [f"--hostfile={hosts}", "--no_ssh", f"--node_rank={node}"]
        else:
            module, one_node = "torch.distributed.run", ["--nproc_per_node=2"]
            two_nodes = ["--nnodes=2", f"--node_rank={node}"]
        command = [sys.executable, "-m", module, *(one_node if node is None else two_nodes)]
        command += ["--master_addr=127.0.0.1", f"--master_port={port or free_port()}"]
        command += [str(ROOT / "launch" / "train.py"), "--config", str(config), f"output_dir={output_dir}"]
        return Launch([*command, *overrides], output_dir)

    return start


def losses(output_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def test_a_run(start, tmp_path):
    with start(tmp_path) as launch:
        status, output = launch.end()
    assert status == 0, output[-3000:]
    assert "2 processes" in output and len(losses(tmp_path)) == 3


@pytest.mark.slow
def test_one_node_and_two_train_alike_and_rank_0_alone_writes(start, tmp_path, monkeypatch):
    one, node_0, node_1 = (tmp_path / name for name in ("one", "node-0", "node-1"))
    port = free_port()
    with start(one) as alone:  # all at once, as launchers mostly wait
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # taken unasked only where all ranks are of one node
        with start(node_0, port=port, node=0) as first, start(node_1, port=port, node=1) as second:
            for launch in (alone, first, second):
                status, output = launch.end()
                assert status == 0, output[-3000:]
    adapter = {"adapter/adapter_model.safetensors", "adapter/adapter_config.json"}
    assert files(one) == files(node_0) == {"config.yaml", "deepspeed.json", "metrics.jsonl"} | adapter
    assert files(node_1) == set()
    assert len(losses(one)) == 3
    assert losses(node_0) == pytest.approx(losses(one), rel=TRAINED)


@pytest.mark.slow
def test_a_mistake_or_a_busy_port_is_told_in_one_line(start, launcher, tmp_path):
    key = "parallel.deepspeed.train_micro_batch_size_per_gpu"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with (
            start(tmp_path / "1", "dora.rnk=4") as first,
            start(tmp_path / "2", f"{key}=99") as second,
            start(tmp_path / "3", port=port) as third,
        ):
            statuses, outputs = zip(*(launch.end() for launch in (first, second, third)), strict=True)
    assert 0 not in statuses
    unknown, contradiction, busy = (output.splitlines() for output in outputs)
    assert unknown.count("error: dora.rnk: unknown key; did you mean 'rank'?") == 1, outputs[0]
    error = f"error: {key}: 99 contradicts train.micro_batch_size, which decides this; leave it out"
    assert contradiction.count(error) == 1, outputs[1]
    assert files(tmp_path / "1") == files(tmp_path / "2") == set()
    assert any(str(port) in line and "already in use" in line for line in busy), outputs[2]
    if launcher == "deepspeed":  # rank 0 opens the port; torchrun does so itself, and ends with its traceback
        assert "Traceback" not in outputs[2]


@pytest.mark.slow
def test_a_dead_rank_ends_the_run(start, tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    with start(tmp_path, "train.steps=100000", "log.every=1000", "parallel.strategy=zero2") as launch:
        begun = wait_until(lambda: metrics.is_file() and metrics.read_text(), SECONDS)
        assert begun and launch.launcher.poll() is None
        (pid,) = [pid for pid, environment in launch.processes().items() if environment.get("RANK") == "1"]
        os.kill(pid, signal.SIGKILL)
        status, _ = launch.end()
    assert status != 0
    assert not (tmp_path / "adapter").exists()


@pytest.fixture
def endless(tiny_llama, tiny_rows, tmp_path):
    """The arguments of a run that has to be stopped."""
    settings = {
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "dora": {"rank": 2, "targets": ["q_proj", "down_proj"]},
        "data": {"train": str(tiny_rows), "seq_len": 48},
        "train": {"steps": 10**6, "micro_batch_size": 4},
        "log": {"every": 10**6},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    return str(ROOT / "launch" / "train.py"), "--config", str(tmp_path / "c.yaml")


def trains(tmp_path: Path) -> bool:
    metrics = tmp_path / "run" / "metrics.jsonl"
    return wait_until(lambda: metrics.is_file() and metrics.read_text(), SECONDS)


def check_stopped(output: str, tmp_path: Path) -> None:
    (line,) = [line for line in output.splitlines() if line.startswith("stopped by ")]
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    step = int(saved.name.removeprefix("step-"))
    # deepspeed's process of the node sends SIGTERM at once; either may come first.
    assert re.match(rf"stopped by SIG(INT|TERM) after step {step}; its checkpoint is written", line)


def test_ctrl_c_saves_and_ends_a_run_of_one_process(endless, tmp_path):
    with Ranks(1, Path(endless[0]), *endless[1:]) as run:
        assert trains(tmp_path)
        os.kill(run.processes[0].pid, signal.SIGINT)
        ended = run.end()
    assert ended.returncode == 75, ended.stderr
    check_stopped(ended.stderr, tmp_path)
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["launch/torchrun.py", "torchrun", "deepspeed"])
def test_ctrl_c_saves_and_ends_a_run_of_several(name, endless, tmp_path):
    """Our starter says no more than the run and ends with its status. The others add their own stacks."""
    command = {
        "launch/torchrun.py": [str(ROOT / "launch" / "torchrun.py"), "--standalone", "--nproc-per-node=2"],
        "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
        "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_gpus=2", f"--master_port={free_port()}"],
    }[name]
    if name == "deepspeed" and torch.cuda.is_available():
        pytest.skip("the deepspeed launcher would show its processes the GPUs, which these tests hide")
    with Launch([sys.executable, *command, *endless], tmp_path / "run") as launch:
        assert trains(tmp_path), launch.printed()
        launch.press_ctrl_c()
        status, output = launch.end()
    check_stopped(output, tmp_path)
    if name == "launch/torchrun.py":
        assert status == 75 and "Traceback" not in output, output[-3000:]


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("--rdzv-backend=c10d --rdzv-endpoint=[fe80::1]:400", (600.0, None, "fe80::1", 400)),
        ("--rdzv-backend=c10d --rdzv-endpoint=node-a --rdzv-conf=is_host=0", (600.0, False, "node-a", 29400)),
        ("--rdzv-backend=c10d --rdzv-endpoint=a:1 --rdzv-conf=join_timeout=9,is_host=1", (9.0, True, "a", 1)),
        ("--node-rank=1 --master-addr=10.0.0.1 --master-port=7", (900.0, False, "10.0.0.1", 7)),
        ("--node-rank=1 --master-addr=10.0.0.1", (900.0, False, "10.0.0.1", 29500)),
        ("--rdzv-backend=c10d --rdzv-endpoint=a:port", "a:port"),
        ("--rdzv-backend=c10d --rdzv-endpoint=a --rdzv-conf=is_host", "expected key=value"),
        ("--rdzv-backend=c10d --rdzv-endpoint=a --rdzv-conf=is_host=1,,read_timeout=9", "expected key=value"),
    ],
)
def test_where_hosts_meet_is_read_as_torchrun_reads_it(words, meant):
    spec = importlib.util.spec_from_file_location("starter", ROOT / "launch" / "torchrun.py")
    starter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(starter)
    options = starter.run.parse_args([*words.split(), "--nnodes=2", "script.py"])
    static = options.rdzv_backend == "static"
    if isinstance(meant, str):
        with pytest.raises(UserError, match=meant):
            starter._meeting_place(options, static, 2)
    else:
        assert starter._meeting_place(options, static, 2) == meant
