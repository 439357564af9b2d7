"""Tables of what was simulated and predicted, for _tables.py."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
SIMULATED = RESULTS / "simulation" / "weak.json"


def weak() -> dict[str, dict[str, Any]]:
    """case -> world size -> what was simulated."""
    everything = json.loads(SIMULATED.read_text()) if SIMULATED.is_file() else {}
    return {case: found for case, found in everything.items() if case != "about"}


def efficiency(found: dict[str, dict[str, Any]]) -> dict[int, float]:
    """World size -> tokens per second and GPU over those of the smallest world that the case fits in."""
    speeds = {int(w): r["tokens_per_second_and_gpu"] for w, r in found.items() if r["fits"]}
    return {world: speeds[world] / speeds[min(speeds)] for world in sorted(speeds)}


def simulated() -> str:
    """One row per case: efficiency by world size, and what a GPU holds and sends at 512."""
    if not weak():
        return "Not simulated."
    about = json.loads(SIMULATED.read_text())["about"]
    worlds = sorted({int(world) for found in weak().values() for world in found})
    text = (
        f"{about['rows_per_gpu']} rows of {about['tokens_per_row']} tokens a GPU and step in micro-batches of "
        f"{about['micro_batch']}, {about['gpu']}, {about['net']} (Gb/s of each GPU between machines), torch "
        f"{about['torch']}, {about['date']}; not measured:"
    )
    heads = ["case", "tokens/s and GPU at the smallest", *(f"{w} GPUs" for w in worlds)]
    heads += ["a GPU holds", "gathered and reduced a step", "of it norms"]
    lines = [text, "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for case, found in weak().items():
        parts = efficiency(found)
        largest = found[max(found, key=lambda world: (int(world) <= 512, int(world)))]
        sent = sum(entry["bytes"] for entry in largest["sent"].values())
        norms = sum(entry["bytes"] for name, entry in largest["sent"].items() if name.startswith("norms"))
        speed = f"{found[str(min(parts))]['tokens_per_second_and_gpu']:,.0f}" if parts else ""
        cells = [cell(found.get(str(world)), parts.get(world)) for world in worlds]
        lines.append(
            f"| {case} | {speed} | " + " | ".join(cells) + f" | {largest['peak_bytes'] / 1e9:.1f} GB | "
            f"{sent / 1e9:.1f} GB | {norms / 1e6:.0f} MB |"
        )
    return "\n".join(lines)


def cell(found: dict[str, Any] | None, part: float | None) -> str:
    if found is None:
        return ""
    return "does not fit" if part is None else f"{100 * part:.1f} %"


def planned() -> str:
    """One row per case of plan_memory.py."""
    lines = ["| case | planned | measured | difference |", "|---|---|---|---|"]
    for path in sorted(RESULTS.glob("*.json")):
        for record in json.loads(path.read_text()).get("plan_memory", {}).values():
            planned, measured = record["planned_bytes"], record["measured_bytes"]
            lines.append(
                f"| {record['case']}, hidden {record['hidden']}, {record['layers']} layers, {record['dtype']}, "
                f"{record['tokens']} tokens | {planned / 1e6:.0f} MB | {measured / 1e6:.0f} MB | "
                f"{100 * (planned / measured - 1):+.1f} % |"
            )
    return "\n".join(lines) if len(lines) > 2 else "Not measured."


def predicted() -> str:
    """One row per measured run of several ranks."""
    lines = ["| run | measured step | predicted step | error |", "|---|---|---|---|"]
    for path in sorted((RESULTS / "simulation").glob("predicted-*.json")):
        for row in json.loads(path.read_text())["rows"]:
            times = f"{row['measured']:.3f} s | {row['predicted']:.3f} s"
            lines.append(f"| {row['case']} | {times} | {100 * row['error']:+.1f} % |")
    return "\n".join(lines) if len(lines) > 2 else "Not measured."


def draw(out: Path) -> None:
    """Efficiency over world size, one line a case, and the ideal one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    axes.axhline(1, color="black", linewidth=0.8, label="ideal")
    for case, found in weak().items():
        parts = efficiency(found)
        axes.plot(list(parts), list(parts.values()), marker="o", markersize=3, label=case)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("GPUs")
    axes.set_ylabel("tokens/s and GPU over those of the smallest world")
    axes.set_title("simulated weak scaling")
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)
