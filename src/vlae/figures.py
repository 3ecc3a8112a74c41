"""Arrays and figures from integers and numbers; nothing here knows a model or a logger."""

import csv
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Integer, UInt8
from PIL import Image
from torch import Tensor


def grid(x: Integer[Tensor, "N C H W"], levels: int, columns: int) -> UInt8[np.ndarray, "h w *c"]:
    """Images in rows of `columns`, thin grey lines between, enlarged until a small image can be seen."""
    x = (x.cpu().double() * 255 / (levels - 1)).round().to(torch.uint8)
    zoom = max(1, 84 // x.shape[2])
    x = x.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    x = torch.nn.functional.pad(x, (2, 2, 2, 2), value=96)
    x = torch.cat([x, x.new_full((-len(x) % columns, *x.shape[1:]), 96)])
    c, h, w = x.shape[1:]
    return x.view(-1, columns, c, h, w).permute(0, 3, 1, 4, 2).reshape(-1, columns * w, c).squeeze(-1).numpy()


def pairs(
    above: Integer[Tensor, "N C H W"], below: Integer[Tensor, "N C H W"], columns: int
) -> Integer[Tensor, "M C H W"]:
    """Images in the order in which `grid` puts each row of `above` over its row of `below`."""
    rows = [part for both in zip(above.split(columns), below.split(columns), strict=True) for part in both]
    return torch.cat(rows)


def save(picture: UInt8[np.ndarray, "h w *c"], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, optimize=True)


def read_metrics(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every metric in the `metrics.csv` files below `folder`, those of resumed runs in order."""
    found: dict[str, dict[int, float]] = {}
    for path in sorted(folder.rglob("metrics.csv"), key=lambda path: path.stat().st_mtime):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if value and name not in ("step", "epoch"):
                        found.setdefault(name, {})[int(row["step"])] = float(value)
    return {name: sorted(values.items()) for name, values in found.items()}


def smooth(curve: list[tuple[int, float]], points: int = 100) -> list[tuple[int, float]]:
    """Means of neighbours, so that at most about `points` are left: single batches are noisy."""
    every = max(1, len(curve) // points)
    means = (np.mean(curve[start : start + every], axis=0) for start in range(0, len(curve) - every + 1, every))
    return [(int(step), float(value)) for step, value in means]


def learning_curves(metrics: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Rate, distortion and bits/dim of training and validation against optimiser steps, as a PNG. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.4), layout="constrained")
    titles = {"rate": "rate (nats)", "distortion": "distortion (nats)", "bits_per_dim": "bits/dim, bound"}
    for axes, (name, title) in zip(figure.subplots(1, len(titles)), titles.items(), strict=True):
        curves = [smooth(metrics.get(f"train/{name}", [])), metrics.get(f"val/{name}", [])]
        for curve, label, color in zip(curves, ("training", "validation"), ("0.7", "C0"), strict=True):
            axes.plot([step for step, _ in curve], [value for _, value in curve], label=label, color=color)
        # the first fifth falls so far that the rest would be flat
        settled = [value for curve in curves for _, value in curve[len(curve) // 5 :]]
        margin = 0.05 * (max(settled) - min(settled)) + 1e-3
        axes.set_ylim(min(settled) - margin, max(settled) + margin)
        axes.set(xlabel="step", title=title)
        axes.locator_params(axis="x", nbins=5)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
