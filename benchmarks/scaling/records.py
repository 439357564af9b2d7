"""The records of steps: where they lie, what they say of all ranks and rounds, and how rounds are added."""

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.results import default_path, show, spread, write
from dora_dist.errors import UserError

SAME = ("device", "versions", "mode", "strategy", "world_size", "hosts", "link", "settings")  # or no --append


def link_of(args: argparse.Namespace, hosts: int) -> str | dict[str, float]:
    """What the records say of the network."""
    if args.mbit is not None or args.delay_ms:
        return {"mbit": args.mbit, "delay_ms": args.delay_ms}
    return args.link or ("one host" if hosts == 1 else "not told")


def link_text(link: str | dict[str, Any]) -> str:
    if isinstance(link, str):
        return link
    rate = f"{link['mbit']:g} Mbit/s" if link["mbit"] else "any rate"
    return f"hosts at {rate}, {link['delay_ms']:g} ms"


def directory_of(args: argparse.Namespace, about: dict[str, Any]) -> Path:
    if args.out:
        return args.out
    text = about["link"]
    if not isinstance(text, str):
        rate = "any" if text["mbit"] is None else f"{text['mbit']:g}"
        text = f"{rate} mbit {text['delay_ms']:g} ms"
    device = default_path(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return device.parent / "scaling" / device.stem / re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def over_ranks(ranks: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """One round: the slowest rank's step and norms; of the waits the largest sum and the smallest, with phases."""
    sums = [sum(rank["waited"].values()) for rank in ranks]
    most, least = sums.index(max(sums)), sums.index(min(sums))
    return {
        "probe_seconds": max(rank["probe"] for rank in ranks),
        "step_seconds": max(rank["step"] for rank in ranks),
        "norm_seconds": max(rank["norms"] for rank in ranks),
        "waited_most": ranks[most]["waited"],
        "waited_least": ranks[least]["waited"],
    }


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """What a record says of all its rounds."""
    rounds, settings = record["rounds"], record["settings"]
    tokens = record["world_size"] * settings["tokens_per_rank"]
    steps = spread([turn["step_seconds"] for turn in rounds])
    found: dict[str, Any] = {
        "tokens_per_second": spread([tokens / turn["step_seconds"] for turn in rounds]),
        "step_seconds": steps,
        "norm_seconds": spread([turn["norm_seconds"] for turn in rounds]),
        "probe_seconds": spread([turn["probe_seconds"] for turn in rounds]),
        "norm_share": statistics.median(turn["norm_seconds"] / turn["step_seconds"] for turn in rounds),
    }
    if "profiled_exposed_seconds" in record:
        return found | {"exposed_seconds": {k: spread([v]) for k, v in record["profiled_exposed_seconds"].items()}}
    ends = {"most": "waited_most", "least": "waited_least"}
    found["exposed_seconds"] = {
        end: spread([sum(turn[key].values()) for turn in rounds]) for end, key in ends.items()
    }
    found["exposed_by_phase"] = {
        end: {phase: statistics.median(turn[key][phase] for turn in rounds) for phase in rounds[0][key]}
        for end, key in ends.items()
    }
    return found


def save(directory: Path, record: dict[str, Any], append: bool) -> None:
    """Write one record; `append`: with the rounds of the one that is there. UserError: it is of something else."""
    about = "links" if record["kind"] == "links" else f"{record['mode']}-{record['strategy']}"
    path = directory / f"{about}-{record['world_size']:05}-ranks-{record['hosts']}-hosts.json"
    if append and path.is_file():
        before = json.loads(path.read_text())
        other = [key for key in SAME if before.get(key) != record.get(key)]
        if other:
            there, here = before.get(other[0]), record.get(other[0])
            raise UserError(f"--append: {str(path)!r} has another {other[0]} ({there}, here {here}); change --out")
        record["rounds"] = before["rounds"] + record["rounds"]
        if record["peak_memory_bytes"] is not None:
            record["peak_memory_bytes"] = max(record["peak_memory_bytes"], before["peak_memory_bytes"] or 0)
        record |= summary(record)
    write(path, record)
    if record["kind"] == "step":
        show(path.stem, record)
    print(f"  {path}", flush=True)
