"""launch/slurm.sbatch and launch/kubernetes.yaml do what they say, with stand-ins for Slurm and the operator."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support import ROOT
from tests.support.launch import SECONDS, Launch, child_environment, free_port, wait_until

pytestmark = pytest.mark.ranks

SRUN = """#!{python}
# A task for each node, all on this machine; as srun does, passes SIGUSR1 on and kills them for a SIGTERM; ends
# with the largest status.
import os, signal, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("-"):
    words.pop(0)
tasks = [
    subprocess.Popen(words, env={{**os.environ, "SLURM_PROCID": str(i)}})
    for i in range(int(os.environ["SLURM_JOB_NUM_NODES"]))
]
signal.signal(signal.SIGUSR1, lambda number, frame: [task.send_signal(number) for task in tasks])
signal.signal(signal.SIGTERM, lambda number, frame: [task.kill() for task in tasks])
sys.exit(max(task.wait() % 256 for task in tasks))
"""
SCONTROL = """#!/bin/sh
case "$1 $2" in
    "show hostnames") echo localhost; echo elsewhere ;;
    "show job") echo "   JobState=${STATE:-RUNNING} Reason=None"; echo "   PreemptTime=${PREEMPTED:-None}" ;;
    *) echo "$@" >> "$SCONTROL_LOG" ;;
esac
"""


@pytest.fixture
def run_yaml(tiny_llama, tiny_rows, tmp_path) -> Path:
    settings = {
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "dora": {"rank": 2, "targets": ["q_proj"]},
        "data": {"train": str(tiny_rows), "seq_len": 48},
        "train": {"steps": 100000, "micro_batch_size": 1},
        "parallel": {"strategy": "fsdp", "timeout_s": 60},
        "log": {"every": 5},
        "output_dir": str(tmp_path / "run"),
    }
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def slurm(monkeypatch, tmp_path) -> Path:
    """Stand-ins on PATH, and the variables of a job on two nodes with a process each. Returns scontrol's log."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    variables = {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "SCONTROL_LOG": str(tmp_path / "scontrol.log"),
        "SLURM_JOB_ID": str(os.getpid()),  # the port is made of it
        "SLURM_JOB_NODELIST": "nodes[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    return tmp_path / "scontrol.log"


def steps(directory: Path) -> list[int]:
    path = directory / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def begun(directory: Path) -> bool:
    return wait_until(lambda: len(steps(directory)) > 2, SECONDS)


def job(run_yaml: Path, tmp_path: Path, *overrides: str) -> Launch:
    script = ROOT / "launch" / "slurm.sbatch"
    return Launch(["bash", str(script), "--config", str(run_yaml), *overrides], tmp_path)


@pytest.mark.slow
def test_before_its_time_limit_a_job_saves_and_requeues_itself_and_then_goes_on(slurm, run_yaml, tmp_path):
    with job(run_yaml, tmp_path) as launch:
        assert begun(tmp_path / "run"), launch.printed()
        launch.launcher.send_signal(signal.SIGUSR1)
        status, output = launch.end()
    assert status == 75, output[-3000:]
    assert slurm.read_text() == f"requeue {os.environ['SLURM_JOB_ID']}\n"
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    last = int(saved.name.removeprefix("step-"))
    with job(run_yaml, tmp_path, f"train.steps={last + 5}") as launch:
        status, output = launch.end()
    assert status == 0, output[-3000:]
    assert f"after step {last} of {last + 5}" in output
    assert steps(tmp_path / "run") == sorted({*range(5, last + 6, 5), 1, last + 5})
    assert slurm.read_text().count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preempted", "state"),
    [("", "CANCELLED"), ("2026-01-01T12:00:00", "RUNNING"), ("2026-01-01T12:00:00", "CANCELLED")],
)
def test_a_job_that_is_cancelled_saves_and_stays_away_and_a_preempted_one_comes_back(
    preempted, state, slurm, run_yaml, tmp_path, monkeypatch
):
    monkeypatch.setenv("PREEMPTED", preempted)
    monkeypatch.setenv("STATE", state)
    with job(run_yaml, tmp_path) as launch:
        assert begun(tmp_path / "run"), launch.printed()
        launch.launcher.send_signal(signal.SIGTERM)
        status, output = launch.end()
    assert status == 75, output[-3000:]
    assert slurm.exists() == (bool(preempted) and state == "RUNNING")
    assert (tmp_path / "run" / "checkpoints").exists()


def test_a_mistake_is_told_and_not_tried_again(slurm, run_yaml, tmp_path):
    with job(run_yaml, tmp_path, "dora.rnk=4") as launch:
        status, output = launch.end()
    assert (status, slurm.exists()) == (2, False)
    assert "error: dora.rnk: unknown key; did you mean 'rank'?" in output.splitlines()


@pytest.mark.slow
def test_the_pods_of_kubernetes_train_and_their_status_says_whether_to_try_again(run_yaml, tmp_path, monkeypatch):
    specs = yaml.safe_load((ROOT / "launch" / "kubernetes.yaml").read_text())["spec"]["pytorchReplicaSpecs"]
    assert list(specs) == ["Master", "Worker"]
    assert specs["Master"]["template"] == specs["Worker"]["template"]
    (container,) = specs["Master"]["template"]["spec"]["containers"]
    assert (ROOT / container["args"][1]).is_file()
    variables = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "localhost"}
    for name, value in {**variables, "PET_MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(ROOT)

    def pod(rank: int) -> Launch:
        monkeypatch.setenv("PET_NODE_RANK", str(rank))
        return Launch([*container["command"], "--config", str(run_yaml)], tmp_path / f"pod-{rank}")

    with pod(0) as master, pod(1) as worker:
        assert begun(tmp_path / "run"), master.printed()
        worker.launcher.send_signal(signal.SIGTERM)  # an eviction: the whole run stops with a checkpoint
        ends = [launch.end() for launch in (master, worker)]
    assert [status for status, _ in ends] == [138, 138], ends
    assert list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("node", "missing"), [(0, "only 1 of 2 hosts came"), (1, "does not reach 127.0.0.1")])
def test_a_host_that_stays_alone_says_so(node, missing):
    command = [
        sys.executable, str(ROOT / "launch" / "torchrun.py"), "--nnodes=2", f"--node-rank={node}",
        "--master-addr=127.0.0.1", f"--master-port={free_port()}", "--rdzv-conf=timeout=2",
        str(ROOT / "launch" / "train.py"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=child_environment())
    assert done.returncode == 69
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert missing in line and f"(node rank {node})" in line and line.endswith("within 2 s")


@pytest.mark.slow
def test_a_killed_rank_is_named_with_its_host_and_signal(run_yaml, tmp_path):
    command = [sys.executable, str(ROOT / "launch" / "torchrun.py"), "--standalone", "--nproc-per-node=2"]
    with Launch([*command, str(ROOT / "launch" / "train.py"), "--config", str(run_yaml)], tmp_path) as launch:
        assert begun(tmp_path / "run"), launch.printed()
        os.kill(launch.rank(1), signal.SIGKILL)
        status, output = launch.end()
    assert status == 128 + signal.SIGKILL
    assert f"error: rank 1 ({os.uname().nodename}) was killed by SIGKILL" in output.splitlines()
