"""What an importance-weighted log-likelihood costs, of the shipped weights on images of static MNIST's test split.

`cost_over_decoder_passes`: everything (encoder, noise, sums, progress bar) over bare passes of prior, features, decoder
and likelihood of as many rows at a time, K rows an image. The two take turns, so that a change in what else the
machine does meets both; figures are medians over the turns. `plain_images_per_s` is the obvious way: an image and a
sample at a time, the encoder run again for each. One JSON line for each K.

A turn is a part of the split, `images` drawn at random, and of the plain way `plain_samples` samples of one image;
`plain_images_per_s` is scaled to K samples from them and `test_split_s`, for all 10,000 images, from the part.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from vlae.data import Images
from vlae.datasets import mnist_static
from vlae.evaluation import BLOCK, CHUNK, estimates
from vlae.model import VLAE, load
from vlae.noise import generator
from vlae.records import commit, emit, hardware


def timed(function: Callable[[], object], device: torch.device) -> float:
    begun = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


@torch.no_grad()
def passes(model: VLAE, x: Tensor, z: Tensor, number: int) -> None:
    u = model.unit(x)
    for _ in range(number):
        model.prior(z)
        model.likelihood.log_prob(model.decoder(u, model.decoder.features(z)), x.expand(len(z), -1, -1, -1))


@torch.no_grad()
def plain(model: VLAE, x: Tensor, samples: int) -> float:
    elbos = [model(x, torch.randn(1, model.prior.code, device=x.device)).elbo.item() for _ in range(samples)]
    return torch.tensor(elbos).logsumexp(0).item() - math.log(samples)


def measure(model: VLAE, x: Tensor, samples: int, chunk: int, arguments: argparse.Namespace) -> dict[str, object]:
    device = next(model.parameters()).device
    x = x[: max(1, arguments.rows // samples)]
    rows = x.repeat(-(-chunk // len(x)), 1, 1, 1)[:chunk].to(device)
    if chunk // min(samples, BLOCK) < 2:
        rows = rows[:1]  # as `estimates` does, whose passes are of one image then
    z = torch.randn(chunk, model.prior.code, generator=generator("z")).to(device)
    number = -(-len(x) * samples // chunk)
    times = []  # of all images: ours, bare passes, the plain way
    for _ in range(arguments.turns + 1):
        ours = timed(lambda: estimates(model, x, ("benchmark",), samples, chunk), device)
        bare = timed(lambda: passes(model, rows, z, number), device) * len(x) * samples / (number * chunk)
        alone = timed(lambda: plain(model, rows[:1], arguments.plain), device) * len(x) * samples / arguments.plain
        times.append((ours, bare, alone))
    times = times[1:]  # the first turn warms up
    ours, _, alone = (median(column) for column in zip(*times, strict=True))
    return {
        "bench": "evaluation",
        "device": hardware(device),
        "weights": "mnist_static",
        "data": "mnist_static",
        "split": "test",
        "samples": samples,
        "chunk": chunk,
        "images": len(x),
        "cost_over_decoder_passes": round(median(ours / bare for ours, bare, _ in times), 4),
        "images_per_s": float(f"{len(x) / ours:.4g}"),
        "plain_images_per_s": float(f"{len(x) / alone:.4g}"),
        "plain_samples": arguments.plain,
        "speedup_over_plain": round(alone / ours, 2),
        "test_split_s": round(10_000 * ours / len(x)),
        "commit": commit(),
    }


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[128, 4096])
    parser.add_argument("--chunks", type=int, nargs="+", default=[CHUNK[device.type]], help="rows at a time")
    parser.add_argument("--rows", type=int, default=4096 if device.type == "cpu" else 2**20, help="of a turn, about")
    parser.add_argument("--turns", type=int, default=5, help="of each, besides one to warm up")
    parser.add_argument("--plain", type=int, default=256, help="samples that the plain way is timed on")
    parser.add_argument("--out", type=Path, help="a file to append the lines to")
    arguments = parser.parse_args()
    model = load("mnist_static").to(device)
    x = Images(mnist_static, root=None, batch_size=1, eval_batch_size=1, seed=0).part("test").images
    x = x[torch.randperm(len(x), generator=generator("part"))]
    for samples in arguments.samples:
        for chunk in arguments.chunks:
            emit(measure(model, x, samples, chunk, arguments), arguments.out)


if __name__ == "__main__":
    main()
