"""A sweep: a folder of runs, one for each point, read back from what they left on disk."""

import json
import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal, NamedTuple

from vlae.records import flat


class Job(NamedTuple):
    """One run of a sweep; `settings` are flat, `metrics` those of metrics.json and empty unless the run is done."""

    folder: Path
    settings: dict[str, Any]
    state: Literal["done", "failed", "unfinished"]
    reason: str
    metrics: dict[str, float]


def job(folder: Path) -> Job:
    """What a run left in its folder: config.json, metrics.json when it finished, failed.json when it could not."""
    paths = {name: folder / f"{name}.json" for name in ("config", "metrics", "failed")}
    try:
        found = {name: dict(json.loads(path.read_text())) if path.exists() else {} for name, path in paths.items()}
    except (ValueError, TypeError) as error:
        return Job(folder, {}, "failed", f"its files cannot be read: {error}", {})
    settings = found["failed"].get("settings") or flat(found["config"])
    if found["failed"]:  # before metrics, which may be those of other settings
        return Job(folder, settings, "failed", found["failed"].get("reason", ""), {})
    return Job(folder, settings, "done" if found["metrics"] else "unfinished", "", found["metrics"])


def jobs(folder: Path) -> list[Job]:
    """Every run at or below `folder`, by name.

    Raises:
        FileNotFoundError: if there is none.
    """
    folders = {path.parent for name in ("config", "failed") for path in folder.rglob(f"{name}.json")}
    if not folders:
        raise FileNotFoundError(f"{folder}: no runs in this folder; it should hold the folders of a sweep's jobs")
    return [job(each) for each in sorted(folders)]


def varied(runs: list[Job]) -> list[str]:
    """Names of the settings in which the runs differ; where they log to is none."""
    names = sorted({name for run in runs for name in run.settings if not name.startswith(("wandb.", "record"))})
    return [name for name in names if len({json.dumps(run.settings.get(name)) for run in runs if run.settings}) > 1]


def short(names: list[str]) -> dict[str, str]:
    """Names without their sections where that leaves them different."""
    last = [name.rpartition(".")[2] for name in names]
    return {name: end if last.count(end) == 1 else name for name, end in zip(names, last, strict=True)}


class Point(NamedTuple):
    """Runs that differ in their seed alone; means and sample standard deviations of those that are done."""

    settings: dict[str, Any]
    runs: list[Job]
    means: dict[str, float]
    spreads: dict[str, float]

    @property
    def done(self) -> int:
        return sum(run.state == "done" for run in self.runs)

    def text(self, name: str) -> str:
        if name not in self.means:
            return "-"
        return f"{self.means[name]:.2f}" + (f"±{self.spreads[name]:.2f}" if name in self.spreads else "")


def points(runs: list[Job]) -> list[Point]:
    """Runs by what varies besides the seed, the lowest NELBO on validation first, those with fewer seeds done last."""
    names = [name for name in varied(runs) if name != "seed"]
    groups: dict[str, dict[Any, Job]] = {}
    for run in sorted(runs, key=lambda run: run.state == "done"):  # of one run in two folders that which is done counts
        if run.settings:
            group = groups.setdefault(json.dumps([run.settings.get(name) for name in names]), {})
            group[run.settings.get("seed")] = run
    found = []
    for group in groups.values():
        members = list(group.values())
        done = [run.metrics for run in members if run.state == "done"]
        shared = [name for name in (done or [{}])[0] if all(name in metrics for metrics in done)]
        values = {name: [metrics[name] for metrics in done] for name in shared}
        means = {name: mean(each) for name, each in values.items()}
        spreads = {name: stdev(each) for name, each in values.items() if len(each) > 1}
        found.append(Point({name: members[0].settings.get(name) for name in names}, members, means, spreads))
    most = max((point.done for point in found), default=0)
    return sorted(found, key=lambda point: (point.done < most, point.means.get("val/nelbo", math.inf)))
