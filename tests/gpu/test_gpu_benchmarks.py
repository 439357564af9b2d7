"""What `make gpu` does with its time, and with what it measured: no GPU is needed for that."""

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import gpu as gpu_script
from benchmarks import report
from benchmarks.common import results
from tests.support import ROOT
from tests.support.launch import child_environment

PART = """
import os, subprocess, sys, time
def main(arguments):
    word = arguments[0]
    if word == "refuse":
        raise SystemExit("it computes something else")
    if word == "break":
        1 / 0
    if word == "hang":
        child = subprocess.Popen(["sleep", "60"])
        with open(arguments[1], "w") as file:
            file.write(str(child.pid))
        time.sleep(60)
    if word == "succeed":
        print("ran in a process of its own:", os.getpid() != int(os.environ["PARENT"]), flush=True)
"""


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    (tmp_path / "a_part.py").write_text(PART)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PARENT", str(os.getpid()))
    monkeypatch.setattr(gpu_script, "module_of", lambda script: script)
    return gpu_script


def outcome(gpu, words, left=60.0, needs=0, limit=60):
    part = gpu.Part("a_part", words, needs, limit, "")
    return gpu.run("a part", part, Namespace(device="cuda", out=None), left)


def test_each_part_has_a_process_and_an_outcome(gpu, monkeypatch, capfd):
    monkeypatch.setattr(gpu, "cuda_begins", lambda: True)
    assert outcome(gpu, "succeed").startswith("ok, ")
    assert "ran in a process of its own: True" in capfd.readouterr().out
    assert outcome(gpu, "refuse").startswith("FAILED (exit status 1)")
    assert outcome(gpu, "break").startswith("FAILED (exit status 1)")
    told = capfd.readouterr().err
    assert "it computes something else" in told and "ZeroDivisionError" in told


def test_what_takes_too_long_is_stopped_with_its_children(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "cuda_begins", lambda: True)
    assert outcome(gpu, f"hang {tmp_path / 'pid'}", limit=4).startswith("stopped after ")
    status = Path("/proc", (tmp_path / "pid").read_text(), "status")
    deadline = time.monotonic() + 30
    while status.exists() and "zombie" not in status.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_what_does_not_fit_does_not_begin(gpu):
    assert outcome(gpu, "succeed", left=9.0, needs=10) == "not run: no time left (9 s, it needs 10 s)"
    assert outcome(gpu, "succeed", left=-3.0, needs=0) == "not run: no time left (0 s, it needs 0 s)"


def test_where_cuda_cannot_begin_in_a_fork_another_interpreter_does(gpu, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(gpu, "cuda_begins", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_part.py").write_text("import sys; print('fresh', sys.argv[1:])")
    assert outcome(gpu, "succeed").startswith("ok, ")
    assert "fresh ['succeed', '--device', 'cuda']" in capfd.readouterr().out


def test_tables_take_the_rows_of_a_gpu(monkeypatch, tmp_path):
    """Of a made-up file of results: what makes `not measured` go."""
    about = {"device": "Made-up GPU", "date": "2001-02-03", "versions": {"torch": "2.11", "peft": "0.2"}}
    way = {"seconds": {"median": 0.004}, "weight_bytes_per_second": 2e12, "scratch_bytes": 5e5}
    step = {"settings": {"four_bit": False}, "ratios": {"ours dora / peft dora": {"median": 0.51}}}
    mixture = {
        "settings": {"four_bit": True}, "saved_bytes": {"ours dora": 5e6}, "pass_ratios": {},
        "step_ratios": {"ours dora / ours lora": {"median": 1.07}},
    }  # fmt: skip
    made_up = {
        "step_time": {"a step": step},
        "norm": {"a weight": {"norms": {"ours": way, "peft": way}}, "refresh, a block": {"refresh": {}}},
        "moe": {"a mixture": mixture},
        "published": {
            "kernels: 9 of 36 layers": {
                "seconds": {"ours dora": {"median": 1.5}, "peft dora": {"median": 3.0}},
                "ratios": {"peft dora / ours dora": {"median": 2.0}},
                "peak_memory_bytes": {"ours dora": 21e9},
            }
        },
    }  # fmt: skip
    found = {script: {case: about | record for case, record in cases.items()} for script, cases in made_up.items()}
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    marks = [report.BEGIN.format(name=name) + f"\n<!-- /{name} -->\n" for name in
             ("performance", "norms", "refresh", "experts", "published")]  # fmt: skip
    assert report.updated("".join(marks)).lower().count("any gpu") == 5
    (tmp_path / "made-up-gpu.json").write_text(json.dumps(found))
    page = report.updated("".join(marks))
    assert "any gpu" not in page.lower()
    assert (
        "| Made-up GPU, a step (torch 2.11, PEFT 0.2, 2001-02-03) | not measured | 0.51 | not measured |" in page
    )
    assert "| Made-up GPU, a mixture (torch 2.11, 2001-02-03) | 1.07 | not measured | not" in page
    row = "1,500 ms, 21.0 GB | 3,000 ms | not measured | not measured | 2.00 | not measured |"
    assert f"| Made-up GPU, kernels: 9 of 36 layers (torch 2.11, peft 0.2, 2001-02-03) | {row}" in page


@pytest.mark.slow
@pytest.mark.ranks
def test_the_parts_run_on_a_cpu(tmp_path):
    """Tiny, so that all but the calls of CUDA has run once; of the tests a few, and nothing is compiled."""
    out = tmp_path / "cpu.json"
    parts = ["tests", "step, a", "step, 4", "layer", "norms", "moe", "profile", "published"]
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--out", str(out), "--only", *parts]
    environment = {**child_environment(), "PYTEST_ADDOPTS": "-k 'single-float32 or fp64'"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    summary = done.stdout.partition("\nsummary\n")[2].splitlines()
    assert len(summary) == 11 and all(": ok, " in line for line in summary), summary
    scripts = {"step_time", "layer", "memory", "moe", "norm", "published", "step_profile"}
    assert scripts <= set(json.loads(out.read_text()))
