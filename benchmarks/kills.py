"""How many trainings that are killed at a random moment end, after the same command, as one that was not killed.

Each is `train.py` on the digits with a tiny model, in a child of a process that has imported the libraries already;
SIGKILL comes from outside, at a moment drawn evenly from the length of an uninterrupted training. Then the command
runs again, to the end. Equal to the bit: weights, averaged weights, optimiser, learning rate, metrics, the log. One
JSON line; `phases` counts by what the kill left on the disk.
"""

import argparse
import json
import os
import random
import runpy
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import vlae.experiment  # noqa: F401 (before the children, who would wait for it)
from vlae.records import commit, emit, hardware

with suppress(ImportError):
    import matplotlib.figure  # noqa: F401 (likewise)

STEPS = 24
COMMAND = [
    *["trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "wandb.mode=disabled", "objective.kind=soft"],
    *[
        "model.code=3",
        "model.encoder.widths=[4]",
        "model.encoder.hidden=8",
        "model.prior.depth=1",
        "model.prior.width=8",
    ],
    *["model.decoder.features=4", "model.decoder.width=4", "model.decoder.depth=1", "model.decoder.widths=[4]"],
    *["model.decoder.hidden=8", "model.likelihood.components=2", "data.batch_size=250", "trainer.log_every_n_steps=1"],
    *["trainer.max_epochs=-1", f"trainer.max_steps={STEPS}", "trainer.check_val_every_n_epoch=1"],
    "model.decoder.receptive_field=none",  # or pictures would take most of the time
]
PARTS = ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "global_step", "metrics")


def start(folder: Path) -> int:
    """`train.py` in a child, which writes what it says into a file beside the folder; its id."""
    if child := os.fork():
        return child
    said = os.open(folder.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.argv = [str(Path(__file__).resolve().parents[1] / "train.py"), *COMMAND, f"folder={folder}"]
    code = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def end(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def result(folder: Path) -> list[Any]:
    """All that a training ends with."""
    checkpoints = (torch.load(folder / "checkpoints" / name, weights_only=True) for name in ("last.ckpt", "best.ckpt"))
    metrics = json.loads((folder / "metrics.json").read_text()) | {"wall_s": 0}
    states = [{part: checkpoint[part] for part in PARTS} for checkpoint in checkpoints]
    return [states, metrics, (folder / "log.jsonl").read_text()]


def phase(folder: Path) -> str:
    if list(folder.rglob("*.ckpt.part")):
        return "writing a checkpoint"
    last = folder / "checkpoints" / "last.ckpt"
    if not last.exists():
        return "before the first checkpoint"
    done = torch.load(last, weights_only=True)["global_step"] == STEPS
    return "testing" if done else "training"


def kill(number: int, root: Path, seed: int, seconds: float) -> tuple[str, bool]:
    """Where a training was killed, and whether it ended as the uninterrupted one."""
    chance, tries = random.Random(f"{seed} {number}"), 0
    while True:
        folder, tries = root / f"{number}_{tries}", tries + 1
        child = start(folder)
        time.sleep(seconds * chance.random())
        os.kill(child, signal.SIGKILL)
        if end(child) == -signal.SIGKILL and not (folder / "metrics.json").exists():
            break  # else it was faster, and another moment is drawn
    found = phase(folder)
    return found, end(start(folder)) == 0 and same(result(folder), result(root / "whole"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--at-once", type=int, default=2, help="trainings at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a file to append the line to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.perf_counter()
    with TemporaryDirectory() as name:
        root = Path(name)
        if end(start(root / "whole")) != 0:
            sys.exit((root / "whole.txt").read_text())
        with get_context("fork").Pool(arguments.at_once) as pool:
            # all at a time, as when they are killed: how long one takes then
            starts = time.perf_counter()
            pool.map(plain, [root / f"timed_{n}" for n in range(arguments.at_once)], chunksize=1)
            seconds = time.perf_counter() - starts
            one = partial(kill, root=root, seed=arguments.seed, seconds=seconds)
            killed = pool.map(one, range(arguments.kills), chunksize=1)
    measurement = {
        "bench": "kills",
        "kills": len(killed),
        "identical": sum(equal for _, equal in killed),
        "phases": dict(Counter(found for found, _ in killed)),
        "seed": arguments.seed,
        "seconds_of_a_training": round(seconds, 2),
        "wall_s": round(time.perf_counter() - begun),
        "device": hardware(torch.device("cpu")),
        "commit": commit(),
    }
    emit(measurement, arguments.out)


def plain(folder: Path) -> int:
    return end(start(folder))


if __name__ == "__main__":
    main()
