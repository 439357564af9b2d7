"""The table of published.py's measurements beside what was published, for _tables.py."""

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
NAMES = {"ours dora": "ours DoRA", "peft dora": "PEFT DoRA", "ours lora": "ours LoRA", "peft lora": "PEFT LoRA"}
SOURCES = (
    "arXiv 2603.22276 (H200, 36 layers): PEFT's DoRA 13,653 ms, their kernels 9,104 ms, 1.50",
    "PEFT's MetaMathQA (28 layers): LoRA 188 ms a step and 22.3 GB, DoRA 238 ms and 24.5 GB, 1.26 of LoRA",
)


def published() -> str:
    """One row per device and case: ms a cycle and GB at its peak, and the ratios."""
    heads = [*NAMES.values(), "PEFT DoRA / ours", "ours / PEFT LoRA"]
    lines = [f"Published: {'; '.join(SOURCES)}.", "", f"| ms a cycle, peak | {' | '.join(heads)} |"]
    lines.append("|---" * (len(heads) + 1) + "|")
    for path in sorted(RESULTS.glob("*.json")):
        for case, record in json.loads(path.read_text()).get("published", {}).items():
            cells = [cell(record, who) for who in NAMES] + [
                f"{record['ratios'][pair]['median']:.2f}" if pair in record["ratios"] else "not measured"
                for pair in ("peft dora / ours dora", "ours dora / peft lora")
            ]
            versions = ", ".join(f"{name} {record['versions'][name]}" for name in ("torch", "peft"))
            lines.append(f"| {record['device']}, {case} ({versions}, {record['date']}) | {' | '.join(cells)} |")
    if len(lines) == 4:
        lines.append("| any GPU" + " | not measured" * len(heads) + " |")
    return "\n".join(lines)


def cell(record: dict, who: str) -> str:
    if who not in record["seconds"]:
        return "not measured"
    milliseconds = f"{record['seconds'][who]['median'] * 1e3:,.0f} ms"
    memory = record["peak_memory_bytes"].get(who)
    return f"{milliseconds}, {memory / 1e9:.1f} GB" if memory else milliseconds
