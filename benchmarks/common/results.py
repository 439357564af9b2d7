"""Where benchmarks put their numbers: one JSON file per device, a key per script, and below it one per case.

Imports torch alone, as `make gpu` does.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
_NOT_SHOWN = ("device", "date", "versions", "settings", "published", "rounds", "assumptions")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()} CPU"


def default_path(device: torch.device) -> Path:
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-") + ".json")


def save(
    path: Path, script: str, case: str, device: torch.device, record: dict[str, Any], shown: bool = True
) -> None:
    """Show `record`, and put it at [script][case] of the file; everything else in it stays."""
    if shown:
        show(f"{script}: {case}", record)
    everything = json.loads(path.read_text()) if path.is_file() else {}
    everything.setdefault(script, {})[case] = {**environment(device), **record}
    write(path, everything, indent=2)


def write(path: Path, content: dict[str, Any], indent: int = 1) -> None:
    """What ends this process leaves the file as it was or as it will be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_text(json.dumps(content, indent=indent) + "\n")
    new.replace(path)


def records(script: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(case, record) of every device that `script` ran on."""
    for path in sorted(RESULTS.glob("*.json")):
        yield from json.loads(path.read_text()).get(script, {}).items()


def environment(device: torch.device) -> dict[str, Any]:
    packages = ("torch", "triton", "transformers", "trl", "accelerate", "peft", "bitsandbytes", "deepspeed")
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


def show(title: str, record: dict[str, Any]) -> None:
    """Print what a record found, under its own keys, which name the units."""
    print(title)
    for key, value in record.items():
        if key in _NOT_SHOWN:
            continue
        nested = isinstance(value, dict) and any(isinstance(of, dict) for of in value.values())
        print(f"  {key}" + ("" if nested else f": {_text(value)}"), flush=True)
        for name, row in value.items() if nested else ():
            print(f"    {name:28} {_text(row)}", flush=True)


def _text(value: Any) -> str:
    if isinstance(value, dict) and {"median", "min", "max"} <= set(value):
        rest = {key: of for key, of in value.items() if key not in ("median", "min", "max")}
        return f"{value['median']:.4g} ({value['min']:.4g} .. {value['max']:.4g}) {_text(rest)}".rstrip()
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(of)}" for key, of in value.items())
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,d}" if isinstance(value, int) else str(value)


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """With the options that all benchmarks of one device share."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="JSON file to add to; default: benchmarks/results/<device>.json")
    return parser


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
