"""Arrays and figures from integers and numbers; nothing here knows a model or a logger."""

import json
import textwrap
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Integer, UInt8
from PIL import Image, ImageDraw, ImageFont
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


def captioned(picture: UInt8[np.ndarray, "h w *c"], text: str) -> UInt8[np.ndarray, "H W rgb"]:
    """A picture below the words that say what it shows."""
    font, wide = ImageFont.load_default(15), max(picture.shape[1], 320)
    lines = textwrap.wrap(text, wide // 8)
    top = 22 * len(lines) + 8
    image = Image.new("RGB", (wide, top + picture.shape[0]), "white")
    for k, line in enumerate(lines):
        ImageDraw.Draw(image).text((6, 4 + 22 * k), line, "black", font)
    image.paste(Image.fromarray(picture), (0, top))
    return np.asarray(image)


def save(picture: UInt8[np.ndarray, "h w *c"], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, optimize=True)


def read_metrics(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every metric that a run logged in `folder`, in order; none if it logged nothing yet."""
    found: dict[str, dict[int, float]] = {}
    path = folder / "log.jsonl"
    lines = path.read_text().split("\n") if path.exists() else [""]
    for line in lines[:-1]:  # what follows the last line was cut off when the run was killed
        row = json.loads(line)
        step = row.pop("step")
        for name, value in row.items():
            found.setdefault(name, {})[step] = value
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
        curves = {"training": smooth(metrics.get(f"train/{name}", [])), "validation": metrics.get(f"val/{name}", [])}
        for (label, curve), color in zip(curves.items(), ("0.7", "C0"), strict=True):
            if curve:  # no validation where its images are trained on
                axes.plot([step for step, _ in curve], [value for _, value in curve], label=label, color=color)
        # the first fifth falls so far that the rest would be flat
        settled = [value for curve in curves.values() for _, value in curve[len(curve) // 5 :]]
        margin = 0.05 * (max(settled) - min(settled)) + 1e-3
        axes.set_ylim(min(settled) - margin, max(settled) + margin)
        axes.set(xlabel="step", title=title)
        axes.locator_params(axis="x", nbins=5)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def heat_maps(x: Integer[Tensor, "N C H W"], bits: Float[Tensor, "N H W"], levels: int, path: Path) -> None:
    """Images over the bits that each of their pixels costs given the code and the window. Needs matplotlib."""
    from matplotlib.figure import Figure

    count, ratio = len(x), x.shape[2] / x.shape[3]
    figure = Figure(figsize=(1.3 * count + 1, 2.6 * ratio + 1), layout="constrained")
    axes = figure.subplots(2, count, squeeze=False)
    for k in range(count):
        shown = (x[k].permute(1, 2, 0).cpu().double() / (levels - 1)).numpy()
        axes[0, k].imshow(shown.squeeze(2) if len(x[k]) == 1 else shown, cmap="gray", vmin=0, vmax=1)
        drawn = axes[1, k].imshow(bits[k].cpu().numpy(), cmap="magma", vmin=0, vmax=float(bits.quantile(0.999)))
        axes[1, k].set_xlabel(f"{bits[k].sum():.0f} bits")
    for each in axes.flat:
        each.set(xticks=[], yticks=[])
    figure.colorbar(drawn, ax=axes[1, :], label="bits a pixel")
    figure.suptitle("Images, and what each pixel costs given the code and the pixels in its window")
    figure.savefig(path, dpi=110)


def where_bits_go(
    sizes: list[int],
    gains: Float[np.ndarray, "T 3"],
    bounds: Float[np.ndarray, "T"],
    initial: int,
    files: dict[str, int],
    path: Path,
) -> None:
    """A file of images by bits-back coding: what its bits are for, the stack as it grows, the bytes of other files.

    Of each batch of `sizes` images: bits that the stack gains as codes are drawn (negative), pixels pushed and codes
    pushed; -ELBO in bits. `initial` bits stood on the stack before. `files`: bytes by name, the first of this file.
    Needs matplotlib.
    """
    from matplotlib.figure import Figure

    count, ours = sum(sizes), next(iter(files))
    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[7, 5, 3])

    back, pixels, code = gains.sum(0) / count
    first, file, bound = initial / count, 8 * files[ours] / count, bounds.sum() / count
    heights = np.array([pixels, code, back, first, file - first - gains.sum() / count, file])
    bottoms = np.array([0, *heights[:4].cumsum(), 0])
    words = {"pixels": r"$-\log_2\,p(x|z)$", "code": r"$-\log_2\,p(z)$", "got back": r"$+\log_2\,q(z|x)$"}
    labels = [f"{name}\n{formula}" for name, formula in words.items()] + ["initial\nbits", "header", "file"]
    left.bar(labels, heights, 0.8, bottoms, color=["C0", "C1", "C2", "0.6", "0.3", "k"])
    for k, (bottom, height) in enumerate(zip(bottoms, heights, strict=True)):
        inside = abs(height) > 0.1 * (pixels + code)
        at, color = (bottom + height / 2, "w") if inside else (max(bottom, bottom + height, bound), "k")
        left.text(k, at, f"{height:.1f}", ha="center", va="center" if inside else "bottom", color=color)
    left.axhline(bound, color="C3", linestyle="--", label=f"-ELBO: {bound:.1f}")
    left.text(2.6, 0.6 * (pixels + code), f"rate: code and got back,\n{code + back:.1f} together")
    left.set(title=f"Bits of an image, mean of {count:,}", ylim=(0, 1.1 * (pixels + code)))
    left.tick_params(axis="x", labelsize=8)

    few = int(np.searchsorted(np.cumsum(sizes), 60)) + 1  # batches that one can still tell apart
    ends = np.array([0, *np.cumsum(sizes)])[: few + 1]
    bits = initial + np.array([0, *gains[:few].flatten().cumsum()])
    images = np.interp(np.arange(len(bits)) / 3, np.arange(len(ends)), ends)
    steps = [("codes drawn", "C2"), ("pixels pushed", "C0"), ("codes pushed", "C1")]
    for k in range(len(bits) - 1):
        label, color = steps[k % 3]
        middle.plot(images[k : k + 2], bits[k : k + 2], color, label=label if k < 3 else None)
    middle.plot(ends, initial + np.array([0, *bounds[:few].cumsum()]), "C3--", label="initial bits - ELBO")
    middle.set(title="Bits on the stack, batch by batch", xlabel="images", ylim=(0, None))

    names = sorted(files, key=lambda name: -files[name])
    bars = right.barh(names, [files[name] for name in names], color=["k" if name == ours else "0.7" for name in names])
    right.bar_label(bars, [f"{files[name]:,}" for name in names], padding=3)
    right.margins(x=0.3)
    right.set(title=f"Bytes of {count:,} images", xticks=[])
    right.spines[["top", "right", "bottom"]].set_visible(False)
    for axes in (left, middle):
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def noise_histogram(eps: Float[Tensor, "N D"], path: Path) -> None:
    """Noise that the prior finds for codes of images, next to N(0, 1). Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    values = eps.flatten().clamp(-6, 6).cpu().numpy()
    left.hist(values, bins=120, range=(-6, 6), density=True, histtype="stepfilled", color="C0", label="codes of images")
    t = np.linspace(-6, 6, 200)
    left.plot(t, np.exp(-(t**2) / 2) / np.sqrt(2 * np.pi), "k--", label="N(0, 1)")
    left.set(title="all dimensions of the code", xlabel="noise", ylabel="density")
    left.legend(frameon=False)
    deviation = eps.cpu().double().std(0, correction=0).sort(descending=True).values.numpy()
    right.plot(deviation, color="C0", label="codes of images")
    right.axhline(1, color="k", linestyle="--", label="N(0, 1)")
    right.set(title="each dimension by itself, sorted", xlabel="dimension of the code")
    right.set(ylabel="standard deviation", ylim=(0, 1.2 * max(1, float(deviation.max()))))
    right.legend(frameon=False)
    figure.suptitle("The noise that the prior finds for codes: normal if the prior fits them")
    figure.savefig(path, dpi=110)


def window_over(x: Integer[Tensor, "C H W"], window: list[tuple[int, int]], levels: int, path: Path) -> None:
    """The window of one pixel in the middle of an image. Needs matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    height, width = x.shape[1:]
    i, j = height // 2, width // 2
    inside = [(down, right) for down, right in window if i + down >= 0 and 0 <= j + right < width]
    shown = (x.permute(1, 2, 0).cpu().double() / (levels - 1)).numpy()
    figure = Figure(figsize=(4.6, 4.6 * height / width + 1.0), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shown.squeeze(2) if len(x) == 1 else shown, cmap="gray", vmin=0, vmax=1)
    for down, right in inside:
        axes.add_patch(Rectangle((j + right - 0.5, i + down - 0.5), 1, 1, color="C0", alpha=0.6, linewidth=0))
    axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, color="C3"))
    axes.add_patch(Rectangle((-0.5, i + 0.5), width, height - i - 1, color="0.5", alpha=0.5, linewidth=0))
    axes.add_patch(Rectangle((j + 0.5, i - 0.5), width - j - 1, 1, color="0.5", alpha=0.5, linewidth=0))
    axes.set(xticks=[], yticks=[], xlabel="grey: not drawn yet")
    axes.set_title(
        f"To draw the red pixel the decoder sees the code\nand the blue window: {len(inside)} of the earlier pixels",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)
