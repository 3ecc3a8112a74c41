"""What a window leaves to the code: colour models that differ in their window alone, as figures 3 and 4 of VLAE.

RUN... are folders of runs or checkpoints; one JSON line each, all in float32:

rate, distortion, nelbo, bits_per_dim   of the whole test split, a code an image from the noise that testing a run uses
part           of `--images` test images drawn by the seed: negative log-likelihood by importance sampling (`nll...`),
               and the bound (`bits_per_dim`, of as many codes) to hold it against
kept           of the same images, what a reconstruction (a code of the image, fresh pixels) has in common with it when
               both are shrunk to 8x8 by area means, as finer things are the window's to model: root-mean-square error
               in levels of 0..255 and correlation, of luminance Y, of chroma (R - Y and B - Y) and of roughness (how
               much Y differs from the pixels to the left and above, before it is shrunk)
kept_by_chance the same with the reconstruction of another image: what is alike anyway

Into the folder `--pictures`: cifar10_reconstructions.png, cifar10_samples.png, cifar10_windows.png. All models share
the noise.
"""

import argparse
import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlae.charts import HUES, RULE
from vlae.commands import opened
from vlae.decoder import LUMINANCE
from vlae.evaluation import CHUNK, estimates
from vlae.figures import captioned, grid, save
from vlae.model import VLAE
from vlae.noise import generator
from vlae.records import commit, emit, flat, hardware
from vlae.report import STYLE
from vlae.sampling import reconstruct, sample

BATCH, SIDE, COLUMNS = 100, 8, 12
WINDOW = {"decoder.receptive_field", "decoder.grey"}


def name(model: VLAE) -> str:
    return model.description["model"]["decoder"]["receptive_field"] + (" grey" if model.decoder.grey else "")


