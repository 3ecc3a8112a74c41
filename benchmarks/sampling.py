"""Seconds to draw a batch of images next to one forward pass of the decoder, and next to raster order.

forward_s            features of the codes and one parallel pass of the decoder
sample_s             features of the codes and the scan over the waves
prior_s              the codes from their noise
ratio_to_forward     sample_s / forward_s
speedup_over_raster  against features once and then one whole pass of the decoder for each pixel; `raster_passes` of
                     the passes are timed and scaled to all pixels
identical            on a few images the pixels are those of raster order for the same noise

Nothing is compiled. What is compared takes turns; each figure is the median over the turns. One JSON line a
measurement: the shipped weights at several batches, then models of the same shape with random weights and other
windows or image sizes. On a GPU all are CUDA graphs: one launch, however many waves.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from torch import Tensor, nn

import vlae
from vlae.model import VLAE
from vlae.records import commit, emit, hardware
from vlae.sampling import decode

CONFIG = Path(__file__).parents[1] / "conf" / "model" / "binary.yaml"
PASSES, IMAGES = 8, 2  # of raster order: passes timed, images compared


def random_model(receptive_field: str, size: int) -> VLAE:
    config = yaml.safe_load(CONFIG.read_text())
    config["decoder"]["receptive_field"] = receptive_field
    torch.manual_seed(0)
    model = vlae.build(config, (1, size, size), levels=2)
    nn.init.normal_(model.decoder.head.weight)  # or else no pixel would depend on its window
    return model.eval()


def raster(model: VLAE, h: Tensor, uniform: Tensor, count: int) -> Tensor:
    """The first `count` pixels in raster order, each by a pass over the whole image."""
    x = torch.zeros_like(uniform, dtype=torch.long)
    for pixel in range(count):
        i, j = divmod(pixel, x.shape[3])
        here = (..., slice(i, i + 1), slice(j, j + 1))
        x[here] = model.likelihood.sample(model.decoder(model.unit(x), h)[here], uniform[here])
    return x


def captured(function: Callable[[], Any]) -> Callable[[], Any]:
    """The function as one CUDA graph; its first calls, beside the main stream, are what capturing asks for."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def seconds(functions: dict[str, Callable[[], Any]], turns: int, device: torch.device) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(turns + 1):  # the first warms up
        for name, function in functions.items():
            begun = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken[name].append(time.perf_counter() - begun)
    return {name: median(each[1:]) for name, each in taken.items()}


@torch.no_grad()
def measure(model: VLAE, weights: str, batch: int, turns: int) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, (height, width) = model.to(device), model.decoder.shape[1:]
    noise = torch.Generator().manual_seed(0)
    eps = torch.randn(batch, model.prior.code, generator=noise).to(device)
    uniform = torch.rand(batch, *model.decoder.shape, generator=noise).to(device)
    z = model.prior.inverse(eps)
    h, x = model.decoder.features(z), decode(model, z, uniform)
    u = model.unit(x)
    few = raster(model, model.decoder.features(z[:IMAGES]), uniform[:IMAGES], height * width)
    functions = {
        "features": lambda: model.decoder.features(z),
        "forward": lambda: model.decoder(u, model.decoder.features(z)),
        "sample": lambda: decode(model, z, uniform),
        "prior": lambda: model.prior.inverse(eps),
        "raster": lambda: raster(model, h, uniform, PASSES),
    }
    if device.type == "cuda":
        functions = {name: captured(function) for name, function in functions.items()}
    taken = seconds(functions, turns, device)
    raster_s = taken["features"] + taken["raster"] * height * width / PASSES
    return {
        "bench": "sampling",
        "device": hardware(device),
        "threads": torch.get_num_threads(),
        "weights": weights,
        "height": height,
        "width": width,
        "levels": model.likelihood.levels,
        "receptive_field": model.description["model"]["decoder"]["receptive_field"],
        "batch": batch,
        **{f"{name}_s": round(taken[name], 5) for name in ("forward", "sample", "prior")},
        "ratio_to_forward": round(taken["sample"] / taken["forward"], 3),
        "speedup_over_raster": round(raster_s / taken["sample"], 1),
        "raster_passes": PASSES,
        "identical": torch.equal(x[:IMAGES], few),
        "commit": commit(),
    }


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """Milliseconds an image, against the batch, the window and the size of the image."""
    from matplotlib.figure import Figure

    shipped = sorted((line for line in lines if line["weights"] != "random"), key=lambda line: line["batch"])
    random = sorted((line for line in lines if line["weights"] == "random"), key=lambda line: line["height"])
    growth = {
        "images in a batch (28x28, shipped weights)": ("batch", shipped),
        "window (28x28)": ("receptive_field", [line for line in random if line["height"] == 28]),
        "height and width of the image (window 7x4)": ("height", [x for x in random if x["receptive_field"] == "7x4"]),
    }
    names = {"sample": "sampling: features + waves", "forward": "one forward pass", "prior": "codes from noise"}
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, len(growth), sharey=True)
    for axis, (label, (key, part)) in zip(axes, growth.items(), strict=True):
        for (name, legend), mark in zip(names.items(), "os^", strict=True):
            each = [1e3 * line[f"{name}_s"] / line["batch"] for line in part]
            axis.plot([str(line[key]) for line in part], each, f"{mark}-", label=legend)
        axis.set(xlabel=label, yscale="log")
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("milliseconds an image")
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 64, 256], help="of the shipped weights")
    parser.add_argument("--windows", nargs="*", default=["none", "1x1", "3x2", "4x2", "5x3", "7x4", "15x8"])
    parser.add_argument("--sizes", type=int, nargs="*", default=[14, 32, 56], help="of images for the window 7x4")
    parser.add_argument("--batch", type=int, default=64, help="for --windows and --sizes")
    parser.add_argument("--turns", type=int, default=7, help="of each, besides one to warm up")
    parser.add_argument("--out", type=Path, help="a file to append the lines to")
    parser.add_argument("--plot", type=Path, help="a picture of the growth, such as results/sampling.png")
    arguments = parser.parse_args()
    shipped, batch = "mnist_static", arguments.batch
    cases: list[tuple[str, Callable[[], VLAE], int]] = [
        *[(shipped, partial(vlae.load, shipped), batch) for batch in arguments.batches],
        *[("random", partial(random_model, window, 28), batch) for window in arguments.windows],
        *[("random", partial(random_model, "7x4", size), batch) for size in arguments.sizes],
    ]
    lines = []
    for weights, model, batch in cases:
        lines.append(measure(model(), weights, batch, arguments.turns))
        emit(lines[-1], arguments.out)
    if arguments.plot:
        plot(lines, arguments.plot)


if __name__ == "__main__":
    main()
