"""The numeric tests as other machines run them: with the instructions of older CPUs, with one thread and with two.

usage: cpus.py [PYTHON...]

Each PYTHON (this one by default) is that of an environment with our dependencies, torch 2.11 or later, and pytest.
What this machine's CPU lacks is skipped, by name.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NUMERIC = """
    unit/dora/test_functional unit/dora/test_layers unit/quant/test_nf4 unit/models/test_head_loss
    unit/models/test_attention runs/test_compile unit/dora/test_inject unit/adapters/test_peft
    unit/adapters/test_adapter unit/models/test_merge unit/models/test_merge_renamed unit/models/test_weights
    unit/quant/test_bitsandbytes_files unit/parallel/test_optimizer_state unit/data/test_batches runs/test_cli
    unit/training/test_train unit/training/test_preference
    """.split()
REFUSALS = "mistake or refused or half_way or moved or sampling or test_cli"  # the same everywhere
COMPUTING = f"not ({REFUSALS}) or first_loss or starts_where_it_ended or runs_learn"
IN_ONE_PROCESS = (NUMERIC, "not ranks and not gpu", COMPUTING)
ONCE = [  # These take long: under one setting, after all others. The first two compute with kernels of their own.
    (
        ["unit/dora/test_kernels", "unit/training/test_optim", "runs/test_classification"],
        "not slow and not ranks and not gpu",
        "",
    ),
    (
        [*NUMERIC, "unit/training/test_optim", "runs/test_classification", "ranks/test_strategies"],
        "ranks and not slow and not gpu",
        "",
    ),
]


def limits(aten: str, onednn: str, **mkl: str) -> dict[str, str]:
    """Variables that hold the libraries under torch to some instructions."""
    return {"ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn, **{f"MKL_{k}": v for k, v in mkl.items()}}


AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq")
SETTINGS = {  # variables, threads, flags of the CPU that it takes
    "SSE, 1 thread": (limits("default", "SSE41", ENABLE_INSTRUCTIONS="SSE4_2"), 1, ("sse4_2",)),
    "AVX2, 1 thread": (limits("avx2", "AVX2", ENABLE_INSTRUCTIONS="AVX2"), 1, ("avx2", "fma")),
    "AVX2, 2 threads": (limits("avx2", "AVX2", ENABLE_INSTRUCTIONS="AVX2"), 2, ("avx2", "fma")),
    "AVX2, as MKL serves other vendors": (limits("avx2", "AVX2", CBWR="COMPATIBLE"), 1, ("avx2", "fma")),
    "AVX-512, 1 thread": (limits("avx512", "AVX512_CORE", ENABLE_INSTRUCTIONS="AVX512"), 1, AVX512),
    "AVX-512, 2 threads": (limits("avx512", "AVX512_CORE", ENABLE_INSTRUCTIONS="AVX512"), 2, AVX512),
}
ONCE_UNDER = "AVX2, 1 thread"
TOOK_HOLD = "import torch as t; print(t.__version__, t.backends.cpu.get_cpu_capability(), t.get_num_threads())"


def run(python: str, name: str, files: list[str], marks: str, which: str) -> bool:
    """Whether all tests of those files pass there; the end of what pytest says is printed."""
    variables, threads, _ = SETTINGS[name]
    openmp = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}  # the machine may be busy
    environment = {**os.environ, **variables, **openmp, "PYTHONPATH": str(ROOT)}

    def call(*command: str) -> subprocess.CompletedProcess:
        return subprocess.run([python, *command], cwd=ROOT, env=environment, capture_output=True, text=True)

    found = call("-c", TOOK_HOLD)
    if found.returncode:
        sys.exit(f"cpus.py: {python}: {found.stderr.strip().splitlines()[-1]}")
    torch, instructions, count = found.stdout.split()
    held = instructions.lower(), int(count)
    assert held == (variables["ATEN_CPU_CAPABILITY"], threads), f"{name}: {found.stdout}"
    begun = time.monotonic()
    paths = [f"tests/{file}.py" for file in files]
    tests = call("-m", "pytest", "-p", "no:cacheprovider", "-m", marks, "-k", which, *paths)
    seconds = time.monotonic() - begun
    about = f"torch {torch}, {name}" + ("" if files == NUMERIC else f", {files[-1]}")
    print(f"{about}: {tests.stdout.strip().splitlines()[-1]} [{seconds:.0f} s]", flush=True)
    if tests.returncode:
        print(tests.stdout[-8000:] + tests.stderr[-2000:], flush=True)
    return tests.returncode == 0


def main(pythons: list[str]) -> int:
    flags = set(re.findall(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)[0].split())
    good = True
    runs = [(name, IN_ONE_PROCESS) for name in SETTINGS] + [(ONCE_UNDER, tests) for tests in ONCE]
    for name, tests in runs:
        needed = SETTINGS[name][2]
        if not flags.issuperset(needed):
            print(f"{name}: skipped, this CPU has no {', '.join(sorted({*needed} - flags))}")
            continue
        for python in pythons:
            good = run(python, name, *tests) and good
    return not good


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or [sys.executable]))
