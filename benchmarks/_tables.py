"""Writes README.md's performance table from benchmarks/results/*.json; what nobody measured is called so."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- performance: made by benchmarks/_tables.py -->", "<!-- /performance -->"
COLUMNS = {
    "DoRA / PEFT LoRA": "ours dora / peft lora",
    "DoRA / PEFT DoRA": "ours dora / peft dora",
    "DoRA / our LoRA": "ours dora / ours lora",
}


def table() -> str:
    """One row per device and case of step_time.py: medians of the rounds' own ratios."""
    lines = [
        "Time of a whole training step (all linear layers adapted), ratios; below 1 is faster:",
        "",
        "| device, model | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    devices = set()
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        for case, record in json.loads(path.read_text()).get("step_time", {}).items():
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


def updated(page: str) -> str:
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(updated(readme.read_text()))
