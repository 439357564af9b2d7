"""Step times as `plan` predicts them against those that benchmarks.scaling measured, on the same machine.

The run of one rank tells how fast the machine computes: its rehearsal's kernels are scaled to the time measured.
Single collectives by size (--links) give a latency and a rate for each kind, and what computing loses beside them.
The probe before each round tells how fast the machine was then. The step times of several ranks are not looked at.

    python -m benchmarks.planning.predict [--records benchmarks/results/scaling/DEVICE]
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.models import run_config, sizes, write_model
from benchmarks.common.results import RESULTS, default_path, environment, show, write
from benchmarks.planning.tables import SIMULATION
from benchmarks.scaling.records import link_text
from dora_dist.planning.cost import step_time
from dora_dist.planning.hardware import Cluster, Device, Link
from dora_dist.planning.rehearse import Job, Rehearsals, Rehearsed

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
    parser.add_argument("--out", type=Path, default=SIMULATION / f"predicted-{device}.json")
    args = parser.parse_args(arguments)
    records = [json.loads(path.read_text()) for path in sorted(args.records.glob("*/*.json"))]
    found = predict_all(records)
    if not found:
        parser.error(f"{args.records} has no run of several ranks with one of one rank and the --links of both")
    show("seconds of a step", {row["case"]: row for row in found})
    write(args.out, {"about": environment(torch.device("cpu")), "rows": found})


def predict_all(records: list[Record]) -> list[Record]:
    runs = [r for r in records if r["kind"] == "step" and r["mode"] == "weak"]
    alone = {r["strategy"]: r for r in runs if r["world_size"] == 1 and r["link"] == "one host"}
    rows = []
    found: dict[str, Rehearsed] = {}
    with tempfile.TemporaryDirectory() as directory, Rehearsals() as rehearse:
        for run in (r for r in runs if r["world_size"] > 1):
            one = alone.get(run["strategy"])
            links = next((r for r in records if r["kind"] == "links" and same_place(r, run)), None)
            case = f"{run['strategy']} on {run['world_size']} ranks, {link_text(run['link'])}"
            if one is None or links is None:
                print(f"{case}: no prediction without {'its run of one rank' if one is None else '--links there'}")
                continue
            cluster = cluster_of(run, links)
            for known in (one, run):
                if name_of(known) not in found:
                    found[name_of(known)] = rehearse(job_of(known, Path(directory)))
            predicted = predict(one, run, cluster, found)
            measured = run["step_seconds"]["median"]
            rows.append({
                "case": case,
                "measured": measured, "predicted": predicted, "error": predicted / measured - 1,
                "one_rank": one["step_seconds"]["median"],
            })  # fmt: skip
    return rows


def cluster_of(run: Record, links: Record) -> Cluster:
    """The ranks of `run` and what connects them. Where that is one machine's cores, they were as much slower in
    sending as in computing."""
    inside = run["link"] == "one host"
    factor = run["probe_seconds"]["median"] / links["probe_seconds"] if inside else 1.0
    measured = {kind: slowed(line(points, "median", True), factor) for kind, points in links["seconds"].items()}
    lost = {kind: slowed(link, run["probe_seconds"]["median"]) for kind, link in lost_to(links).items()}
    return Cluster(CORE, run["world_size"], measured=measured, lost=lost)


def same_place(a: Record, b: Record) -> bool:
    return all(a[key] == b[key] for key in ("world_size", "hosts", "link"))


def line(points: list[dict[str, float]], key: str, relative: bool = False) -> Link:
    """Latency and rate: least squares of `key`, or of its relative errors, over bytes."""
    size, time = (torch.tensor([point[name] for point in points], dtype=torch.float64) for name in ("bytes", key))
    scale = time if relative else torch.ones_like(time)
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
        (kind, blocks): line(points, "around" if blocks else "beside")
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
    found, world = run["settings"], run["world_size"]
    model = write_model(directory, **sizes(found["hidden"], found["layers"], found["tokens"]))
    settings = {key: found[key] for key in ("rank", "dtype", "micro_batch_size", "accumulation")}
    config = run_config(model, run["strategy"], found["tokens"], steps=1, **settings)
    return Job(config, directory, world, world, gpu=False, every_piece=True)


if __name__ == "__main__":
    main()
