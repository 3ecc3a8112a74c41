"""What a data set costs: seconds to read, memory held, batches a second against training steps.

`loader_images_per_s` is how fast batches come, binarised where the set is dynamic; `step_images_per_s` a training step
in a bare loop of the set's model, which takes its own batches; `loader_share` the part of a step's time that its batch
takes. The two take turns. One JSON line a set.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from training import Loop, settings

from vlae import datasets
from vlae.data import Images
from vlae.records import commit, emit, hardware

MODELS = {"digits": "small", "mnist_grey": "grey", "cifar10": "grey"}  # the others are binary
SETS = ["digits", "mnist_static", "mnist", "mnist_grey", "omniglot", "omniglot_original", "caltech101", "cifar10"]


def rate(work: Callable[[], object], seconds: float, device: torch.device) -> float:
    """Calls a second."""
    begun, calls = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        work()
        calls += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    return calls / (time.perf_counter() - begun)


def measure(name: str, arguments: argparse.Namespace) -> dict[str, object]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = MODELS.get(name, "binary")
    config = settings(model, [f"data={name}", f"data.batch_size={arguments.batch}", "trainer.precision=bf16-mixed"])
    images = Images(getattr(datasets, name), None, arguments.batch, arguments.batch, config["seed"])
    begun = time.perf_counter()
    parts = images.splits[:3]
    load_s = time.perf_counter() - begun
    loop = Loop(config, images, device)
    images.setup()
    assert images.train is not None
    batches, number = images.train, 0

    def batch() -> Tensor:
        nonlocal number
        taken = batches[number]
        number += 1
        return images.on_after_batch_transfer(taken._replace(x=taken.x.to(device, non_blocking=True))).x

    turns = [
        (rate(batch, arguments.seconds, device), rate(lambda: loop.learn(batch()), arguments.seconds, device))
        for _ in range(arguments.turns + 1)  # the first warms up
    ][1:]
    loader, step = (arguments.batch * median(turn) for turn in zip(*turns, strict=True))
    return {
        "bench": "data",
        "data": name,
        "model": model,
        "device": hardware(device),
        "threads": torch.get_num_threads(),
        "precision": "bf16-mixed",
        "batch": arguments.batch,
        "images": [len(part.images) for part in parts],
        "load_s": round(load_s, 2),
        "memory_mb": round(sum(t.nbytes for part in parts for t in part if t is not None) / 1e6, 1),
        "loader_images_per_s": round(loader, 1),
        "step_images_per_s": round(step, 1),
        "loader_share": round(step / loader, 5),
        "commit": commit(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=[name for name in SETS if name != "omniglot"], choices=SETS)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a turn")
    parser.add_argument("--turns", type=int, default=3, help="of each, besides one to warm up")
    parser.add_argument("--out", type=Path, help="a file to append the lines to")
    arguments = parser.parse_args()
    for name in arguments.sets:
        emit(measure(name, arguments), arguments.out)


if __name__ == "__main__":
    main()
