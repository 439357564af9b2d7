"""What a step of the real code would hold, send and take on 8 to 4096 GPUs, without any.

The real model is sharded by the real engine over a fake process group, on fake tensors. Counts and bytes of
collectives are exact; times come from dora_dist's cost model with the makers' rates. Weak scaling: every GPU has 4
rows of 4096 tokens, with activation checkpointing. "peft" is PEFT's arithmetic on our layers' parameters: in every
forward and recomputation BA is multiplied out and the norm taken of the whole weight, which FSDP2 has gathered.

    python -m benchmarks.planning.simulate [--cases "8B fsdp" ...] [--worlds 8 64 512 4096] [--gpu h100 --net 400g]
"""

import argparse
import datetime
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.models import SHAPES, run_config, write_model
from benchmarks.common.results import show, write
from benchmarks.planning.tables import SIMULATION
from dora_dist.dora.layers import DoraLinear
from dora_dist.planning.cost import step_time
from dora_dist.planning.hardware import ASSUMPTIONS, Cluster, find_cluster
from dora_dist.planning.rehearse import Job, Rehearsals, Rehearsed
from dora_dist.training import trainer

OUT = SIMULATION / "weak.json"
TOKENS, ROWS = 4096, 4
NODE = 8
CASES = [
    "8B fsdp", "8B hybrid", "8B zero3", "8B peft", "8B 4-bit fsdp", "8B 4-bit hybrid",
    "70B fsdp", "70B zero3", "70B peft", "70B 4-bit fsdp", "70B 4-bit hybrid", "405B fsdp", "405B 4-bit fsdp",
]  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    everything = json.loads(args.out.read_text()) if args.out.is_file() else {}
    here = {
        "gpu": args.gpu, "net": args.net, "tokens_per_row": TOKENS, "rows_per_gpu": ROWS,
        "micro_batch": args.micro, "torch": torch.__version__, "date": datetime.date.today().isoformat(),
        "assumptions": list(ASSUMPTIONS),
    }  # fmt: skip
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
                write(args.out, everything)
                show(f"{case} x{world}", found)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
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


def simulate(
    case: str, world: int, args: argparse.Namespace, directory: Path, rehearse: Rehearsals
) -> dict[str, Any]:
    shape, *_, way = case.split()
    cluster = find_cluster(args.gpu, world, max(1, world // NODE), args.net)
    config = run_config(
        write_model(directory / shape, **SHAPES[shape]), "zero3" if way == "zero3" else "fsdp", TOKENS,
        four_bit="4-bit" in case, replicas=cluster.nodes if way == "hybrid" else 1, steps=1,
        micro_batch_size=args.micro, accumulation=ROWS // args.micro, activation_checkpointing=True,
    )  # fmt: skip
    config = replace(config, data=replace(config.data, packing=True))
    start = time.perf_counter()
    job = Job(config, directory / shape, world, cluster.per_node, True, cluster.device.memory)
    found = rehearse(replace(job, around=peft_way if way == "peft" else None))
    return record(found, cluster) | {"simulated_in_seconds": time.perf_counter() - start}


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


if __name__ == "__main__":
    main()
