"""What `make gpu` runs: the tests that need a GPU, then the benchmarks, within 8 minutes, installing nothing.

Any Python with torch 2.11 or later, transformers and pytest will do. What a missing package leaves out is named.
The numbers go to benchmarks/results/<device>.json, each as it is measured. Without a CUDA device nothing is
measured, and the exit status is 0.

The parts run one after the other, the most valuable first, each in a process that is forked from this one, which
has imported the libraries and never touches the GPU. A part may take what is left of the time, up to a limit of
its own.

    python benchmarks/gpu.py [--seconds 470] [--only step ...] [--device cpu]     (cpu: tiny, to try the script)
"""

import argparse
import importlib
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = [
    "torch",
    *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "qwen3", "qwen3_moe")),
    "peft",
]
# No plugin is counted on: pyproject's addopts, written for `make test`, are left aside.
PYTEST = "-p no:cacheprovider -o addopts= -q -rs -m gpu".split()
TESTS = """
    tests/gpu/test_gpu_runs.py
    tests/gpu/test_gpu.py
    tests/gpu/test_gpu_experts.py
    tests/unit/dora/test_kernels.py
    tests/unit/models/test_attention.py
    tests/unit/training/test_host_waits.py
""".split()
COMPILED = "tests/gpu/test_gpu_runs.py::test_losses_are_those_of_a_cpu[compile-bfloat16]"  # may take a minute
STEP_TINY = "--hidden 64 --layers 1 --tokens 8 --batch 2 --rank 4 --rounds 1"
MOE_TINY = "--hidden 64 --intermediate 32 --experts 4 --top-k 2 --tokens 16 --rank 4 --rounds 1"


class Part(NamedTuple):
    script: str  # of step/, or pytest
    arguments: str
    needs: int  # seconds: with fewer left it does not begin
    limit: int  # seconds, after which it is stopped
    tiny: str = STEP_TINY


PARTS = {
    "tests": Part("pytest", f"--deselect {COMPILED}", 30, 220, ""),
    "step": Part("step_time", "", 15, 40),
    "step, activation checkpointing": Part("step_time", "--checkpointing", 15, 40),
    "layer": Part("layer", "--dtypes bfloat16 --ranks 16 384", 15, 40, "--shapes 32x48 --tokens 8 --rounds 1"),
    "norms": Part("norm", "", 15, 40, "--weights 24x16x4 --ranks 1 2 --hidden 256 --intermediate 64 --rounds 1"),
    "moe": Part("moe", "", 15, 40, MOE_TINY),
    "published: arXiv 2603.22276": Part("published", "kernels", 30, 80, "--tiny"),
    "published: MetaMathQA": Part("published", "metamathqa", 25, 60, "--tiny"),
    "step, rank 384": Part("step_time", "--rank 384", 15, 40),
    "step, 4-bit": Part("step_time", "--four-bit", 15, 40, f"{STEP_TINY} --dtype bfloat16"),
    "moe, 4-bit": Part("moe", "--four-bit", 15, 40, MOE_TINY),
    "profile": Part("step_profile", "", 15, 30),
    "compiled tests": Part("pytest", COMPILED, 30, 90, ""),
    "step, compiled": Part("step_time", "--compile", 45, 90),
    "published: arXiv 2603.22276, all layers": Part(
        "published", "kernels --layers 36 --rounds 1 --contenders|ours dora|peft dora", 75, 120, "--tiny"
    ),
}  # fmt: skip


def main() -> int:
    args = parse()
    end = time.monotonic() + args.seconds
    os.environ.update(prepared_environment(args.device))
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT)]
    if find_spec("torch") is None:
        print(f"gpu: {sys.executable} has no torch; name a Python with it: make gpu PYTHON=...", file=sys.stderr)
        return 2
    device = name_device() if args.device == "cuda" else "a CPU, to try the script"
    if not device:
        print("gpu: no CUDA device here; nothing was tested or measured")
        return 0
    print(f"gpu: {device}", flush=True)
    if "peft" in [name for name in IMPORTED if not imports(name)]:
        print("gpu: comparisons with PEFT: not run: no peft")
    elif find_spec("bitsandbytes") is None:
        print("gpu: comparisons with PEFT in 4 bits: not run: no bitsandbytes")
    outcomes = {}
    for name, part in PARTS.items():
        if not args.only or any(name.startswith(only) for only in args.only):
            outcomes[name] = run(name, part, args, end - time.monotonic())
    print("\nsummary")
    for name, outcome in outcomes.items():
        print(f"  {name}: {outcome}")
    return int(any(outcome.startswith("FAILED") for outcome in outcomes.values()))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file to add to; default: benchmarks/results/<device>.json")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: tiny, to try the script")
    parser.add_argument("--seconds", type=float, default=470, help="for all; stopping the last takes up to 10")
    parser.add_argument("--only", nargs="+", metavar="PART", help="those whose names begin so")
    args = parser.parse_args()
    if args.device == "cpu" and args.out is None:
        parser.error("--device cpu needs --out: what it writes is no measurement")
    args.out = args.out and args.out.resolve()
    return args


