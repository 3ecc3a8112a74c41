"""Bytes of images next to the bound, time to make and open them next to a forward pass, and files that are broken.

exact                 decompress(compress(x)) == x
bits_per_dim          of the whole file, header and initial bits too
nelbo_bits_per_dim    -ELBO of the same images by the mean of `CODES` codes of each, drawn afresh
overhead              (file - initial bits) / -ELBO - 1
initial_bits          what stood on the stack before the first image; part of the file
*_images_per_s        whole calls; *_forwards: that time for 64 images in forward passes of the whole model on 64
single_bits_per_dim   mean over `SINGLE` images, each a file of its own; with and without header
floats                float64 is --portable
sizes                 bytes of the same pixels in other formats

`--mutations N`: that many broken files of at most 70 images. All must be refused. Slowest in seconds; memory_ratio:
what the process took at most, next to what it took for good files, without what it took before.
"""

import argparse
import math
import random
import re
import time
import zlib
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from vlae.commands import opened
from vlae.compression import BATCH, compress, decompress
from vlae.container import MAGIC, START, CodecError, unpack
from vlae.model import VLAE
from vlae.noise import generator
from vlae.records import commit, emit, hardware
from vlae.sizes import sizes

CODES, SINGLE = 16, 20


@torch.no_grad()
def forward_seconds(model: VLAE, x: torch.Tensor) -> float:
    eps, taken = torch.randn(len(x), model.prior.code).to(next(model.parameters())), []
    for _ in range(9):
        begun = time.perf_counter()
        model(x, eps)
        taken.append(time.perf_counter() - begun)
    return median(taken[2:])


@torch.no_grad()
def bound(model: VLAE, x: torch.Tensor, seed: int) -> float:
    """-ELBO in bits of all images together."""
    nats = 0.0
    for start, part in enumerate(x.split(250)):
        for k in range(CODES):
            eps = torch.randn(len(part), model.prior.code, generator=generator("codec", seed, start, k))
            nats -= model(part, eps.to(next(model.parameters()))).elbo.double().sum().item() / CODES
    return nats / math.log(2)


def measure(model: VLAE, x: torch.Tensor, seed: int) -> dict[str, Any]:
    forward = forward_seconds(model, x[:BATCH])
    begun = time.perf_counter()
    file = compress(model, x)
    encoded = time.perf_counter()
    exact = torch.equal(decompress(model, file).long(), x)
    encode_s, decode_s = encoded - begun, time.perf_counter() - encoded
    again = forward_seconds(model, x[:BATCH])
    initial, nelbo = 32 * unpack(file)[0].initial, bound(model, x, seed)
    singles = [compress(model, image) for image in x[:SINGLE].split(1)]
    exact &= all(torch.equal(decompress(model, one).long(), x[i : i + 1]) for i, one in enumerate(singles))
    values = x[0].numel()
    single = 8 * mean(map(len, singles))
    return {
        "bench": "codec",
        "images": len(x),
        "exact": exact,
        "bytes": len(file),
        "bits_per_dim": round(8 * len(file) / x.numel(), 5),
        "nelbo_bits_per_dim": round(nelbo / x.numel(), 5),
        "overhead": round((8 * len(file) - initial) / nelbo - 1, 5),
        "initial_bits": initial,
        "encode_images_per_s": round(len(x) / encode_s, 1),
        "decode_images_per_s": round(len(x) / decode_s, 1),
        "encode_forwards": round(encode_s / len(x) * BATCH / mean([forward, again]), 2),
        "decode_forwards": round(decode_s / len(x) * BATCH / mean([forward, again]), 2),
        "single_bits_per_dim": round(single / values, 4),
        "single_payload_bits_per_dim": round((single - 8 * START) / values, 4),
        "floats": unpack(file)[0].floats,
        "sizes": sizes(x.to(torch.uint8), model.likelihood.levels),
        "seed": seed,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": hardware(torch.device("cpu")),
        "commit": commit(),
    }


def broken(good: list[bytes], rng: random.Random) -> bytes:
    """Cut, flipped, spliced, overwritten, with another header, or nothing but noise; every other with its checksum."""
    one, other = rng.sample(good, 2)
    at, to = sorted(rng.randrange(len(one)) for _ in range(2))
    field = rng.randrange(8, START)
    data = rng.choice(
        [
            one[:at],
            one[:at] + bytes([one[at] ^ 1 << rng.randrange(8)]) + one[at + 1 :],
            one[:at] + other[rng.randrange(len(other)) :],
            one[:at] + rng.randbytes(to - at) + one[to:],
            one[:field] + rng.randbytes(rng.choice([1, 4])) + one[field:][4:],
            MAGIC + rng.randbytes(rng.randrange(2 * len(one))),
        ]
    )
    return MAGIC + zlib.crc32(data[8:]).to_bytes(4, "little") + data[8:] if rng.random() < 0.5 else data


def peak(reset: bool = False) -> int:
    """kB that the process held at most, since the last reset; Linux."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0])


def mutate(model: VLAE, x: torch.Tensor, count: int, seed: int) -> dict[str, Any]:
    rng, before = random.Random(seed), peak(reset=True)
    good = [compress(model, x[:70]), compress(model, x[70:100]), compress(model, x[:1]), compress(model, x[:70], 2)]
    for data in good:
        decompress(model, data)
    honest, refused, slowest = peak(), 0, 0.0
    for _ in range(count):
        data = broken(good, rng)
        while data in good:
            data = broken(good, rng)
        begun = time.perf_counter()
        try:
            decompress(model, data)
        except CodecError:
            refused += 1
        slowest = max(slowest, time.perf_counter() - begun)
    return {
        "bench": "codec mutations",
        "mutations": count,
        "refused": refused,
        "slowest_s": round(slowest, 2),
        "memory_ratio": round((peak() - before) / (honest - before), 2),
        "seed": seed,
        "device": hardware(torch.device("cpu")),
        "commit": commit(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", default="mnist_static", help="a run's folder, or shipped weights by name")
    parser.add_argument("--images", type=int, default=1000, help="of the test split, drawn by the seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of the forward pass; the codec has its own")
    parser.add_argument("--mutations", type=int, default=0, help="broken files instead of good ones")
    parser.add_argument("--portable", action="store_true", help="in float64")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, find, _ = opened(arguments.run)
    data = find()
    model = model.to("cpu", torch.float64 if arguments.portable else torch.float32)
    images = data.part("test").images
    x = images[torch.randperm(len(images), generator=generator("codec", arguments.seed))[: arguments.images]].long()
    about = {"data": data.dataset_name, "shape": list(data.shape), "levels": data.levels}
    if arguments.mutations:
        emit(about | mutate(model, x, arguments.mutations, arguments.seed), arguments.out)
    else:
        emit(about | measure(model, x, arguments.seed), arguments.out)


if __name__ == "__main__":
    main()
