"""Where benchmarks put their numbers: one JSON file per device, a key per script, and below it one per case."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the clone's dora_dist, installed or not
RESULTS = Path(__file__).resolve().parent / "results"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()} CPU"


def default_path(device: torch.device) -> Path:
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-") + ".json")


def save(path: Path, script: str, case: str, device: torch.device, record: dict[str, Any]) -> None:
    """Put `record` at [script][case] of the file; everything else in it stays. What ends this process leaves the
    file as it was or as it will be."""
    everything = json.loads(path.read_text()) if path.is_file() else {}
    everything.setdefault(script, {})[case] = {**environment(device), **record}
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_text(json.dumps(everything, indent=2) + "\n")
    new.replace(path)


def environment(device: torch.device) -> dict[str, Any]:
    packages = ("torch", "triton", "transformers", "peft", "bitsandbytes", "deepspeed")
    versions = {name: _version(name) for name in packages}
    if device.type == "cuda":
        versions |= {"python": platform.python_version(), "cuda": torch.version.cuda, "driver": driver_version()}
    return {"device": device_name(device), "date": datetime.date.today().isoformat(), "versions": versions}


@cache
def driver_version() -> str | None:
    """That of NVIDIA's driver, as its own tool tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return told[0] if told else None


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(seconds: dict[str, list[float]], pairs: list[tuple[str, str]]) -> dict[str, dict[str, float]]:
    """Of the pairs that were measured: each round's own ratio, and that of the medians."""
    found = {}
    for name, other in pairs:
        if name in seconds and other in seconds:
            each_round = [a / b for a, b in zip(seconds[name], seconds[other], strict=True)]
            of_medians = statistics.median(seconds[name]) / statistics.median(seconds[other])
            found[f"{name} / {other}"] = {**spread(each_round), "of_medians": of_medians}
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that all benchmarks share."""
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="JSON file to add to; default: benchmarks/results/<device>.json")


def chosen_device(name: str | None) -> torch.device:
    """cuda where there is one, unless told; a CPU computes in one thread, whose time is the least noisy."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu":
        torch.set_num_threads(1)
    return device


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
