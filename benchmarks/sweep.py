"""Keeps what a finished sweep found: a JSON line a job into OUT/jobs.jsonl, and the figures of its report beside it."""

import argparse
import shutil
from pathlib import Path

import torch

from vlae.records import commit, emit, hardware
from vlae.report import report
from vlae.sweeps import jobs, varied


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the sweep, in the checkout that ran it")
    parser.add_argument("--command", required=True, help="that ran it")
    parser.add_argument("--out", type=Path, required=True, help="a folder, as results/NAME")
    arguments = parser.parse_args()
    runs = jobs(arguments.folder)
    if unfinished := [run.folder.name for run in runs if run.state != "done"]:
        parser.error(f"not all jobs are done: {', '.join(unfinished)}")
    _, figures = report(arguments.folder)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for path in figures:
        shutil.copy(path, arguments.out)
    names, lines = varied(runs), arguments.out / "jobs.jsonl"
    lines.unlink(missing_ok=True)
    for run in runs:
        settings = {name: run.settings.get(name) for name in names}
        data = run.settings["data._target_"].rpartition(".")[2]
        about = {"bench": "sweep", "command": arguments.command, "commit": commit(), "data": data, "settings": settings}
        emit({**about, "device": hardware(torch.device("cpu")), "metrics": run.metrics}, lines)


if __name__ == "__main__":
    main()
