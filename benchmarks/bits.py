"""Where each bit of a compressed file goes: pixels, code, bits got back, initial bits, header; with a picture.

Bits an image, of the file that `vlae.compress` makes, which is compared byte by byte.

pixels, code        -log2 p(x | z), and of the code on its grid under the prior
got_back            what drawing the codes took off the stack: -log2 q(z | x) on the grid
rate                code - got_back
initial, header     what stood on the stack before the first image; what the file says of itself
file                pixels + rate + initial + header
nelbo               -ELBO by the mean of `CODES` codes of each, drawn afresh
sizes               bytes of the same pixels in other formats
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch

import vlae
from vlae.codec import Codec
from vlae.compression import BATCH, FINE, alike, compress, layout, seed
from vlae.container import START, unpack
from vlae.data import images_for
from vlae.figures import where_bits_go
from vlae.model import VLAE
from vlae.noise import generator
from vlae.records import commit, emit, hardware
from vlae.sizes import sizes

CODES = 16


def steps(model: VLAE, batches: tuple[torch.Tensor, ...], payload: bytes) -> np.ndarray:
    """Bits that codes drawn, pixels and codes put on the stack, a row a batch; AssertionError if another file comes."""
    codec = Codec(model, 2.0**FINE)
    stack, gains = codec.stack(seed(BATCH * (1 + model.prior.code) + sum(map(len, batches)))), []
    with alike():
        for part in batches:
            bits = [stack.num_valid_bits()]
            k = codec.draw(stack, part)
            bits.append(stack.num_valid_bits())
            codec.push_pixels(stack, k, part)
            bits.append(stack.num_valid_bits())
            codec.push_code(stack, k)
            bits.append(stack.num_valid_bits())
            gains.append(np.diff(bits))
    assert stack.get_compressed().astype("<u4").tobytes().endswith(payload)
    return np.array(gains, dtype=np.float64)


@torch.no_grad()
def bounds(model: VLAE, batches: tuple[torch.Tensor, ...], key: int) -> np.ndarray:
    """-ELBO of each batch in bits."""
    noise = generator("bits", key)
    nats = [
        sum(
            model(part, torch.randn(len(part), model.prior.code, generator=noise)).elbo.double().sum().item()
            for _ in range(CODES)
        )
        for part in batches
    ]
    return -np.array(nats) / CODES / math.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="mnist_static", help="shipped weights by name, or a file")
    parser.add_argument("--data", default="mnist_static", help="a data set of vlae.datasets")
    parser.add_argument("--images", type=int, default=1000, help="of the test split, drawn by the seed; more than 64")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a file to append the line to")
    parser.add_argument("--plot", type=Path, help="such as results/compression.png")
    arguments = parser.parse_args()
    if arguments.images <= BATCH:
        parser.error(f"--images {arguments.images}: must be more than {BATCH}, or no bits need come back")
    section = {"_target_": f"vlae.datasets.{arguments.data}", "root": None, "batch_size": 1, "eval_batch_size": 1}
    images = images_for(section, 0, ("vlae.",)).part("test").images
    x = images[torch.randperm(len(images), generator=generator("codec", arguments.seed))[: arguments.images]].long()
    model = vlae.load(arguments.weights)
    file = compress(model, x)
    about, payload = unpack(file)
    small, full = layout(len(x))
    counts = [*small, *[BATCH] * full]
    batches = x.split(counts)
    gains, nelbo = steps(model, batches, payload), bounds(model, batches, arguments.seed)
    files = {"vlae": len(file), **sizes(x.to(torch.uint8), model.likelihood.levels)}
    back, pixels, code = gains.sum(0)
    found = {"pixels": pixels, "code": code, "got_back": -back, "rate": code + back, "initial": 32 * about.initial}
    found |= {"header": 8 * START, "file": 8 * len(file), "nelbo": nelbo.sum()}
    line = {"bench": "bits", "data": arguments.data, "weights": arguments.weights, "images": len(x)}
    line |= {name: round(value / len(x), 3) for name, value in found.items()}
    line |= {"sizes": files, "seed": arguments.seed, "torch": torch.__version__}
    emit(line | {"device": hardware(torch.device("cpu")), "commit": commit()}, arguments.out)
    if arguments.plot:
        where_bits_go(counts, gains, nelbo, 32 * about.initial, files, arguments.plot)


if __name__ == "__main__":
    main()
