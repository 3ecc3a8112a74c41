"""Arrays and figures from integers and numbers; nothing here knows a model or a logger."""

import csv
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor


def grid(x: Int[Tensor, "N C H W"], levels: int, columns: int) -> UInt8[np.ndarray, "h w *c"]:
    """Images in rows of `columns`, thin grey lines between, enlarged until a small image can be seen."""
    x = (x.cpu().double() * 255 / (levels - 1)).round().to(torch.uint8)
    x = torch.nn.functional.pad(x, (1, 1, 1, 1), value=96)
    blank = -len(x) % columns
    x = torch.cat([x, x.new_full((blank, *x.shape[1:]), 96)])
    c, h, w = x.shape[1:]
    picture = x.view(-1, columns, c, h, w).permute(0, 3, 1, 4, 2).reshape(-1, columns * w, c)
    zoom = max(1, 84 // h)
    picture = picture.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
    return picture.squeeze(-1).numpy()


def pairs(above: Int[Tensor, "N C H W"], below: Int[Tensor, "N C H W"], columns: int) -> Int[Tensor, "M C H W"]:
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


def learning_curves(metrics: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Rate, distortion and bits/dim of training and validation against optimiser steps, as a PNG. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.4), layout="constrained")
    units = {"rate": "rate (nats)", "distortion": "distortion (nats)", "bits_per_dim": "bits/dim, bound"}
    for axes, (name, label) in zip(figure.subplots(1, len(units)), units.items(), strict=True):
        for split, style in (("train", {"color": "0.7"}), ("val", {"color": "C0", "marker": "."})):
            curve = metrics.get(f"{split}/{name}", [])
            axes.plot([step for step, _ in curve], [value for _, value in curve], label=split, **style)
        best = [value for _, value in metrics.get(f"val/{name}", [])] or [
            value for _, value in metrics[f"train/{name}"]
        ]
        settled = best[len(best) // 5 :]
        spread = max(settled) - min(settled)
        axes.set_ylim(min(settled) - 0.2 * spread - 1e-3, max(settled) + 0.5 * spread + 1e-3)
        axes.set(xlabel="step", title=label)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
