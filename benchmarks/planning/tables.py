"""Tables of what is counted, simulated and predicted, and of what was measured beside it."""

import json
from typing import Any

from benchmarks.common.markdown import measured_by, table
from benchmarks.common.results import RESULTS, records

SIMULATION = RESULTS / "simulation"
MEMORY_COLUMNS = {
    "held after the build": "held_bytes",
    "peak while loading": "loading_peak_bytes",
    "peak in a step": "step_peak_bytes",
}


def memory() -> str:
    """strategy_memory: a table for each case, by strategy and number of ranks."""
    blocks = []
    for case, record in records("strategy_memory"):
        found = list(record["strategies"].values())
        rows = []
        for row in found:
            sizes = [(row[key] / 1e6, row[key] / row["base_bytes"]) for key in MEMORY_COLUMNS.values()]
            name = " + ".join(f"`{part}`" for part in row["strategy"].split("+"))
            rows.append([name, f"{row['ranks']}", *(f"{mb:.0f} MB, {x:.2f}x" for mb, x in sizes)])
        about = f"{case}: a base of {found[0]['base_bytes'] / 1e6:.0f} MB"
        title = measured_by(record, about, torch="torch", deepspeed="DeepSpeed")
        blocks.append(f"{title}\n\n{table(['strategy', 'ranks', *MEMORY_COLUMNS], rows)}")
    return "\n\n".join(blocks) or "Not measured."


def account() -> str:
    """account: what `plan` counts of the 70B model on two 24 GB GPUs."""
    path = SIMULATION / "plan-two-4090-70b.json"
    if not path.is_file():
        return "Not counted."
    found = json.loads(path.read_text())
    plans = {int(tokens): plan for tokens, plan in found["plans"].items()}
    ranks = next(iter(plans.values()))["cluster"]["gpus"]
    parts = []
    for what, key, count in (
        ("each GPU", "memory_bytes", 1),
        ("the host, by one process", "host_memory_bytes", ranks),
    ):
        held = {tokens: plan[key] for tokens, plan in plans.items()}
        names = dict.fromkeys(name for sizes in held.values() for name, size in sizes.items() if size >= 5e6)
        rows = [[name, *(gb(sizes.get(name, 0)) for sizes in held.values())] for name in names]
        totals = [sum(sizes.values()) for sizes in held.values()]
        rows.append(["**together**", *(f"**{gb(total)}**" for total in totals)])
        if count > 1:
            rows.append([f"**by {count} processes**", *(f"**{gb(count * total)}**" for total in totals)])
        parts.append(table([f"GB held on {what}", *(f"{tokens} tokens" for tokens in held)], rows))
    first = next(iter(plans.values()))
    fullest = " or ".join(dict.fromkeys(plan["fullest"] for plan in plans.values()))
    text = (
        f"A GPU holds the most in the phase `{fullest}`, {gb(first['loading_peak_bytes'])} GB while loading "
        f"(torch {found['about']['versions']['torch']}, {found['about']['date']})."
    )
    return "\n\n".join([*parts, text])


def gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


def simulations() -> dict[str, dict[str, Any]]:
    """case -> world size -> what was simulated."""
    path = SIMULATION / "weak.json"
    everything = json.loads(path.read_text()) if path.is_file() else {}
    return {case: found for case, found in everything.items() if case != "about"}


def efficiency(found: dict[str, dict[str, Any]]) -> dict[int, float]:
    """World size -> tokens per second and GPU over those of the smallest world that the case fits in."""
    speeds = {int(w): r["tokens_per_second_and_gpu"] for w, r in found.items() if r["fits"]}
    return {world: speeds[world] / speeds[min(speeds)] for world in sorted(speeds)}


def simulated() -> str:
    """simulate: efficiency by world size, and what a GPU holds and sends at 512."""
    cases = simulations()
    if not cases:
        return "Not simulated."
    about = json.loads((SIMULATION / "weak.json").read_text())["about"]
    worlds = sorted({int(world) for found in cases.values() for world in found})
    text = (
        f"{about['rows_per_gpu']} rows of {about['tokens_per_row']} tokens a GPU and step in micro-batches of "
        f"{about['micro_batch']}, {about['gpu']}, {about['net']} (Gb/s of each GPU between machines), torch "
        f"{about['torch']}, {about['date']}; not measured:"
    )
    heads = ["case", "tokens/s and GPU at the smallest", *(f"{w} GPUs" for w in worlds)]
    heads += ["a GPU holds", "gathered and reduced a step", "of it norms"]
    return f"{text}\n\n{table(heads, (simulated_row(case, found, worlds) for case, found in cases.items()))}"


def simulated_row(case: str, found: dict[str, dict[str, Any]], worlds: list[int]) -> list[str]:
    parts = efficiency(found)
    largest = found[max(found, key=lambda world: (int(world) <= 512, int(world)))]
    sent, norms = sent_bytes(largest)
    speed = f"{found[str(min(parts))]['tokens_per_second_and_gpu']:,.0f}" if parts else ""
    cells = [
        "" if str(world) not in found else f"{100 * parts[world]:.1f} %" if world in parts else "does not fit"
        for world in worlds
    ]
    sizes = [f"{largest['peak_bytes'] / 1e9:.1f} GB", f"{sent / 1e9:.1f} GB", f"{norms / 1e6:.0f} MB"]
    return [case, speed, *cells, *sizes]


def sent_bytes(found: dict[str, Any]) -> tuple[int, int]:
    """In all, and for the norms."""
    sizes = {name: entry["bytes"] for name, entry in found["sent"].items()}
    return sum(sizes.values()), sum(size for name, size in sizes.items() if name.startswith("norms"))


def planned() -> str:
    """plan_memory: the peak of a step."""
    rows = []
    for _, record in records("plan_memory"):
        planned, measured = record["planned_bytes"], record["measured_bytes"]
        case = (
            f"{record['case']}, hidden {record['hidden']}, {record['layers']} layers, {record['dtype']}, "
            f"{record['tokens']} tokens"
        )
        sizes = [f"{size / 1e6:.0f} MB" for size in (planned, measured)]
        rows.append([case, *sizes, f"{100 * (planned / measured - 1):+.1f} %"])
    return table(["case", "planned", "measured", "difference"], rows) if rows else "Not measured."


def predicted() -> str:
    """predict: the measured runs of several ranks."""
    rows = [
        [row["case"], f"{row['measured']:.3f} s", f"{row['predicted']:.3f} s", f"{100 * row['error']:+.1f} %"]
        for path in sorted(SIMULATION.glob("predicted-*.json"))
        for row in json.loads(path.read_text())["rows"]
    ]
    return table(["run", "measured step", "predicted step", "error"], rows) if rows else "Not measured."
