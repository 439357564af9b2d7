"""What `make gpu` runs: the tests that need a GPU, then the benchmarks, within 8 minutes, installing nothing.

Any Python with torch 2.11 or later, transformers and pytest will do; dora_dist need not be installed, and PEFT is
compared with where it is there. The numbers go to benchmarks/results/<device>.json. Without a CUDA device nothing
is measured, and the exit status is 0.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUDGET_SECONDS = 8 * 60
# No plugin is counted on: pyproject's addopts, written for `make test`, are left aside.
PYTEST = [
    "-m",
    "pytest",
    "-p",
    "no:cacheprovider",
    "-o",
    "addopts=",
    "-q",
    "-rs",
    "-m",
    "gpu",
    "tests/test_gpu.py",
    "tests/test_kernels.py",
    "tests/test_attention.py",
    "tests/test_host_waits.py",
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file to add to; default: benchmarks/results/<device>.json")
    args = parser.parse_args()
    try:
        import torch
    except ImportError:
        print(
            f"gpu: {sys.executable} has no torch; name a Python that has it: make gpu PYTHON=...", file=sys.stderr
        )
        return 2
    if not torch.cuda.is_available():
        print("gpu: no CUDA device here; nothing was tested or measured")
        return 0
    print(f"gpu: {torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    deadline = time.monotonic() + BUDGET_SECONDS
    outcomes = {name: run(command, deadline) for name, command in commands(args.out).items()}
    print("\nsummary")
    for name, outcome in outcomes.items():
        print(f"  {name}: {outcome}")
    return int(any(outcome != "ok" for outcome in outcomes.values()))


def commands(out: Path | None) -> dict[str, list[str]]:
    shared = ["--device", "cuda", *(["--out", str(out.resolve())] if out else [])]
    step = ["benchmarks/step_time.py", *shared]
    return {
        "tests": PYTEST,
        "step, rank 16": step,
        "step, rank 384": [*step, "--rank", "384"],
        "step, rank 16, activation checkpointing": [*step, "--checkpointing"],
        "step, 4-bit": [*step, "--four-bit"],
        "step, compiled": [*step, "--compile"],
        "memory": ["benchmarks/memory.py", *shared],
        "memory, activation checkpointing": ["benchmarks/memory.py", *shared, "--checkpointing"],
        "memory, 4-bit": ["benchmarks/memory.py", *shared, "--four-bit"],
        "profile": ["benchmarks/step_profile.py", *shared],
        "layer": ["benchmarks/layer.py", *shared, "--dtypes", "bfloat16"],
        "norms": ["benchmarks/norm.py", *shared],
    }


def run(command: list[str], deadline: float) -> str:
    """'ok', or in a word what went wrong; the output goes to the terminal."""
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    print(f"\n$ {' '.join(command)}", flush=True)
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, timeout=max(1.0, deadline - time.monotonic())
        )
    except subprocess.TimeoutExpired:
        return f"stopped: the {BUDGET_SECONDS // 60} minutes were over"
    return "ok" if done.returncode == 0 else f"FAILED (exit status {done.returncode})"


if __name__ == "__main__":
    sys.exit(main())
