"""Figures of a sweep; each is drawn into axes of matplotlib, on validation and in nats."""

import json
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from math import nan
from typing import Any, NamedTuple

import numpy as np

from vlae.figures import read_metrics
from vlae.sweeps import Job, Point, points
from vlae.window import window

INK, RULE = "#1f2328", "#d3d7de"
HUES = ["#3f7fd0", "#1f9e8f", "#8aa52f", "#dd8a1f", "#d1495b", "#9a5bb5"]  # can be told on white and on black
MARKS = "oDs^vP*X"
DASHES: list[Any] = ["-", (0, (5, 1.5)), (0, (2, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (1, 1.2)), (0, (9, 3))]
LABELS = {"nelbo": "NELBO", "rate": "Rate", "distortion": "Distortion"}
Draw = Callable[[Any, Any], None]  # takes a figure and its axes


def text(settings: dict[str, Any], name: str | None) -> str:
    """A setting as one writes it on the command line, null where a run lacks it; empty without a name."""
    value = settings.get(name) if name else ""
    return value if isinstance(value, str) else json.dumps(value)


def order(value: str) -> tuple[int, float, str]:
    """Sorts numbers by size, windows by the pixels they show, the rest by name."""
    with suppress(ValueError):
        return 0, float(value), value
    with suppress(ValueError):
        return 1, float(len(window(value))), value
    return 2, 0.0, value


class Sweep(NamedTuple):
    """Runs with settings, those points of them that have figures, and what these vary in: `x` runs along a curve,
    each of `series` is a colour."""

    runs: list[Job]
    points: list[Point]
    x: str | None
    series: str | None
    others: list[str]

    def values(self, name: str | None) -> list[str]:
        return sorted({text(run.settings, name) for run in self.runs}, key=order)

    def looks(self, point: Point) -> dict[str, Any]:
        """Its colour, and hollow marks where fewer seeds are done than of other points."""
        hollow = {"markerfacecolor": "none"} if point.done < max(each.done for each in self.points) else {}
        return {"color": colors(self)[text(point.settings, self.series)], **hollow}

    def styles(self, kinds: Any) -> dict[str, Any]:
        """All the same where they could not be told apart."""
        values = self.values(self.x)
        return dict(zip(values, kinds, strict=False)) if len(values) <= len(kinds) else dict.fromkeys(values, kinds[0])


def colors(sweep: Sweep) -> dict[str, Any]:
    from matplotlib.colors import LinearSegmentedColormap

    values, hues = sweep.values(sweep.series), LinearSegmentedColormap.from_list("hues", HUES)
    return {value: hues(k / max(1, len(values) - 1)) for k, value in enumerate(values)}


def legends(sweep: Sweep, figure: Any, **styles: dict[str, Any]) -> None:
    """Colours above the axes, marks or dashes below; of many, six that stand for them."""
    from matplotlib.lines import Line2D

    plain = {"linestyle": ""} if "marker" in styles else {}
    looks = [("color", sweep.series, {}, colors(sweep)), *((k, sweep.x, plain, v) for k, v in styles.items())]
    for (key, name, more, look), place in zip(looks, ("upper", "lower"), strict=False):
        if name and len({*look.values()}) > 1:
            some = list(look)[:: -(-len(look) // 6)]
            lines = [Line2D([], [], **({"color": INK} | more | {key: look[value]})) for value in some]
            columns = min(len(some), max(1, 60 // (6 + max(map(len, some)))))
            at = {"loc": f"outside {place} center", "ncols": columns}
            figure.legend(lines, some, title=name.removeprefix("model."), **at)


def sweep(runs: list[Job]) -> Sweep:
    """The window along x and the prior's depth as series where they vary, else what takes most values.

    Of settings that rise and fall together one is drawn.
    """
    runs = [run for run in runs if run.settings]
    found = points(runs) if runs else []
    values = {name: [text(point.settings, name) for point in found] for point in found[:1] for name in point.settings}
    favourite = {"model.decoder.receptive_field": 2, "model.prior.depth": 1}
    ranks = {name: (favourite.get(name, 0), len({*each})) for name, each in values.items()}
    apart: dict[tuple[int, ...], str] = {}
    for name in sorted(values, key=lambda name: ranks[name], reverse=True):
        levels = sorted({*values[name]}, key=order)
        up = tuple(levels.index(value) for value in values[name])
        apart.setdefault(max(up, tuple(len(levels) - 1 - level for level in up)), name)
    names = list(apart.values())
    scored = [point for point in found if "val/nelbo" in point.means]
    return Sweep(runs, scored, names[0] if names else None, names[1] if names[1:] else None, names[2:])


def rate_distortion(sweep: Sweep, figure: Any, axes: Any) -> None:
    """Means over seeds with their spreads, and lines of equal NELBO."""
    shades, marks = colors(sweep), sweep.styles(MARKS)
    curves: dict[tuple[str, ...], list[Point]] = {}
    for point in sorted(sweep.points, key=lambda point: order(text(point.settings, sweep.x))):
        key = tuple(text(point.settings, name) for name in (sweep.series, *sweep.others))
        curves.setdefault(key, []).append(point)
    for (value, *_), curve in curves.items():
        at = [[point.means[f"val/{name}"] for point in curve] for name in ("rate", "distortion")]
        axes.plot(*at, color=shades[value], linewidth=1.4, alpha=0.7)
        for point, rate, distortion in zip(curve, *at, strict=True):
            spread = (point.spreads.get(f"val/{name}", nan) for name in ("distortion", "rate"))
            mark = marks[text(point.settings, sweep.x)]
            axes.errorbar(rate, distortion, *spread, marker=mark, elinewidth=1, **sweep.looks(point))
    axes.margins(0.08)
    axes.set(xlabel="Rate (nats)", ylabel="Distortion (nats)")
    legends(sweep, figure, marker=marks)
    figure.draw_without_rendering()  # now the axes have their size, and labels the slope of their lines
    across, up = (np.linspace(low, high) for low, high in (axes.get_xlim(), axes.get_ylim()))
    equal = axes.contour(across, up, across + up[:, None], levels=6, colors=RULE, linewidths=0.8, zorder=0)
    axes.clabel(equal, fmt="%g", fontsize=8, colors=INK)


def heat_map(sweep: Sweep, metric: str, figure: Any, axes: Any) -> None:
    """Mean and spread for each value of x and series; where there is none, what became of the runs."""
    columns, rows = sweep.values(sweep.x), sweep.values(sweep.series)
    place = {
        run.folder: (rows.index(text(run.settings, sweep.series)), columns.index(text(run.settings, sweep.x)))
        for run in sweep.runs
    }
    words: dict[tuple[int, int], str] = {place[run.folder]: run.state for run in sweep.runs}
    grid = np.full((len(rows), len(columns)), nan)
    seeds = max(point.done for point in sweep.points)
    for point in reversed(sweep.points):  # the best is the last to be written
        at = place[point.runs[0].folder]
        grid[at] = point.means[f"val/{metric}"]
        spread = point.spreads.get(f"val/{metric}")
        words[at] = f"{grid[at]:.2f}" + (f"\n± {spread:.2f}" if spread is not None else "")
        words[at] += f"\nn = {point.done}" if point.done < seeds else ""
    figure.set_size_inches(np.maximum(figure.get_size_inches(), (0.85 * len(columns), 0.55 * len(rows))))
    drawn = axes.imshow(grid, cmap={"nelbo": "GnBu_r", "rate": "Purples"}[metric], aspect="auto")
    light = drawn.to_rgba(grid)[..., :3] @ (0.3, 0.6, 0.1) > 0.55
    for at, word in words.items():
        color = INK if np.isnan(grid[at]) else "#000000" if light[at] else "#ffffff"
        axes.text(*at[::-1], word, ha="center", va="center", size=9, color=color)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel=str(sweep.x).removeprefix("model."), ylabel=str(sweep.series).removeprefix("model."))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def against(sweep: Sweep, metric: str, x: str, figure: Any, axes: Any) -> None:
    """Every point over one setting; numbers on an axis of numbers, of logarithms where they span a hundredfold."""
    values = [order(value) for value in sweep.values(x)]
    numeric = all(kind == 0 for kind, _, _ in values)
    places = {value: size if numeric else k for k, (_, size, value) in enumerate(values)}
    at = f"val/{metric}"
    dots = sorted((places[text(point.settings, x)], k) for k, point in enumerate(sweep.points))
    for place, k in dots:
        point = sweep.points[k]
        axes.errorbar(place, point.means[at], point.spreads.get(at, nan), marker="o", capsize=3, **sweep.looks(point))
    if sweep.series is None:
        axes.plot([place for place, _ in dots], [sweep.points[k].means[at] for _, k in dots], color=HUES[0])
    if numeric and places and min(places.values()) > 0 and max(places.values()) >= 100 * min(places.values()):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    elif len(places) <= 12:
        axes.set_xticks(list(places.values()), list(places))
    axes.set(xlabel=x.removeprefix("model."), ylabel=f"{LABELS[metric]} (nats)")
    axes.grid(color=RULE, linewidth=0.6)
    legends(sweep, figure)


def learning(sweep: Sweep, metric: str, curves: list[list[tuple[int, float]]], figure: Any, axes: Any) -> None:
    """The validations of each run against optimiser steps."""
    shades, dashes = colors(sweep), sweep.styles(DASHES)
    for run, curve in zip(sweep.runs, curves, strict=True):
        color, dash = shades[text(run.settings, sweep.series)], dashes[text(run.settings, sweep.x)]
        mark = "." if len(curve) == 1 else None
        axes.plot(
            *np.array(curve).reshape(-1, 2).T, color=color, linestyle=dash, linewidth=1.2, alpha=0.85, marker=mark
        )
    # the first third falls so far that the rest would be flat
    third = max(step for curve in curves for step, _ in curve) / 3
    settled = [value for curve in curves for step, value in curve if step >= third]
    margin = 0.05 * (max(settled) - min(settled)) + 1e-3
    axes.set_ylim(min(settled) - margin, max(settled) + margin)
    axes.set(xlabel="Step", ylabel=f"{LABELS[metric]} (nats)")
    axes.grid(color=RULE, linewidth=0.6)
    legends(sweep, figure, linestyle=dashes)


def charts(sweep: Sweep) -> dict[str, tuple[str, str, Draw]]:
    """By file name the title, the caption and the drawing of each figure that the runs allow."""
    x, series = (str(name).rpartition(".")[2] for name in (sweep.x, sweep.series))
    chosen: dict[str, tuple[str, str, Draw]] = {}
    cells = len(sweep.values(sweep.x)) * len(sweep.values(sweep.series))
    gridded = sweep.series is not None and 2 * len(sweep.points) >= cells
    if sweep.points:
        hollow = " Hollow: fewer seeds are done." * (len({point.done for point in sweep.points}) > 1)
        caption = (
            "What a code costs against what it leaves unsaid, a point for each model. Thin lines join equal NELBOs."
            + hollow
        )
        chosen["rate_distortion"] = "Rate and distortion", caption, partial(rate_distortion, sweep)
        if gridded:
            caption = "Mean ± spread over seeds" + "; of models that differ in more, the best" * bool(sweep.others)
            for metric, means in (("nelbo", "lower is better"), ("rate", "nats that the code carries")):
                draw = partial(heat_map, sweep, metric)
                chosen[f"{metric}_heat_map"] = f"{LABELS[metric]} by {series} and {x}", f"{caption}; {means}.", draw
        for name in sweep.others if gridded else filter(None, [sweep.x, sweep.series, *sweep.others]):
            for metric in ("nelbo", "rate"):
                title = f"{LABELS[metric]} against {name.removeprefix('model.')}"
                caption, draw = (
                    "A dot for each model, with its spread over seeds." + hollow,
                    partial(against, sweep, metric, name),
                )
                chosen[f"{metric}_against_{name.replace('/', '%')}"] = title, caption, draw
    logs = [read_metrics(run.folder) for run in sweep.runs]
    for metric in ("nelbo", "rate"):
        curves = [log.get(f"val/{metric}", []) for log in logs]
        if any(curves):
            caption, draw = (
                "Every run, also those that did not finish. The axis is cut to what follows a third of the longest.",
                partial(learning, sweep, metric, curves),
            )
            chosen[f"{metric}_learning"] = f"{LABELS[metric]} while training", caption, draw
    return chosen
