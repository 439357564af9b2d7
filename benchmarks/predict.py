"""Step times as dora_dist/cost.py predicts them against those that scaling.py measured, on the same machine.

From the run of one rank comes how fast the machine computes: the kernels of its rehearsal, priced by the shape of
a roofline, are scaled by one factor to the time measured. From single collectives by size (scaling.py --links)
comes a latency and a rate for each kind, and what computing around and beside them loses to their threads. From
the probe that each run makes before each round comes how fast the machine was then for each of its ranks, which
share it with each other and with others. The step times of several ranks are not looked at until the end.

    python benchmarks/predict.py [--records benchmarks/results/scaling/DEVICE]
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from _results import RESULTS, default_path, environment
from _scaling_run import write_llama

from dora_dist.config import DataConfig, DoraConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from dora_dist.cost import step_time
from dora_dist.hardware import Cluster, Device, Link
from dora_dist.rehearse import Job, Rehearsals, Rehearsed

# The shape of a CPU core's roofline: products, and passes that write new memory, whose pages the system makes. The
# factor that is fitted makes it this machine's.
CORE = Device(
    "cpu", memory=float("inf"), bandwidth=4.5e9, flops_16=8e10, flops_32=8e10, link=Link(1e9, 1e-5), host=1e10,
    product_share=1.0, memory_share=1.0, link_share=1.0, kernel_s=5e-6, launch_s=0.0, blocking=True,
)  # fmt: skip
Record = dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    device = default_path(torch.device("cpu")).stem
    parser.add_argument("--records", type=Path, default=RESULTS / "scaling" / device)
    parser.add_argument("--out", type=Path, default=RESULTS / "simulation" / f"predicted-{device}.json")
    args = parser.parse_args(arguments)
    records = [json.loads(path.read_text()) for path in sorted(args.records.glob("*/*.json"))]
    found = predict_all(records)
    if not found:
        parser.error(
            f"{args.records} holds no run of several ranks beside one of one rank and the --links of both"
        )
    for row in found:
        print(f"{row['case']:44} measured {row['measured']:.3f} s, predicted {row['predicted']:.3f} s, "
              f"{100 * row['error']:+.1f} %")  # fmt: skip
    about = environment(torch.device("cpu"))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"about": about, "rows": found}, indent=1) + "\n")


def predict_all(records: list[Record]) -> list[Record]:
    runs = [r for r in records if r["kind"] == "step" and r["mode"] == "weak"]
    alone = {r["strategy"]: r for r in runs if r["world_size"] == 1 and r["link"] == "one host"}
    rows = []
    found: dict[str, Rehearsed] = {}
    with tempfile.TemporaryDirectory() as directory, Rehearsals() as rehearse:
        for run in (r for r in runs if r["world_size"] > 1):
            one = alone.get(run["strategy"])
            links = next((r for r in records if r["kind"] == "links" and same_place(r, run)), None)
            if one is None or links is None:
                print(f"{run['strategy']} on {run['world_size']} ranks, {place(run)}: not predicted, for want of "
                      f"{'its run of one rank' if one is None else '--links there'}")  # fmt: skip
                continue
            cluster = cluster_of(run, links)
            for known in (one, run):
                if name_of(known) not in found:
                    found[name_of(known)] = rehearse(job_of(known, Path(directory)))
            predicted = predict(one, run, cluster, found)
            measured = run["step_seconds"]["median"]
            rows.append({
                "case": f"{run['strategy']} on {run['world_size']} ranks, {place(run)}",
                "measured": measured, "predicted": predicted, "error": predicted / measured - 1,
                "one_rank": one["step_seconds"]["median"],
            })  # fmt: skip
    return rows


def cluster_of(run: Record, links: Record) -> Cluster:
    """The ranks of `run` and what connects them. Where that is one machine's cores, they were as much slower in
    sending as in computing."""
    inside = run["link"] == "one host"
    factor = run["probe_seconds"]["median"] / links["probe_seconds"] if inside else 1.0
    measured = {kind: slowed(link, factor) for kind, link in fitted(links).items()}
    lost = {kind: slowed(link, run["probe_seconds"]["median"]) for kind, link in lost_to(links).items()}
    return Cluster(CORE, run["world_size"], measured=measured, lost=lost)


def same_place(a: Record, b: Record) -> bool:
    return all(a[key] == b[key] for key in ("world_size", "hosts", "link"))


def place(run: Record) -> str:
    link = run["link"]
    return link if isinstance(link, str) else f"hosts at {link['mbit']:g} Mbit/s, {link['delay_ms']:g} ms"


def fitted(links: Record) -> dict[str, Link]:
    """Latency and rate of each kind."""
    found = {}
    for kind, points in links["seconds"].items():
        seconds = [point["median"] for point in points]
        found[kind] = line([point["bytes"] for point in points], seconds, seconds)
    return found


def line(sizes: list[float], seconds: list[float], scales: list[float] | None = None) -> Link:
    """Least squares of seconds over bytes, relative to `scales`."""
    size, time = (torch.tensor(values, dtype=torch.float64) for values in (sizes, seconds))
    scale = torch.ones_like(time) if scales is None else torch.tensor(scales, dtype=torch.float64)
    design = torch.stack([torch.ones_like(size), size], dim=1) / scale[:, None]
    latency, per_byte = torch.linalg.lstsq(design, (time / scale)[:, None]).solution.flatten().tolist()
    if latency < 0 or per_byte < 0:  # the other one alone
        column = design[:, int(latency < 0)]
        alone = max(0.0, float(column @ (time / scale) / (column @ column)))
        latency, per_byte = (0.0, alone) if latency < 0 else (alone, 0.0)
    return Link(1 / max(per_byte, 1e-15), latency)


def lost_to(links: Record) -> dict[tuple[str, bool], Link]:
    """What computing loses to a collective of each kind, waited for or not, with a probe as the unit of time."""
    return {
        (kind, blocks): line([p["bytes"] for p in points], [p["around" if blocks else "beside"] for p in points])
        for kind, points in (links["lost_probes"] or {}).items()
        for blocks in (True, False)
    }


def slowed(link: Link, factor: float) -> Link:
    return Link(link.rate / factor, link.latency * factor)


def name_of(run: Record) -> str:
    """Of the rehearsal that a run needs."""
    return json.dumps([run["strategy"], run["world_size"], run["settings"]])


def predict(one: Record, run: Record, cluster: Cluster, found: dict[str, Rehearsed]) -> float:
    """Seconds of a step of `run`, from the run of one rank, both's rehearsals, and what the links do."""
    in_probes = statistics.median(turn["step_seconds"] / turn["probe_seconds"] for turn in one["rounds"])
    measured = in_probes * run["probe_seconds"]["median"]
    factor = measured / step_time(found[name_of(one)], Cluster(CORE, 1)).total
    slow = replace(CORE, **{
        name: getattr(CORE, name) / factor for name in ("bandwidth", "flops_16", "flops_32")
    }, kernel_s=CORE.kernel_s * factor)  # fmt: skip
    return step_time(found[name_of(run)], replace(cluster, device=slow)).total


def job_of(run: Record, directory: Path) -> Job:
    sizes, world = run["settings"], run["world_size"]
    write_llama(directory, SimpleNamespace(**{key: sizes[key] for key in ("hidden", "layers", "tokens")}))
    config = RunConfig(
        model=ModelConfig(path=str(directory), init="random", dtype=sizes["dtype"]),
        dora=DoraConfig(rank=sizes["rank"], targets="all-linear"),
        data=DataConfig(train="none", seq_len=sizes["tokens"]),
        train=TrainConfig(steps=1, micro_batch_size=sizes["micro_batch_size"], accumulation=sizes["accumulation"]),
        parallel=ParallelConfig(strategy=run["strategy"]),
    )
    return Job(config, directory, world, world, gpu=False, every_piece=True)


if __name__ == "__main__":
    main()
