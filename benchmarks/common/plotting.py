"""Figures whose curves and bars differ without colours too, with their names beside them, inside the frame."""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

# Okabe and Ito's colours, but for yellow, which white paper swallows; markers and hatches tell them apart without.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "///", "...", "xx", "\\\\\\", "++", "oo")
_LINE_HEIGHT = 11  # points, of a curve's name


class Curve(NamedTuple):
    name: str
    style: int  # number of its colour, marker and hatch
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()  # ends of error bars
    high: Sequence[float] = ()
    dashed: bool = False


@contextmanager
def figure(out: Path, title: str, rows: int, columns: int, size: tuple[float, float]) -> Iterator[Any]:
    """Its axes, as an array of rows; written to `out` at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    drawn.suptitle(textwrap.fill(title, int(12 * size[0])), fontsize=10)
    yield axes
    drawn.savefig(out, dpi=110)
    pyplot.close(drawn)
    print(out)


def draw_curves(
    axes: Any, curves: Sequence[Curve], x_name: str, y_name: str, y_format: str, bottom: float | None = None
) -> None:
    """Over powers of two; each curve's name and last value stand at its end. `y_format` makes the value's text;
    `bottom`: where the axis of y begins."""
    ticks = sorted({value for curve in curves for value in curve.x})
    span = max(1.0, math.log2(ticks[-1] / ticks[0]))
    curves = sorted(curves, key=lambda curve: curve.y[-1])
    for number, curve in enumerate(curves):
        if curve.low:  # error bars stand side by side
            shift = 2 ** (0.015 * span * (number - (len(curves) - 1) / 2))
            curves[number] = curve._replace(x=[value * shift for value in curve.x])
        _draw_curve(axes, curves[number])
    axes.set_xscale("log", base=2)
    axes.set_xlim(ticks[0] * 2 ** (-0.08 * span), ticks[-1] * 2 ** (0.36 * span))  # names stand on the right
    axes.set_ylim(bottom=bottom)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_xlabel(x_name)
    axes.set_ylabel(y_name)
    _name_ends(axes, curves, y_format)


def _draw_curve(axes: Any, curve: Curve) -> None:
    look = {"color": COLOURS[curve.style], "marker": MARKERS[curve.style], "linewidth": 1.6}
    if curve.dashed:
        look |= {"linestyle": "--", "markersize": 5, "markerfacecolor": "white"}
    else:
        look |= {"markersize": 7}
    ends = None
    if curve.low:
        ends = [[y - low for y, low in zip(curve.y, curve.low, strict=True)],
                [high - y for y, high in zip(curve.y, curve.high, strict=True)]]  # fmt: skip
    axes.errorbar(curve.x, curve.y, yerr=ends, capsize=3, **look)


def _name_ends(axes: Any, curves: Sequence[Curve], y_format: str) -> None:
    """Names beside the last points, in a column where they would touch. `curves`: the lowest end first."""
    axes.figure.draw_without_rendering()
    to_points = 72 / axes.figure.dpi
    low, high = (axes.transAxes.transform((0, y))[1] * to_points for y in (0, 1))
    wanted = [axes.transData.transform((curve.x[-1], curve.y[-1]))[1] * to_points for curve in curves]
    places = spaced(wanted, _LINE_HEIGHT, low + _LINE_HEIGHT / 2, high - _LINE_HEIGHT / 2)
    for curve, want, place in zip(curves, wanted, places, strict=True):
        axes.annotate(
            f"{curve.name} {y_format.format(curve.y[-1])}", (curve.x[-1], curve.y[-1]), (16, place - want),
            textcoords="offset points", fontsize=8, va="center", color=COLOURS[curve.style],
            arrowprops={"arrowstyle": "-", "color": COLOURS[curve.style], "linewidth": 0.5, "shrinkB": 4},
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5}, zorder=5,
        )  # fmt: skip


def spaced(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending places as near to the `wanted` ones as a `gap` between neighbours and the ends let them."""
    places: list[float] = []
    for place in wanted:
        places.append(max(place, low, places[-1] + gap if places else low))
    limit = high
    for number in reversed(range(len(places))):
        places[number] = min(places[number], limit)
        limit = places[number] - gap
    return places


def draw_bars(axes: Any, groups: Mapping[str, Mapping[str, float | None]], title: str, x_name: str) -> None:
    """A group of bars for each key of `groups`, each with its value beside it; the line is at 1."""
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    for number, name in enumerate(names):
        heights = [bars.get(name) for bars in groups.values()]
        at = [row + (number - (len(names) - 1) / 2) * 0.27 for row in range(len(heights))]
        drawn = axes.barh(at, [height or 0.0 for height in heights], 0.25, label=name, color=COLOURS[number],
                          hatch=HATCHES[number], edgecolor="white")  # fmt: skip
        texts = [f"{height:.2f}" if height else "not measured" for height in heights]
        axes.bar_label(drawn, texts, fontsize=8, padding=3)
    largest = max((height or 0.0 for bars in groups.values() for height in bars.values()), default=1.0)
    axes.set_xlim(0, 1.12 * max(1.0, largest))
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(groups)), list(groups), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(x_name)
    axes.set_title(title, fontsize=10)
