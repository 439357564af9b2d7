"""Curves of scaling.py's records: throughput and efficiency over the number of ranks, beside the ideal."""

import json
from pathlib import Path
from typing import Any, NamedTuple

Record = dict[str, Any]
BY_WORLD_SIZE = ("micro_batch_size", "accumulation", "tokens_per_rank")  # settings that strong scaling changes


class Point(NamedTuple):
    ranks: int
    hosts: int
    tokens_per_second: float  # the median
    low: float
    high: float
    efficiency: float  # 1 is ideal


def records_below(directory: Path) -> dict[Path, list[Record]]:
    """Those of training steps, by the directory that they lie in; one directory has one device and link."""
    found: dict[Path, list[Record]] = {}
    for path in sorted(directory.rglob("*-ranks-*-hosts.json")):
        record = json.loads(path.read_text())
        if record["kind"] == "step":
            found.setdefault(path.parent, []).append(record)
    return found


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
    """A picture beside every directory of records below `directory`, under its name. Prints the points."""
    made = []
    for place, records in records_below(directory).items():
        out = place.with_name(f"{place.name}.png")
        draw(records, out)
        print(out)
        for (mode, strategy, case), line in curves(records).items():
            print(f"  {mode} {strategy}: {case}")
            for point in line:
                speed = f"{point.tokens_per_second:12,.0f} tokens/s ({point.low:,.0f} .. {point.high:,.0f})"
                where = f"{point.ranks:5} ranks on {point.hosts} host(s)"
                print(f"    {where}: {speed}, efficiency {point.efficiency:.2f}")
        made.append(out)
    return made


def draw(records: list[Record], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = curves(records)
    modes = sorted({mode for mode, _, _ in lines}, reverse=True)
    several = len({case for _, _, case in lines}) > len(modes)
    figure, axes = pyplot.subplots(
        len(modes), 2, figsize=(12, 0.6 + 4.4 * len(modes)), layout="constrained", squeeze=False
    )
    for (speed, efficiency), mode in zip(axes, modes, strict=True):
        of_mode = {key: line for key, line in lines.items() if key[0] == mode}
        labelled = {f"{name}: {case}" if several else name: line for (_, name, case), line in of_mode.items()}
        draw_mode(speed, efficiency, labelled)
        case = next(iter(of_mode))[2]
        speed.set_title(f"{mode} scaling" + ("" if several else f": {case}"), fontsize=9)
        efficiency.set_title(f"{mode} scaling: efficiency", fontsize=9)
    latest = max(records, key=lambda record: record["date"])
    about = [latest["device"], link_text(latest["link"]), f"torch {latest['versions']['torch']}", latest["date"]]
    figure.suptitle(", ".join(about))
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def draw_mode(speed: Any, efficiency: Any, lines: dict[str, list[Point]]) -> None:
    """Two axes of one mode; dotted is the ideal from each curve's smallest world size."""
    for label, line in lines.items():
        ranks = [point.ranks for point in line]
        medians = [point.tokens_per_second for point in line]
        ends = [[p.tokens_per_second - p.low for p in line], [p.high - p.tokens_per_second for p in line]]
        drawn = speed.errorbar(ranks, medians, yerr=ends, marker="o", capsize=3, label=label)
        ideal = [medians[0] * count / ranks[0] for count in ranks]
        speed.plot(ranks, ideal, ":", color=drawn[0].get_color(), linewidth=1)
        efficiency.plot(ranks, [point.efficiency for point in line], marker="o", label=label)
        efficiency.annotate(
            f"{line[-1].efficiency:.2f}", (ranks[-1], line[-1].efficiency), (4, 4), textcoords="offset points"
        )
    efficiency.axhline(1, color="black", linestyle=":", linewidth=1)
    efficiency.set_ylim(bottom=0)
    every = sorted({point.ranks for line in lines.values() for point in line})
    for axis in (speed, efficiency):
        axis.set_xscale("log", base=2)
        axis.set_xticks(every, [str(count) for count in every])
        axis.minorticks_off()
        axis.set_xlabel("ranks (dotted: ideal)")
    speed.set_ylabel("tokens per second")
    speed.set_ylim(bottom=0)
    speed.legend(fontsize=8)


def link_text(link: str | dict[str, Any]) -> str:
    if isinstance(link, str):
        return link
    rate = f"{link['mbit']:g} Mbit/s" if link["mbit"] else "any rate"
    return f"made hosts, {rate}, {link['delay_ms']:g} ms one way"
