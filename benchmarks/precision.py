"""NELBO in nats of one model trained in each precision, with the same seed, data and noise.

Trains as `python train.py model=small` with the overrides would, by default on digits. 16-mixed needs a GPU, as on a
processor Lightning takes bfloat16 for it. One JSON line a precision; `off` is relative to 32-true.
"""

import argparse
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from training import settings

from vlae.experiment import run
from vlae.records import commit, emit, hardware


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="for example data=mnist_static")
    parser.add_argument("--model", default="small", help="a file of conf/model")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, help="a file to append the lines to")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    exact: dict[str, float] = {}
    for precision in ["32-true", "bf16-mixed", *(["16-mixed"] if device.type == "cuda" else [])]:
        limits = [f"trainer.max_steps={arguments.steps}", "trainer.max_epochs=-1", f"trainer.precision={precision}"]
        config = settings(arguments.model, [*arguments.overrides, *limits, "wandb.mode=disabled"])
        begun = time.time()
        with TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
            metrics = run(config, Path(folder) / "run", "")
        nelbo = {split: metrics[f"{split}/nelbo"] for split in ("val", "test")}
        exact = exact or nelbo
        measurement = {
            "bench": "precision",
            "model": arguments.model,
            "overrides": arguments.overrides,
            "precision": precision,
            "steps": arguments.steps,
            **{f"{split}_nelbo": round(value, 4) for split, value in nelbo.items()},
            **{f"{split}_off": round(value / exact[split] - 1, 6) for split, value in nelbo.items()},
            "seconds": round(time.time() - begun),
            "device": hardware(device),
            "commit": commit(),
        }
        emit(measurement, arguments.out)


if __name__ == "__main__":
    main()
