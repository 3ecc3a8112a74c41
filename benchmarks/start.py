"""Seconds from `python train.py` to its first step on digits, and to the end of `--help` and `--cfg job`.

Each time in a fresh process, with everything that a real run has; the medians, as one JSON line.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from vlae.records import commit, emit, hardware

TRAIN = [sys.executable, str(Path(__file__).resolve().parents[1] / "train.py")]


def first_step(*overrides: str) -> float:
    """Seconds until the first step is logged."""
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        line = [*TRAIN, f"folder={folder}", "trainer.log_every_n_steps=1", *overrides]
        begun = time.perf_counter()
        going = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not log.exists() or not log.stat().st_size:
            if going.poll() is not None:
                raise RuntimeError(f"{' '.join(line)} ended with {going.returncode} before its first step")
            time.sleep(0.005)
        seconds = time.perf_counter() - begun
        going.kill()
        going.wait()
    return seconds


def whole(*arguments: str) -> float:
    """Seconds until the process ends."""
    begun = time.perf_counter()
    subprocess.run([*TRAIN, *arguments], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="of each, besides one to warm up")
    parser.add_argument("--out", type=Path, help="a file to append the line to")
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {}
    for _ in range(arguments.runs + 1):
        for name, one in {
            "first_step_s": first_step(),
            "first_step_without_wandb_s": first_step("wandb.mode=disabled"),
            "help_s": whole("--help"),
            "cfg_s": whole("--cfg", "job"),
        }.items():
            seconds.setdefault(name, []).append(one)
    measurement: dict[str, object] = {
        "bench": "start",
        "runs": arguments.runs,
        **{name: round(median(every[1:]), 2) for name, every in seconds.items()},
        "device": hardware(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "commit": commit(),
    }
    emit(measurement, arguments.out)


if __name__ == "__main__":
    main()
