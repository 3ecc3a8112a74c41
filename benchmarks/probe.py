"""What the code keeps: how many test images' classes a linear classifier tells from codes, and from pixels.

Codes are posterior means of runs given as folders; the classifier learns from a seeded part of the training split and
is scored on the whole test split. One JSON line a run.
"""

import argparse
import json
from pathlib import Path

import torch

from vlae.codes import encode, linear_probe
from vlae.commands import opened
from vlae.noise import generator
from vlae.records import commit, emit, hardware


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--train", type=int, default=10_000, help="training images of the classifier")
    parser.add_argument("--out", type=Path, help="a file to append the lines to")
    arguments = parser.parse_args()
    for run in arguments.runs:
        model, find, folder = opened(run)
        images = find()
        train, test = images.part("train"), images.part("test")
        chosen = torch.randperm(len(train.images), generator=generator("probe", images.seed))[: arguments.train]
        x, y = train.images[chosen], train.labels[chosen]  # type: ignore[index]
        codes = [encode(model, part, torch.zeros(1, len(part), model.prior.code)).mean for part in (x, test.images)]
        pixels = [model.unit(part).flatten(1) for part in (x, test.images)]
        of = {
            name: linear_probe(learnt.numpy(), y.numpy(), seen.numpy(), test.labels.numpy())  # type: ignore[union-attr]
            for name, (learnt, seen) in (("codes", codes), ("pixels", pixels))
        }
        metrics = json.loads((folder / "metrics.json").read_text())
        emit(
            {
                "bench": "probe",
                "data": images.dataset_name,
                "device": hardware(torch.device("cpu")),
                "receptive_field": model.description["model"]["decoder"]["receptive_field"],
                "rate": round(metrics["test/rate"], 3),
                "nelbo": round(metrics["test/nelbo"], 3),
                "train_images": len(x),
                "test_images": len(test.images),
                "accuracy_of_codes": round(of["codes"], 4),
                "accuracy_of_pixels": round(of["pixels"], 4),
                "images_seen": metrics["images_seen"],
                "seed": images.seed,
                "commit": commit(),
            },
            arguments.out,
        )


if __name__ == "__main__":
    main()
