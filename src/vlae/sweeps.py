"""A sweep: a folder of runs, one for each point, read back from what they left on disk."""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vlae.records import RESUMABLE, flat


class Job(NamedTuple):
    """One run of a sweep; `settings` are flat, `metrics` those of metrics.json and empty unless the run is done."""

    folder: Path
    settings: dict[str, Any]
    state: Literal["done", "failed", "unfinished"]
    reason: str
    metrics: dict[str, float]


def job(folder: Path) -> Job:
    """What a run left in its folder: config.json, metrics.json if it finished, failed.json if it did not start or end."""
    found = {
        name: json.loads(path.read_text()) if path.exists() else {}
        for name in ("config", "metrics", "failed")
        for path in [folder / f"{name}.json"]
    }
    settings = flat(found["config"]) or found["failed"].get("settings", {})
    state: Literal["done", "failed", "unfinished"]
    state = "done" if found["metrics"] else "failed" if found["failed"] else "unfinished"
    return Job(folder, settings, state, found["failed"].get("reason", ""), found["metrics"])


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
    """Names of the settings in which the runs differ, less those that may change when a run goes on."""
    names = sorted({name for run in runs for name in run.settings if name.split(".")[0] not in RESUMABLE})
    return [name for name in names if len({json.dumps(run.settings.get(name)) for run in runs if run.settings}) > 1]
