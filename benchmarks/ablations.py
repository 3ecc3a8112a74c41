"""What the NELBO of a binary set hinges on: one setting of an experiment, mnist_static, changed at a time.

Every run sees as many images, on one thread each, `--jobs` at a time beside one another. One JSON line each, of the
validation split: settings changed, NELBO, rate and distortion in nats (one-sample bounds), the bound and the
importance-sampled NLL of the same 500 images with 64 samples each, epochs, precision, parameters, images seen, seconds
of training, hardware and commit. Training is compiled, which needs a C++ compiler. Runs lie in runs/ablations, where an
interrupted one goes on. A change of which `--out` has a line is left alone; lines of another experiment, seed, length,
precision or commit are refused, as what differs in a table must be the change alone.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vlae.launch import named
from vlae.records import commit, emit

ROOT = Path(__file__).resolve().parents[1]
DECODER, PRIOR = "model.decoder", "model.prior"
CHANGES = [
    "",
    *(f"{DECODER}.receptive_field={window}" for window in ("4x2", "7x4", "15x8")),
    *(f"{DECODER}.width={width}" for width in (16, 64)),
    *(f"{DECODER}.depth={depth}" for depth in (2, 8)),
    *(f"{DECODER}.features={features}" for features in (8, 64)),
    f"{DECODER}.widths=[64,128,128] {DECODER}.hidden=256",
    "model=binary_large",
    *(f"{PRIOR}.depth={depth}" for depth in (0, 2, 8)),
    *(f"{PRIOR}.width={width}" for width in (160, 640)),
    f"{PRIOR}.scale=true",
    *(f"averaging={decay}" for decay in (0, 0.99)),
    *(f"objective.free_bits={nats}" for nats in (0, 7.84, 16)),
    "data.batch_size=32",  # 128 would not see as many images
    *(f"optimizer.schedule={schedule}" for schedule in ("constant", "linear")),
    *(f"optimizer.lr={lr}" for lr in (0.005, 0.02)),
    "optimizer.weight_decay=0",
    "optimizer.name=adamax optimizer.lr=0.002 optimizer.weight_decay=0 trainer.gradient_clip_val=5.0",
]


def run(change: str, experiment: str, seed: int, epochs: int, precision: str, commit: str) -> dict[str, Any]:
    """Trains one variant; its figures."""
    overrides = [f"experiment={experiment}", *change.split()]
    about = [f"seed={seed}", f"epochs={epochs}", precision, commit[:7] + commit[40:]]
    folder = Path("runs") / "ablations" / named([*overrides, *about])
    own = [f"seed={seed}", f"trainer.max_epochs={epochs}", "trainer.check_val_every_n_epoch=1", f"folder='{folder}'"]
    own += [f"trainer.precision={precision}"]
    quiet = ["compile=true", "wandb.mode=disabled", "trainer.enable_progress_bar=false"]
    score = ["-m", "vlae", "evaluate", str(folder), "--split", "validation", "--samples", "64", "--images", "500"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for command in ["train.py", *overrides, *own, *quiet], score:
        subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    trained, scored = (json.loads((ROOT / folder / f"{name}.json").read_text()) for name in ("metrics", "evaluate"))
    if scored["commit"] != commit:
        sys.exit(f"{folder}: the code has become {scored['commit']} meanwhile, not {commit}")
    figures = {name: round(trained[f"val/{name}"], 3) for name in ("nelbo", "rate", "distortion")}
    part = {f"{name}_of_500": round(scored["metrics"][f"val/{name}"], 3) for name in ("nelbo", "nll")}
    cost = {name: trained[name] for name in ("parameters", "images_seen", "wall_s")}
    return {**figures, **part, **cost, "hardware": scored["hardware"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", nargs="*", default=CHANGES, help="overrides of one run each, in quotes")
    parser.add_argument("--experiment", default="mnist_static", help="of conf/experiment, of 28x28 binary images")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="bf16-mixed", help="of training; 32-true can be faster without AMX")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, help="a file to append the lines to")
    arguments = parser.parse_args()
    there = arguments.out is not None and arguments.out.exists()
    lines = [json.loads(line) for line in (arguments.out.read_text().splitlines() if there else ())]
    settings = {name: getattr(arguments, name) for name in ("experiment", "seed", "epochs", "precision")}
    settings["commit"] = commit()
    for name, value in settings.items():
        if others := {line[name] for line in lines} - {value}:
            sys.exit(f"{arguments.out}: lines of {name} {', '.join(map(str, others))}, not {value}; name another file")
    done = {line["change"] for line in lines}
    changes = [change for change in arguments.changes if change not in done]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for change, figures in zip(changes, pool.map(lambda change: run(change, **settings), changes), strict=True):
            emit({"bench": "ablations", "change": change, **settings, **figures}, arguments.out)


if __name__ == "__main__":
    main()
