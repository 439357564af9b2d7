"""What a step of the real code would hold, send and take on 8 to 4096 GPUs, without any.

Each case is rehearsed (dora_dist/rehearse.py): the real model, sharded by the real engine over a fake process
group of that size, on fake tensors. Counts and bytes of collectives are exact; times come from dora_dist/cost.py
with the makers' rates, and efficiency is tokens per second and GPU over those of the smallest world that the
case fits in. Weak scaling: every GPU has 4 rows of 4096 tokens, with activation checkpointing.

"peft" is PEFT's way of computing DoRA: in every forward and every recomputation BA is multiplied out and the
norm taken of the whole weight, which FSDP2 has gathered; PEFT's own arithmetic on our layers' parameters.

    python benchmarks/simulate.py [--cases "8B fsdp" ...] [--worlds 8 64 512 4096] [--gpu h100 --net 400g]
"""

import argparse
import datetime
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from _results import RESULTS
from _shapes import write_shape
from torch import Tensor

from dora_dist import trainer
from dora_dist.config import (
    DataConfig,
    DoraConfig,
    ModelConfig,
    ParallelConfig,
    QuantConfig,
    RunConfig,
    TrainConfig,
)
from dora_dist.cost import step_time
from dora_dist.hardware import ASSUMPTIONS, Cluster, find_cluster
from dora_dist.layers import DoraLinear
from dora_dist.rehearse import Job, Rehearsals, Rehearsed

OUT = RESULTS / "simulation" / "weak.json"
TOKENS, ROWS = 4096, 4
NODE = 8
CASES = [
    "8B fsdp", "8B hybrid", "8B zero3", "8B peft", "8B 4-bit fsdp", "8B 4-bit hybrid",
    "70B fsdp", "70B zero3", "70B peft", "70B 4-bit fsdp", "70B 4-bit hybrid", "405B fsdp", "405B 4-bit fsdp",
]  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    everything = json.loads(args.out.read_text()) if args.out.is_file() else {}
    here = about(args)
    for name in ("gpu", "net", "rows_per_gpu", "tokens_per_row", "micro_batch"):
        there = everything.get("about", here)[name]
        if there != here[name]:
            raise SystemExit(f"error: {args.out} was simulated with another {name}: {there}; give another --out")
    with tempfile.TemporaryDirectory() as directory, Rehearsals() as rehearse:
        for case in args.cases:
            for world in args.worlds:
                found = simulate(case, world, args, Path(directory), rehearse)
                everything.setdefault(case, {})[str(world)] = found
                everything["about"] = here
                args.out.write_text(json.dumps(everything, indent=1) + "\n")
                print_row(case, world, found)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, metavar="CASE")
    parser.add_argument("--worlds", type=int, nargs="+", default=[8, 64, 512, 4096], metavar="N")
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--net", default="400g", help="Gb/s of each GPU between machines")
    parser.add_argument("--micro", type=int, default=ROWS, help="rows of a micro-batch; the rest is accumulated")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(arguments)
    if args.micro < 1 or ROWS % args.micro:
        parser.error(f"--micro: {args.micro} does not divide the {ROWS} rows of a step")
    return args


def about(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "gpu": args.gpu, "net": args.net, "tokens_per_row": TOKENS, "rows_per_gpu": ROWS,
        "micro_batch": args.micro,
        "torch": torch.__version__, "date": datetime.date.today().isoformat(), "assumptions": list(ASSUMPTIONS),
    }  # fmt: skip


def simulate(
    case: str, world: int, args: argparse.Namespace, directory: Path, rehearse: Rehearsals
) -> dict[str, Any]:
    shape, *_, way = case.split()
    cluster = find_cluster(args.gpu, world, max(1, world // NODE), args.net)
    config = run_config(write_shape(shape, directory), way, "4-bit" in case, cluster, args.micro)
    start = time.perf_counter()
    around = peft_way if way == "peft" else None
    found = rehearse(
        Job(config, Path(config.model.path), world, cluster.per_node, True, cluster.device.memory, around=around)
    )
    return record(found, cluster) | {"simulated_in_seconds": time.perf_counter() - start}


def run_config(model: Path, way: str, four_bit: bool, cluster: Cluster, micro: int) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path=str(model)),
        dora=DoraConfig(targets="all-linear"),
        quant=QuantConfig(scheme="nf4" if four_bit else "none"),
        data=DataConfig(train="none", seq_len=TOKENS, packing=True),
        train=TrainConfig(
            steps=1, micro_batch_size=micro, accumulation=ROWS // micro, activation_checkpointing=True
        ),
        parallel=ParallelConfig(
            strategy="zero3" if way == "zero3" else "fsdp", replicas=cluster.nodes if way == "hybrid" else 1
        ),
    )


def record(found: Rehearsed, cluster: Cluster) -> dict[str, Any]:
    step = step_time(found, cluster)
    return {
        "step_seconds": step.total,
        "kernel_seconds": step.kernels,
        "exposed_seconds": step.exposed,
        "tokens_per_second_and_gpu": TOKENS * ROWS / step.total,
        "peak_bytes": found.peak(),
        "fits": found.peak() <= cluster.device.usable(),
        "sent": {
            f"{phase.value}: {kind}": {"count": round(step.messages[phase, kind]), "bytes": round(size)}
            for (phase, kind), size in step.sent.items()
        },
    }


@contextmanager
def peft_way() -> Iterator[None]:
    """DoRA as PEFT 0.21 computes it, and no norms between steps."""
    with (
        mock.patch.object(DoraLinear, "forward", peft_forward),
        mock.patch.object(trainer, "refresh_norms", return_value=None),
    ):
        yield


def peft_forward(layer: DoraLinear, x: Tensor) -> Tensor:
    """peft/tuners/lora/dora.py, of a linear layer without dropout."""
    A_RI, B_OR, m_O = layer.lora_A, layer.lora_B, layer.magnitude
    assert A_RI is not None and B_OR is not None and m_O is not None
    base = F.linear(x, layer.weight)
    wide = x.to(A_RI.dtype)
    lora_weight = F.linear(torch.eye(A_RI.shape[1], dtype=wide.dtype), A_RI)
    lora_weight = F.linear(lora_weight, B_OR).t().detach()  # [O, I], in the adapters' dtype
    whole = layer.weight.to(wide.dtype) + layer.spec.scaling * lora_weight
    scale = (m_O / torch.linalg.norm(whole, dim=1).to(wide.dtype).detach()).view(1, -1)
    lora = F.linear(F.linear(wide, A_RI), B_OR)
    return base + ((scale - 1) * base + scale * lora * layer.spec.scaling).to(base.dtype)


def print_row(case: str, world: int, found: dict[str, Any]) -> None:
    sent = sum(entry["bytes"] for entry in found["sent"].values())
    norms = sum(entry["bytes"] for name, entry in found["sent"].items() if name.startswith("norms"))
    print(
        f"{case:16} x{world:<5} {found['step_seconds']:8.3f} s, {found['exposed_seconds']:.3f} exposed, "
        f"{found['peak_bytes'] / 1e9:6.1f} GB{'' if found['fits'] else ' (does not fit)'}, "
        f"norms {100 * norms / sent:.3f} % of {sent / 1e9:.1f} GB, in {found['simulated_in_seconds']:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
