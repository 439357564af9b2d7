"""Writes the tables of README.md and docs/ from benchmarks/results/*.json; what nobody measured is called so."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/strategies.md")
BEGIN = "<!-- performance: made by benchmarks/_tables.py -->"
COLUMNS = {
    "DoRA / PEFT LoRA": "ours dora / peft lora",
    "DoRA / PEFT DoRA": "ours dora / peft dora",
    "DoRA / our LoRA": "ours dora / ours lora",
}
MEMORY_COLUMNS = {
    "held after the build": "held_bytes",
    "peak while loading": "loading_peak_bytes",
    "peak in a step": "step_peak_bytes",
}
MEMORY_VERSIONS = {"torch": "torch", "deepspeed": "DeepSpeed"}


def records(script: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(case, record) of every device that `script` ran on."""
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        yield from json.loads(path.read_text()).get(script, {}).items()


def performance() -> str:
    """One row per device and case of step_time.py: medians of the rounds' own ratios."""
    lines = [
        "Time of a whole training step (all linear layers adapted), ratios; below 1 is faster:",
        "",
        "| device, model | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    devices = set()
    for case, record in records("step_time"):
        versions = record["versions"]
        devices.add(record["device"])
        when = f"torch {versions['torch']}, PEFT {versions['peft']}, {record['date']}"
        about = f"{record['device']}, {case} ({when})"
        ratios = [record["ratios"].get(key) for key in COLUMNS.values()]
        lines.append(
            f"| {about} | " + " | ".join(f"{r['median']:.2f}" if r else "not measured" for r in ratios) + " |"
        )
    if not any("CPU" not in device for device in devices):
        lines.append("| any GPU | " + " | ".join(["not measured"] * len(COLUMNS)) + " |")
    return "\n".join(lines)


def memory() -> str:
    """One table per device and case of strategy_memory.py, one row per strategy and number of ranks."""
    blocks = []
    for case, record in records("strategy_memory"):
        rows = list(record["strategies"].values())
        versions = [f"{name} {record['versions'][key]}" for key, name in MEMORY_VERSIONS.items()]
        about = f"{record['device']}, {case}: a base of {rows[0]['base_bytes'] / 1e6:.0f} MB"
        lines = [
            f"{about} ({', '.join([*versions, record['date']])})",
            "",
            "| strategy | ranks | " + " | ".join(MEMORY_COLUMNS) + " |",
            "|---" * (len(MEMORY_COLUMNS) + 2) + "|",
        ]
        for row in rows:
            sizes = [(row[key] / 1e6, row[key] / row["base_bytes"]) for key in MEMORY_COLUMNS.values()]
            name = " + ".join(f"`{part}`" for part in row["strategy"].split("+"))
            lines.append(
                f"| {name} | {row['ranks']} | " + " | ".join(f"{mb:.0f} MB, {x:.2f}x" for mb, x in sizes) + " |"
            )
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) or "Not measured."


def updated(page: str) -> str:
    """`page` with each table that it has marks for made anew."""
    for make in (performance, memory):
        begin, end = BEGIN.replace("performance", make.__name__), f"<!-- /{make.__name__} -->"
        if begin in page:
            head, _, rest = page.partition(begin)
            page = f"{head}{begin}\n{make()}\n{end}{rest.partition(end)[2]}"
    return page


if __name__ == "__main__":
    for name in PAGES:
        path = ROOT / name
        path.write_text(updated(path.read_text()))
