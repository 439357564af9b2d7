"""Curves of the records: throughput and efficiency over the number of ranks, beside the ideal."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common.plotting import COLOURS, Curve, draw_curves, figure
from benchmarks.common.results import show
from benchmarks.scaling.records import link_text

Record = dict[str, Any]
STRATEGIES = ("single", "ddp", "fsdp", "zero1", "zero2", "zero3")  # a style each
BY_WORLD_SIZE = ("micro_batch_size", "accumulation", "tokens_per_rank")  # settings that strong scaling changes


class Point(NamedTuple):
    ranks: int
    hosts: int
    tokens_per_second: float  # the median
    low: float
    high: float
    efficiency: float  # 1 is ideal


def curves(records: list[Record]) -> dict[tuple[str, str, str], list[Point]]:
    """(mode, strategy, what is trained) -> points by the number of ranks.

    Efficiency is the throughput per rank over that of the smallest world size of the curve. It is the same formula
    for both modes: with N times the ranks, N times the tokens per second is ideal.
    """
    found: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        found.setdefault((record["mode"], record["strategy"], case_of(record)), []).append(record)
    return {key: points(of_key) for key, of_key in sorted(found.items())}


def points(records: list[Record]) -> list[Point]:
    ordered = sorted(records, key=lambda record: (record["world_size"], record["hosts"]))
    base = ordered[0]["tokens_per_second"]["median"] / ordered[0]["world_size"]
    made = []
    for record in ordered:
        ranks, speed = record["world_size"], record["tokens_per_second"]
        efficiency = speed["median"] / ranks / base
        made.append(Point(ranks, record["hosts"], speed["median"], speed["min"], speed["max"], efficiency))
    return made


def case_of(record: Record) -> str:
    """What is trained, which has to be the same for all points of a curve."""
    settings, weak = record["settings"], record["mode"] == "weak"
    tokens = settings["tokens_per_rank"] * (1 if weak else record["world_size"])
    same = {name: value for name, value in settings.items() if name not in BY_WORLD_SIZE}
    more = [
        f"{key} {value}"
        for key, value in same.items()
        if key in ("quant", "activation_checkpointing", "compile", "replicas", "cpu_offload", "threads")
        and value not in ("none", False, 1)
    ]
    size = f"hidden {same['hidden']} layers {same['layers']} {same['method']} rank {same['rank']} {same['dtype']}"
    return ", ".join([size, *more, f"{tokens} tokens a {'rank and ' if weak else ''}step"])


def draw_all(directory: Path) -> list[Path]:
    """A picture beside every directory of records below `directory`, under its name. Shows the points."""
    found: dict[Path, list[Record]] = {}  # of training steps; one directory has one device and link
    for path in sorted(directory.rglob("*-ranks-*-hosts.json")):
        record = json.loads(path.read_text())
        if record["kind"] == "step":
            found.setdefault(path.parent.with_name(f"{path.parent.name}.png"), []).append(record)
    for out, records in found.items():
        draw(records, out)
        for (mode, strategy, case), line in curves(records).items():
            show(f"{mode} {strategy}: {case}", {f"{point.ranks} ranks": point._asdict() for point in line})
    return list(found)


def draw(records: list[Record], out: Path) -> None:
    lines = curves(records)
    modes = sorted({mode for mode, _, _ in lines}, reverse=True)
    latest = max(records, key=lambda record: record["date"])
    about = [latest["device"], link_text(latest["link"]), f"torch {latest['versions']['torch']}", latest["date"]]
    columns = 1 + any(len(line) > 1 for line in lines.values())  # one world size alone has no efficiency
    with figure(out, ", ".join(about), len(modes), columns, (6.5 * columns, 0.6 + 4.4 * len(modes))) as axes:
        for of_row, mode in zip(axes, modes, strict=True):
            of_mode = {(name, case): line for (other, name, case), line in lines.items() if other == mode}
            draw_mode(mode, of_mode, *of_row)


def draw_mode(mode: str, lines: dict[tuple[str, str], list[Point]], speed: Any, efficiency: Any = None) -> None:
    """The axes of one mode. Curves of another model than the first are dashed and numbered."""
    speeds, efficiencies = [], []
    cases = list(dict.fromkeys(case for _, case in lines))
    what = cases[0] if len(cases) == 1 else "\n".join(f"{i}: {case}" for i, case in enumerate(cases, 1))
    speed.set_title(f"{mode} scaling, {what}", fontsize=9)
    for (name, case), line in lines.items():
        number = cases.index(case)
        label = name if len(cases) == 1 else f"{name} ({number + 1})"
        style, ranks = STRATEGIES.index(name), [point.ranks for point in line]
        medians, low, high = ([getattr(p, key) for p in line] for key in ("tokens_per_second", "low", "high"))
        speeds.append(Curve(label, style, ranks, medians, low, high, dashed=number > 0))
        parts = [point.efficiency for point in line]
        efficiencies.append(Curve(label, style, ranks, parts, dashed=number > 0))
        ideal = [medians[0] * count / ranks[0] for count in ranks]
        speed.plot(ranks, ideal, ":", color=COLOURS[style], linewidth=1)
    ranks_name = "ranks (dotted: ideal)" if efficiency is not None else "ranks"
    draw_curves(speed, speeds, ranks_name, "tokens/s: median, lowest, highest", "{:,.0f}", bottom=0)
    if efficiency is not None:
        efficiency.axhline(1, color="black", linestyle=":", linewidth=1)
        efficiency.set_title(f"{mode} scaling: efficiency", fontsize=9)
        what = "tokens/s a rank over those of the fewest ranks"
        draw_curves(efficiency, efficiencies, ranks_name, what, "{:.2f}", bottom=0)