def kept(x: Tensor, again: Tensor) -> dict[str, dict[str, float]]:
    """How alike images [N 3 H W] and their reconstructions are at SIDE x SIDE, in luminance, chroma and roughness."""
    rgb = torch.stack([x, again]).double()  # [2 N 3 H W]
    y = (torch.tensor(LUMINANCE).double().view(3, 1, 1) * rgb).sum(2, keepdim=True)
    rough = F.pad(y.diff(dim=3).abs(), (0, 0, 1, 0)) + F.pad(y.diff(dim=4).abs(), (1, 0))
    found = {}
    for part, pixels in {"luminance": y, "chroma": rgb[:, :, [0, 2]] - y, "roughness": rough}.items():
        values = F.adaptive_avg_pool2d(pixels.flatten(0, 1), SIDE).unflatten(0, (2, -1)).movedim(2, 0).flatten(2)
        error = (values[:, 0] - values[:, 1]).square().mean().sqrt()
        a, b = (values - values.mean(2, keepdim=True)).unbind(1)
        correlation = (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()
        found[part] = {"rms_error": round(error.item(), 2), "correlation": round(correlation.item(), 4)}
    return found


@torch.no_grad()
def measure(
    model: VLAE, test: Tensor, chosen: Tensor, run_seed: int, samples: int, seed: int
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """The figures of a line, reconstructions of the images `chosen`, samples."""
    device, code, bits = next(model.parameters()).device, model.prior.code, 1 / (math.log(2) * test[0].numel())

    def noise(kind: str, number: int) -> tuple[Tensor, Tensor]:
        stream = generator("windows", seed, kind)
        eps = torch.randn(number, code, generator=stream)
        return eps, torch.rand(number, *test.shape[1:], generator=stream)

    eps = torch.randn(len(test), code, generator=generator("eps", run_seed, "test"))  # as `LitVLAE` draws it
    parts = zip(test.split(BATCH), eps.split(BATCH), strict=True)
    terms = [model(x.to(device), eps.to(device)) for x, eps in parts]
    rate = torch.cat([each.rate for each in terms]).double().mean().item()
    distortion = torch.cat([each.distortion for each in terms]).double().mean().item()
    x = test[chosen]
    parts = zip(*(each.to(device).split(BATCH) for each in (x, *noise("reconstructions", len(x)))), strict=True)
    again = torch.cat([reconstruct(model, *part).cpu() for part in parts])
    drawn = sample(model, *(each.to(device) for each in noise("samples", 32))).cpu()
    found = estimates(model, x, ("windows", seed), samples, CHUNK[device.type])
    part = {
        "images": len(x),
        "samples": samples,
        "bits_per_dim": round((found.rate + found.distortion).mean().item() * bits, 4),
        "nll_bits_per_dim": round(-found.log_px.mean().item() * bits, 4),
        "nll_standard_error": round(found.log_px.std().item() * bits / len(x) ** 0.5, 4),
        "ess": round(found.ess.mean().item(), 2),
    }
    nats = {"rate": rate, "distortion": distortion, "nelbo": rate + distortion}
    figures: dict[str, Any] = {key: round(value, 3) for key, value in nats.items()}
    figures |= {"bits_per_dim": round((rate + distortion) * bits, 4), "part": part}
    return figures | {"kept": kept(x, again), "kept_by_chance": kept(x, again.roll(1, 0))}, again, drawn


def plot(lines: list[dict[str, Any]], dims: int, path: Path) -> None:
    """Rate, distortion, bits/dim and what the code kept against the window; hollow where it shows luminance alone."""
    import matplotlib
    from matplotlib.figure import Figure

    panels: dict[str, tuple[int, dict[str, list[float]]]] = {
        "Rate (nats an image)": (1, {"": [line["rate"] for line in lines]}),
        "Distortion (nats an image)": (1, {"": [line["distortion"] for line in lines]}),
        "Bits/dim, bound": (3, {"": [line["nelbo"] / (dims * math.log(2)) for line in lines]}),  # not rounded twice
        f"Kept at {SIDE}x{SIDE}: correlation": (
            2,
            {part: [line["kept"][part]["correlation"] for line in lines] for part in lines[0]["kept"]},
        ),
    }
    ticks = [f"{line['window']}\n{line['visible_pixels']} pixels" for line in lines]
    with matplotlib.rc_context(STYLE | {"axes.titlesize": 10}):
        figure = Figure(figsize=(4 + 2.4 * len(lines), 3.4), layout="constrained")
        for axes, (title, (digits, curves)) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            for (label, values), color in zip(curves.items(), (HUES[0], HUES[4], HUES[2]), strict=False):
                for k, (value, line) in enumerate(zip(values, lines, strict=True)):
                    face = "white" if line["grey"] else color
                    beside = sorted(each[k] for each in curves.values())
                    place = (0, 8) if value == beside[-1] else (0, -17) if value == beside[0] else (24, -4)
                    axes.plot(k, value, "o", color=color, mfc=face, ms=8, zorder=3, label=None if k else label)
                    axes.annotate(f"{value:,.{digits}f}", (k, value), place, textcoords="offset points", ha="center")
            axes.set(title=title, xlim=(-0.5, len(lines) - 0.5))
            axes.set_xticks(range(len(lines)), ticks)
            axes.margins(y=0.25)
            if min(map(min, curves.values())) >= 0:
                axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
            axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.set_ylim(min(-0.15, axes.get_ylim()[0]), 1.15)
        axes.legend()
        figure.supxlabel("Window and how many earlier pixels it shows; hollow: their luminance alone", fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--samples", type=int, default=64, help="codes an image of the importance-sampled likelihood")
    parser.add_argument("--images", type=int, default=500, help="of the test split, drawn by the seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=Path, default=Path("results"), help="a folder")
    arguments = parser.parse_args()
    made = {"commit": commit(), "seed": arguments.seed, "command": shlex.join(["python", *sys.argv])}

    trained_on = ((model, images(), folder) for model, images, folder in map(opened, arguments.runs))
    found = sorted(trained_on, key=lambda each: (len(each[0].decoder.window), name(each[0])))
    images, first = found[0][1:]
    settings = [flat(model.description["model"]) for model, _, _ in found]
    files = [folder / "metrics.json" for _, _, folder in found]
    trained = [json.loads(file.read_text()) if file.exists() else {} for file in files]
    seen = [each.get("images_seen") for each in trained]
    if len({*seen}) > 1:
        parser.error(f"images seen: {', '.join(map(str, seen))}; as many are needed to compare windows")
    if images.shape[0] != 3:
        parser.error(f"{first}: not a run on images of three channels")
    for (_, own, folder), mine in zip(found, settings, strict=True):
        if other := {key for key in {*mine, *settings[0]} if mine.get(key) != settings[0].get(key)} - WINDOW:
            parser.error(f"{folder}: differs from {first} in {', '.join(sorted(other))}, not in its window alone")
        if (own.dataset_name, own.train_on_validation) != (images.dataset_name, images.train_on_validation):
            parser.error(f"{folder}: trained on other images than {first}")
    test = images.part("test").images
    chosen = torch.randperm(len(test), generator=generator("windows", arguments.seed))[: arguments.images]
    x, lines, blocks = test[chosen], [], []
    text = "Test images; below, for each model, pixels drawn anew from the code of the image. What is alike the "
    text += "code kept; the rest was made up by the decoder from its window of earlier pixels"
    rows = [captioned(grid(x[:COLUMNS], images.levels, COLUMNS), text)]
    for (model, own, _), cost in zip(found, trained, strict=True):
        figures, again, drawn = measure(model, test, chosen, own.seed, arguments.samples, arguments.seed)
        line = {
            "bench": "windows",
            "data": images.dataset_name,
            "window": name(model),
            "grey": model.decoder.grey,
            "visible_pixels": len(model.decoder.window),
            "epochs": seen[0] and round(seen[0] / len(images.splits.train.images), 2),
            "images_seen": seen[0],
            "training_s": cost.get("wall_s"),
            "parameters": sum(each.numel() for each in model.parameters()),
            "test_images": len(test),
            **figures,
            "device": hardware(next(model.parameters()).device),
            **made,
        }
        emit(line, None)
        lines.append(line)
        shown = f"Window {line['window']}, {line['visible_pixels']} pixels"
        rows.append(
            captioned(grid(again[:COLUMNS], images.levels, COLUMNS), f"{shown}: {line['rate']:.0f} nats a code")
        )
        blocks.append(captioned(grid(drawn, images.levels, 8), f"{shown}: {line['bits_per_dim']:.2f} bits/dim"))
    blocks += [np.full_like(blocks[0], 255)] * (len(blocks) % 2)
    blocks = [np.hstack(pair) for pair in zip(blocks[::2], blocks[1::2], strict=True)]
    text = "Samples of each model: codes from the prior, pixels drawn from the decoder; the same noise for all"
    save(np.vstack(rows), arguments.pictures / "cifar10_reconstructions.png")
    save(captioned(np.vstack(blocks), text), arguments.pictures / "cifar10_samples.png")
    plot(lines, math.prod(images.shape), arguments.pictures / "cifar10_windows.png")


if __name__ == "__main__":
    main()
