"""Draws benchmarks/results/<device>.png from the JSON beside it: ratios of training steps, and what they keep;
and the curves of scaling.py and simulate.py."""

import json
from pathlib import Path
from typing import Any

from _scaling_curves import draw_all
from _simulation_tables import SIMULATED
from _simulation_tables import draw as draw_simulated

RESULTS = Path(__file__).resolve().parent / "results"
BARS = {"PEFT LoRA": "peft {}lora", "PEFT DoRA": "peft {}dora", "our LoRA": "ours {}lora"}


def main() -> None:
    for path in sorted(RESULTS.glob("*.json")):
        draw(json.loads(path.read_text()), path.with_suffix(".png"))
    draw_all(RESULTS / "scaling")
    if SIMULATED.is_file():
        draw_simulated(SIMULATED.with_suffix(".png"))


def draw(results: dict[str, Any], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(15, 6), layout="constrained")
    steps = {case: {key: r["median"] for key, r in record["ratios"].items()} for case, record in
             results.get("step_time", {}).items()}  # fmt: skip
    kept = {case: {key: r["saved"] for key, r in record["ratios"].items()} for case, record in
            results.get("memory", {}).items()}  # fmt: skip
    bars(left, steps, "time of a training step, our DoRA / ...")
    bars(right, kept, "kept between forward and backward, our DoRA / ...")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    records = [r for script in results.values() for r in script.values()]
    figure.suptitle(f"{records[0]['device']}, torch {records[-1]['versions']['torch']}, {records[-1]['date']}")
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def bars(axes: Any, cases: dict[str, dict[str, float]], title: str) -> None:
    """A group of bars per case; the line is at 1, where ours costs the same."""
    for number, (label, name) in enumerate(BARS.items()):
        heights = [found(ratios, name) for ratios in cases.values()]
        at = [row + (number - 1) * 0.27 for row in range(len(heights))]
        drawn = axes.barh(at, heights, 0.25, label=label)
        axes.bar_label(drawn, [f"{h:.2f}" if h else "not measured" for h in heights], fontsize=7, padding=2)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(cases)), [case.replace(" tokens", "\ntokens") for case in cases], fontsize=8)
    axes.invert_yaxis()
    axes.set_title(title)


def found(ratios: dict[str, float], name: str) -> float:
    return next((ratios[key] for q in ("", "q") if (key := f"ours {q}dora / {name.format(q)}") in ratios), 0.0)


if __name__ == "__main__":
    main()
