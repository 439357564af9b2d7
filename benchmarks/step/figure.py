"""results/<device>.png: ratios of training steps, and of what they keep, from the JSON beside it."""

import json
from pathlib import Path
from typing import Any

from benchmarks.common.plotting import draw_bars, figure

BARS = {"PEFT's LoRA": "peft {}lora", "PEFT's DoRA": "peft {}dora", "our LoRA": "ours {}lora"}
PANELS = {  # script -> what of its ratios, and the title
    "step_time": ("median", "time of a training step"),
    "memory": ("saved", "bytes kept between forward and backward"),
}


def draw_device(path: Path) -> None:
    results = json.loads(path.read_text())
    records = [record for script in PANELS for record in results.get(script, {}).values()]
    if not records:
        return
    latest = max(records, key=lambda record: record["date"])
    title = f"{latest['device']}, torch {latest['versions']['torch']}, {latest['date']}"
    with figure(path.with_suffix(".png"), title, 1, 2, (15, 6)) as axes:
        for axis, (script, (key, what)) in zip(axes[0], PANELS.items(), strict=True):
            cases = results.get(script, {})
            groups = {case.replace(" tokens", "\ntokens"): ratios(record, key) for case, record in cases.items()}
            draw_bars(axis, groups, what, "our DoRA as a multiple of the other; below 1 is less")
        axes[0][0].figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)


def ratios(record: dict[str, Any], key: str) -> dict[str, float | None]:
    found = {}
    for label, name in BARS.items():
        pairs = [f"ours {q}dora / {name.format(q)}" for q in ("", "q")]
        found[label] = next((record["ratios"][pair][key] for pair in pairs if pair in record["ratios"]), None)
    return found
