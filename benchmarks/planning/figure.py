"""results/simulation/weak.png: simulated efficiency over the number of GPUs, a panel for each model."""

from benchmarks.common.plotting import Curve, draw_curves, figure
from benchmarks.planning.tables import SIMULATION, efficiency, simulations

WAYS = ("fsdp", "hybrid", "zero3", "peft")  # a style each; 4-bit is dashed


def draw_simulated() -> None:
    parts = {case: efficiency(found) for case, found in simulations().items()}
    models = list(dict.fromkeys(case.split()[0] for case, points in parts.items() if points))
    if not models:
        return
    nowhere = [case for case, points in parts.items() if not points]
    title = "simulated weak scaling" + (
        f" (on no simulated number of GPUs fit: {', '.join(nowhere)})" if nowhere else ""
    )
    with figure(SIMULATION / "weak.png", title, 1, len(models), (7 * len(models), 5)) as axes:
        for axis, model in zip(axes[0], models, strict=True):
            curves = [
                curve_of(case, points) for case, points in parts.items() if points and case.split()[0] == model
            ]
            axis.axhline(100, color="black", linestyle=":", linewidth=1)
            axis.set_title(f"{model}; dotted: ideal, dashed: 4-bit base", fontsize=10)
            draw_curves(axis, curves, "GPUs", "tokens/s and GPU, % of those of the smallest world", "{:.2f} %")


def curve_of(case: str, points: dict[int, float]) -> Curve:
    _, *rest = case.split()
    return Curve(
        " ".join(rest), WAYS.index(rest[-1]), list(points), [100 * part for part in points.values()],
        dashed="4-bit" in rest,
    )  # fmt: skip