def prepared_environment(device: str) -> dict[str, str]:
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    return {
        "PYTHONPATH": path,
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asking whether there is a GPU does not spoil it for forks
        "OMP_NUM_THREADS": str(min(8, os.cpu_count() or 1)) if device == "cuda" else "1",
        "GPU_TESTS_DEVICE": device,
        **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}),
    }


def imports(name: str) -> bool:
    """Imported here, a library is there in all parts. Those that may touch the GPU while they are imported
    (bitsandbytes, DeepSpeed) are left to the parts."""
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def name_device() -> str:
    """By another interpreter, because this process must not touch the GPU; empty where there is none."""
    script = """if True:
        import sys, torch
        if torch.cuda.is_available():
            from benchmarks.common.results import driver_version
            about = torch.cuda.get_device_properties(0)
            print(f"{about.name} (sm_{about.major}{about.minor}, {about.total_memory / 1e9:.0f} GB), driver "
                  f"{driver_version()}, torch {torch.__version__}")
    """
    return subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True).stdout.strip()


def run(name: str, part: Part, args: argparse.Namespace, left: float) -> str:
    """'ok', or in a word what went wrong; the output goes to the terminal."""
    if part.script == "pytest" and not imports("pytest"):
        return "not run: no pytest"
    if left < part.needs:
        return f"not run: no time left ({max(0, left):.0f} s, it needs {part.needs} s)"
    seconds = min(left, part.limit if args.device == "cuda" else left)
    arguments = arguments_of(part, args, seconds)
    print(f"\n{name}: {part.script} {' '.join(arguments)}   (up to {seconds:.0f} s)", flush=True)
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        be_the_part(part.script, arguments, args.device)
    try:
        status = wait(child, start + seconds)
    except BaseException:  # Ctrl-C reaches this process alone
        kill(child, signal.SIGKILL)
        raise
    took = time.monotonic() - start
    if status is None:
        return f"stopped after {took:.0f} s; what was measured until then is written"
    if status:
        return f"FAILED (exit status {status}) after {took:.0f} s"
    return f"ok, {took:.0f} s"


def arguments_of(part: Part, args: argparse.Namespace, seconds: float) -> list[str]:
    head, *rest = part.arguments.split("|")  # after a bar: arguments with spaces in them
    own = [*head.split(), *rest]
    if part.script == "pytest":
        files = [name for name in TESTS if args.device == "cuda" or "gpu" in name]
        return [*PYTEST, *own, *(files if COMPILED not in own[:1] else [])]
    if args.device == "cpu":
        own += part.tiny.split()
    if part.script == "published":
        own += ["--seconds", f"{0.5 * seconds:.0f}"]  # rounds begin until then
    return [*own, "--device", args.device, *(["--out", str(args.out)] if args.out else [])]


def be_the_part(script: str, arguments: list[str], device: str) -> None:
    """The rest of a forked process. Where CUDA cannot begin in a fork, a fresh interpreter takes its place."""
    status = 1
    try:
        os.setpgid(0, 0)
        if device == "cuda" and not cuda_begins():
            os.execv(sys.executable, [sys.executable, "-m", module_of(script), *arguments])
        module = importlib.import_module(module_of(script))
        status = int(module.main(arguments) or 0)
    except SystemExit as told:
        if isinstance(told.code, str):
            print(told.code, file=sys.stderr)
        status = told.code if isinstance(told.code, int) else int(told.code is not None)
    except BaseException:  # nothing may return into the parent's code
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def module_of(script: str) -> str:
    return script if script == "pytest" else f"benchmarks.step.{script}"


def cuda_begins() -> bool:
    import torch

    try:
        torch.cuda.init()
    except RuntimeError:
        return False
    return True


def wait(child: int, end: float) -> int | None:
    """Its exit status; None where it was stopped because the time was over, with all that it had started. One that
    does not even die (in a driver that hangs) is left behind."""
    stopping = [signal.SIGTERM, signal.SIGKILL]
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return code if len(stopping) == 2 else None
        if time.monotonic() > end:
            if not stopping:
                return None
            kill(child, stopping.pop(0))
            end = time.monotonic() + 5
        time.sleep(0.05)


def kill(child: int, by: signal.Signals) -> None:
    """With all that it has started, where it has begun a group of its own."""
    try:
        os.killpg(child, by)
    except ProcessLookupError:
        os.kill(child, by)


if __name__ == "__main__":
    sys.exit(main())
