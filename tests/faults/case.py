"""A small run for the faults: packing, shuffling, dropout, accumulation, and a checkpoint every two steps."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.support import ROOT
from tests.support.launch import Launch, free_port
from tests.support.models import make_rows, make_tiny_llama
from tests.support.ranks import run_ranks

INJECT = ROOT / "tests" / "faults" / "inject.py"
STEPS = 12


@dataclass(frozen=True)
class Ended:
    status: int
    output: str


class Case:
    """Runs in one scratch directory."""

    def __init__(self, scratch: Path, make_model: Callable[[Path], object] = make_tiny_llama, **settings: object):
        self.scratch = scratch
        if not (scratch / "model").is_dir():
            make_model(scratch / "model")
            make_rows(scratch / "rows.jsonl", 96)
        self.config = scratch / "c.yaml"
        tree = {
            "model": {"path": str(scratch / "model"), "dtype": "float32"},
            "dora": {"rank": 2, "targets": "all-linear", "dropout": 0.1},
            "data": {"train": str(scratch / "rows.jsonl"), "seq_len": 64, "packing": True},
            "train": {"steps": STEPS, "micro_batch_size": 1, "accumulation": 2, "lr": 0.02},
            "parallel": {"timeout_s": 30},
            "checkpoint": {"every": 2},
        }
        self.config.write_text(yaml.safe_dump(tree))
        self.overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]

    def command(
        self,
        name: str,
        ranks: int,
        *overrides: str,
        restarts: int = 0,
        launcher: str = "torchrun",
        port: int | None = None,
    ) -> list[str]:
        arguments = [str(INJECT), "--config", str(self.config), f"output_dir={self.scratch / name}"]
        arguments += [*self.overrides, *overrides]
        if launcher == "python":
            return [sys.executable, *arguments]
        if launcher == "deepspeed":
            start = ["deepspeed.launcher.runner", f"--num_gpus={ranks}", f"--master_port={port or free_port()}"]
            return [sys.executable, "-m", *start, "--master_addr=127.0.0.1", *arguments]
        start = [
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            f"--max-restarts={restarts}",
        ]
        return [sys.executable, "-m", *start, *arguments]

    def launch(self, name: str, ranks: int, *overrides: str, faults: str = "", **options) -> Launch:
        os.environ["DORA_DIST_FAULTS"] = faults
        return Launch(self.command(name, ranks, *overrides, **options), self.scratch / name)

    def run(self, name: str, ranks: int, *overrides: str, faults: str = "", **options) -> Ended:
        """One run to its end; none of its processes may outlive it. The launcher "none": ranks that are forked."""
        if options.get("launcher") == "none":
            os.environ["DORA_DIST_FAULTS"] = faults
            arguments = self.command(name, ranks, *overrides, launcher="python")[2:]
            done = run_ranks(ranks, INJECT, *arguments, timeout=600)
            return Ended(done.returncode, done.stdout + done.stderr)
        with self.launch(name, ranks, *overrides, faults=faults, **options) as launch:
            return Ended(*launch.end(600))

    def curve(self, name: str) -> list[tuple]:
        """(step, loss, gradient norm) of every training line; each step must stand there once."""
        path = self.scratch / name / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]

    def steps(self, name: str) -> list[int]:
        """Of the checkpoints."""
        return sorted(int(p.name[5:]) for p in (self.scratch / name / "checkpoints").glob("step-*"))

    def orphans(self, name: str) -> list[str]:
        return [str(p) for p in (self.scratch / name).rglob(".*")]

    def forget(self, name: str) -> None:
        shutil.rmtree(self.scratch / name, ignore_errors=True)
