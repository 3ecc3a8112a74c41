"""Codes alone as files: bytes an image against what is left of the image, for models that differ in their window.

RUN... are folders of binary runs with classes, on the same images; one JSON line each. Qualities of the images that
come out, next to those that went in:

wrong_pixels   share of the pixels that differ
digits         share of the images whose class is told by an RBF SVM that learnt it from original training images
texture        total variation between the frequencies of 3x3 pixels with ink in them: 0 for the same texture

files          by the bytes that `compress` was told: bytes an image of the whole file, and of `decompress` the most
               likely pixels (`likely`) and pixels drawn (`drawn`)
posterior      drawn from a draw of q(z | x) itself, at the rate of the model: no file

Then a line for each of other ways to a few bytes: images shrunk to SxS (in the smallest of `vlae.sizes`), and the
number of the nearest of N training images. Last, originals: what the classifier tells of them, and the texture of as
many training images.
"""

import argparse
import json
import math
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlae.charts import HUES, INK, RULE, order
from vlae.codes import encode
from vlae.commands import opened
from vlae.compression import BATCH, checksum, compress, decompress
from vlae.container import pack, unpack
from vlae.figures import captioned, grid, save
from vlae.model import VLAE
from vlae.noise import generator
from vlae.records import commit, emit, hardware
from vlae.report import STYLE
from vlae.sampling import reconstruct
from vlae.sizes import sizes

BYTES, SHOWN = (1, 2, 3, 4, 6, 8), (2, 8)  # an image; those of the picture
SIDES, INKED = (4, 6, 8, 10, 14), 0.4  # a small pixel is ink from that share on: at half, thin strokes are lost
NEAREST = (10, 100, 1_000, 10_000, 50_000)
LEARNT = 10_000  # training images of the classifier


def patterns(x: Tensor) -> Tensor:
    """Frequencies [511] of 3x3 pixels among those with ink in them."""
    bits = (2.0 ** torch.arange(9)).view(1, 1, 3, 3)
    count = torch.bincount(F.conv2d(x.float(), bits, padding=2).long().flatten(), minlength=512)[1:].double()
    return count / count.sum().clamp(min=1)


class Judge(NamedTuple):
    x: Tensor
    y: Tensor
    classifier: Any

    def digits(self, x: Tensor) -> float:
        return float(self.classifier.score(x.flatten(1).numpy(), self.y.numpy()))

    def texture(self, x: Tensor) -> float:
        return (patterns(x) - patterns(self.x)).abs().sum().item() / 2

    def __call__(self, x: Tensor) -> dict[str, float]:
        return {
            "wrong_pixels": round((x != self.x).double().mean().item(), 4),
            "digits": round(self.digits(x), 4),
            "texture": round(self.texture(x), 4),
        }


def measure(model: VLAE, judge: Judge, seed: int) -> tuple[dict[str, Any], list[Tensor]]:
    x, device = judge.x.long(), next(model.parameters()).device
    uniform = torch.rand(x.shape, generator=generator("lossy", seed, "pixels"))
    eps = torch.randn(1, len(x), model.prior.code, generator=generator("lossy", seed, "codes"))
    about, payload = unpack(compress(model, x, lossy=max(BYTES)))
    numbers, files, shown = np.frombuffer(payload, np.uint8).reshape(len(x), -1), {}, []
    for count in BYTES:
        first = numbers[:, :count].tobytes()  # all that fewer bytes would hold, as each is chosen after those before
        file = pack(about._replace(content=checksum(about, first)), first)
        drawn = decompress(model, file, uniform)
        qualities = {"likely": judge(decompress(model, file)), "drawn": judge(drawn)}
        files[f"{count}"] = {"bytes": round(len(file) / len(x), 3), **qualities}
        shown += [drawn] * (count in SHOWN)
    parts = zip(*(each.to(device).split(BATCH) for each in (x, eps[0], uniform)), strict=True)
    posterior = torch.cat([reconstruct(model, *part).cpu() for part in parts])
    rate = encode(model, x, eps).rate.mean().item() / math.log(2) / 8
    return {
        "lossless_bytes": round(len(compress(model, x)) / len(x), 3),
        "files": files,
        "posterior": {"bytes": round(rate, 3), **judge(posterior)},
    }, shown


def shrunk(judge: Judge, side: int) -> tuple[dict[str, Any], Tensor]:
    small = (F.adaptive_avg_pool2d(judge.x.float(), side) >= INKED).to(torch.uint8)
    large = (F.interpolate(small.float(), judge.x.shape[2:], mode="bilinear") >= 0.5).to(torch.uint8)
    size, name = min((size, name) for name, size in sizes(small, 2).items())
    return {"method": f"shrunk to {side}x{side}, {name}", "bytes": round(size / len(small), 3), **judge(large)}, large


def nearest(judge: Judge, train: Tensor) -> tuple[dict[str, Any], Tensor]:
    x, others = judge.x.flatten(1).float(), train.flatten(1).float()
    found = train[(others.sum(1) - 2 * x @ others.T).argmin(1)]
    size = math.log2(len(train)) / 8
    return {"method": f"nearest of {len(train)} training images", "bytes": round(size, 3), **judge(found)}, found


def plot(
    lines: list[dict[str, Any]], others: dict[str, list[dict[str, Any]]], originals: dict[str, Any], path: Path
) -> None:
    """Qualities against bytes: a colour for each window, grey for other ways."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    titles = {"digits": "Digits told (%)", "wrong_pixels": "Wrong pixels (%)", "texture": "Distance of textures (%)"}
    looks: dict[str, dict[str, Any]] = {
        "pixels drawn": {"marker": "o", "markersize": 5},
        "most likely pixels": {"linestyle": ":", "linewidth": 1.4},
        "draw of q(z | x) at its rate: no file": {"linestyle": "", "marker": "*", "markersize": 11, "zorder": 4},
    }
    greys: dict[str, dict[str, Any]] = {
        name: {"color": "0.6", "linestyle": dash} for name, dash in zip(others, ("--", "-."), strict=True)
    }
    floor: dict[str, Any] = {"color": INK, "linewidth": 0.8, "linestyle": (0, (1, 3))}
    windows = {f"window {line['receptive_field']}": hue for line, hue in zip(lines, cycle(HUES), strict=False)}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 4.9), layout="constrained")
        for axes, (name, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
            for line, color in zip(lines, windows.values(), strict=True):
                files, posterior = line["files"].values(), line["posterior"]
                drawn, likely = ([(file["bytes"], file[kind][name]) for file in files] for kind in ("drawn", "likely"))
                curves = drawn, likely, [(posterior["bytes"], posterior[name])]
                for curve, look in zip(curves, looks.values(), strict=True):
                    axes.plot(*zip(*((size, 100 * value) for size, value in curve), strict=True), color=color, **look)
            for look, points in zip(greys.values(), others.values(), strict=True):
                axes.plot([each["bytes"] for each in points], [100 * each[name] for each in points], zorder=0, **look)
            if name in originals:
                axes.axhline(100 * originals[name], **floor)
            axes.set(xlabel="Bytes an image", title=title, xlim=(0, max(BYTES) + 0.5), ylim=(0, None))
            axes.grid(color=RULE, linewidth=0.6)
        entries = [
            *({"color": hue} for hue in windows.values()),
            *({"color": INK} | look for look in looks.values()),
            *greys.values(),
            floor,
        ]
        handles, names = [Line2D([], [], **each) for each in entries], [*windows, *looks, *greys, "original images"]
        figure.legend(handles, names, loc="outside lower center", ncols=4)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--images", type=int, default=500, help="of the test split, drawn by the seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a file to append the lines to")
    parser.add_argument(
        "--plot", type=Path, help="a picture, such as results/lossy.png; images go into lossy_images.png"
    )
    arguments = parser.parse_args()
    from sklearn.svm import SVC  # seconds to import

    found = [opened(run) for run in arguments.runs]
    trained = {folder: json.loads((folder / "metrics.json").read_text()) for _, _, folder in found}
    found.sort(key=lambda each: order(str(each[0].description["model"]["decoder"]["receptive_field"])))
    images = found[0][1]()
    train, test = images.part("train"), images.part("test")
    if images.levels != 2 or train.labels is None or test.labels is None:
        parser.error(f"{images.dataset_name}: images of two levels with classes are needed")
    if not all(torch.equal(each().part("test").images, test.images) for _, each, _ in found[1:]):
        parser.error("the runs are of different images")
    chosen = torch.randperm(len(test.images), generator=generator("codec", arguments.seed))
    known = torch.randperm(len(train.images), generator=generator("lossy", arguments.seed, "train"))
    chosen, learnt = chosen[: arguments.images], known[:LEARNT]
    classifier = SVC(C=10).fit(train.images[learnt].flatten(1).numpy(), train.labels[learnt].numpy())
    judge = Judge(test.images[chosen], test.labels[chosen], classifier)
    about = {"data": images.dataset_name, "images": len(chosen), "seed": arguments.seed}
    made = {"device": hardware(torch.device("cpu")), "commit": commit()}

    columns = [int((judge.y == digit).nonzero()[0]) for digit in judge.y.unique()]
    pictures, lines = [("Test images", [judge.x])], []
    for model, _, folder in found:
        window = model.description["model"]["decoder"]["receptive_field"]
        nats = {name: round(trained[folder][f"test/{name}"], 3) for name in ("rate", "nelbo")}
        measured, shown = measure(model, judge, arguments.seed)
        lines.append({"bench": "lossy", **about, "receptive_field": window, **nats, **measured, **made})
        emit(lines[-1], arguments.out)
        pictures.append((f"Window {window}: {SHOWN[0]} bytes an image; below, {SHOWN[1]} bytes", shown))
    ways = {
        "shrunk, one bit a pixel": [shrunk(judge, side) for side in SIDES],
        "nearest training image by number": [nearest(judge, train.images[known[:count]]) for count in NEAREST],
    }
    for line, _ in (each for way in ways.values() for each in way):
        emit({"bench": "lossy otherwise", **about, **line, **made}, arguments.out)
    originals = {
        "digits": round(judge.digits(judge.x), 4),
        "texture": round(judge.texture(train.images[known[: len(chosen)]]), 4),
    }
    emit({"bench": "lossy originals", **about, **originals, **made}, arguments.out)
    if arguments.plot:
        plot(lines, {name: [line for line, _ in way] for name, way in ways.items()}, originals, arguments.plot)
        for way in ways.values():
            line, made_of = min(way, key=lambda each: abs(each[0]["bytes"] - SHOWN[0]))
            pictures.append((f"For comparison, {line['bytes']:.1f} bytes an image: {line['method']}", [made_of]))
        shown = [
            captioned(grid(torch.cat([row[columns].cpu().long() for row in rows]), 2, len(columns)), text)
            for text, rows in pictures
        ]
        save(np.concatenate(shown), arguments.plot.with_name(f"{arguments.plot.stem}_images.png"))


if __name__ == "__main__":
    main()
