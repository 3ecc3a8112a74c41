"""What a run leaves in W&B, read back from its own log by its own reader and from what its client sends."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from small import DIGITS, ROOT, command, config
from stub_server import Stub, serving

from vlae.data import images_for
from vlae.experiment import run
from vlae.records import flat
from vlae.tracking import run_id
from vlae.workspace import DIALS, dashboard, log_report, workspace

wandb = pytest.importorskip("wandb", reason="wandb is not installed")
WANDB = str(Path(sys.executable).with_name("wandb"))
FEW = [*DIGITS, "trainer.check_val_every_n_epoch=1", "optimizer.schedule=constant"]  # steps an epoch: 5
CONTRACT = {"train/loss"} | {
    f"{split}/{name}" for split in ("train", "val", "test") for name in ("rate", "distortion", "nelbo", "bits_per_dim")
}


def alone(patch: pytest.MonkeyPatch, home: Path) -> None:
    """No account, and nothing of W&B outside `home`."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        patch.delenv(name)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "NETRC"):
        patch.setenv(name, str(home / name))
    wandb.teardown()  # it remembers the environment


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    alone(monkeypatch, tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An offline run of 10 steps that went on to 20."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        alone(patch, folder.parent / "home")
        patch.chdir(folder.parent)
        for steps in (10, 20):
            command(*FEW, "wandb.mode=offline", f"trainer.max_steps={steps}", f"folder={folder}")
    return folder


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    """An account at a service on this machine."""
    with serving() as stub:
        monkeypatch.setenv("WANDB_BASE_URL", stub.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        yield stub
        wandb.teardown()


def starts(folder: Path) -> list[Path]:
    """What each start of a run left, in order."""
    return sorted(folder.glob("wandb/*run-*-*"))


@cache
def log(start: Path) -> list[dict[str, Any]]:
    line = [WANDB, "leet", "inspect", "--json", *map(str, start.glob("*.wandb"))]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def records(start: Path, kind: str) -> list[dict[str, Any]]:
    """Of that kind in a start's log."""
    return [each[kind] for each in log(start) if each["type"] == kind]


def history(folder: Path) -> list[dict[str, Any]]:
    return [row["item"] for start in starts(folder) for row in records(start, "history")]


def merged(start: Path, kind: str) -> dict[str, Any]:
    """The settings or the summary after all updates."""
    return {key: value for each in records(start, kind) for key, value in each.get("update", {}).items()}


def wandb_command(*arguments: str) -> str:
    done = subprocess.run([WANDB, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_curves_are_those_of_the_runs_own_log(trained: Path) -> None:
    shown = {
        (row["trainer/global_step"], name): value
        for row in history(trained)
        for name, value in row.items()
        if name in CONTRACT
    }
    logged = {
        (row["step"], name): value
        for row in map(json.loads, (trained / "log.jsonl").read_text().splitlines())
        for name, value in row.items()
        if name != "step"
    }
    assert {name for _, name in shown} == CONTRACT
    # the log holds no test before the last, as the run went on after it
    assert shown == logged | {key: value for key, value in shown.items() if key[1].startswith("test/")}


def test_settings_are_flat_and_the_summary_is_that_of_the_best_weights(trained: Path) -> None:
    first, last = starts(trained)
    asked = config(*FEW, "wandb.mode=offline", "trainer.max_steps=20")
    found = {key: value for key, value in merged(last, "config").items() if not key.startswith("_wandb")}
    assert found == flat(asked) | {"levels": 17, "shape": [1, 8, 8]}
    summary = merged(last, "summary")
    for name, value in json.loads((trained / "metrics.json").read_text()).items():
        assert summary[name] == value
    assert merged(first, "summary")["steps"] == 10


def test_a_resumed_run_is_one_run(trained: Path) -> None:
    assert len(starts(trained)) == 2
    assert {records(start, "run")[0]["run_id"] for start in starts(trained)} == {run_id(trained)}
    steps = [row["_step"] for row in history(trained)]
    assert steps == sorted(steps)
    assert [records(start, "exit")[0].get("exit_code", 0) for start in starts(trained)] == [0, 0]


def test_pictures_and_noise(trained: Path) -> None:
    last = starts(trained)[-1]
    rows = [row["item"] for row in records(last, "history")]
    files = {key: last / "files" / value for row in rows for key, value in row.items() if key.endswith(".path")}
    pictures = {key: path for key, path in files.items() if path.suffix == ".png"}
    names = ("samples", "reconstructions", "interpolations", "completions", "bits", "window", "noise")
    assert {key.split(".")[0] for key in pictures} == {f"pictures/{name}" for name in names}
    for path in pictures.values():
        values = np.asarray(Image.open(path))
        assert values.dtype == np.uint8
        assert values.min() < 64
        assert values.max() > 192

    histograms = [row for row in rows if "codes/noise.values" in row]
    assert len(histograms) == 3  # of two validations and the test
    for row in histograms:
        counts, edges = np.array(row["codes/noise.values"]), np.array(row["codes/noise.bins"])
        assert len(edges) == len(counts) + 1
        assert counts.sum() == 250 * 3  # images x dimensions of the code
        middle = (edges[1:] + edges[:-1]) / 2
        assert 0.5 < math.sqrt((counts * middle**2).sum() / counts.sum()) < 2  # near N(0, 1)


def test_reconstructions_by_class(trained: Path) -> None:
    (artifact,) = [each for each in records(starts(trained)[-1], "artifact") if each["type"] == "run_table"]
    files = {each["path"]: Path(each["local_path"]) for each in artifact["manifest"]["contents"]}
    table = json.loads(files["reconstructions/by_class.table.json"].read_text())
    assert table["columns"] == ["class", "original", *(f"reconstruction {k}" for k in range(1, 5))]
    assert [row[0] for row in table["data"]] == list(range(10))
    test = images_for(config()["data"], 0, ("vlae.",)).splits.test
    assert test.labels is not None
    for label, *cells in table["data"]:
        enlarged = [np.asarray(Image.open(files[cell["path"]])) for cell in cells]
        assert len(enlarged) == 5
        pixels = np.stack([each[7:87:10, 7:87:10] for each in enlarged])  # 10 times, in a frame of 2
        grey = (test.images[test.labels == label, 0] * (255 / 16)).round()
        assert (grey == torch.tensor(pixels[0])).flatten(1).all(1).any()
        assert len(np.unique(pixels, axis=0)) == 5  # each is another draw


def test_the_best_weights_are_an_artifact_where_they_are(trained: Path) -> None:
    (artifact,) = [each for each in records(starts(trained)[-1], "artifact") if each["type"] == "model"]
    assert set(artifact["aliases"]) == {"latest", "best"}
    (content,) = artifact["manifest"]["contents"]
    assert Path(content["local_path"]) == trained / "checkpoints" / "best.ckpt"
    assert json.loads(artifact["metadata"]) == json.loads((trained / "metrics.json").read_text())
    assert not list(trained.parent.glob("home/WANDB_DATA_DIR"))  # no copies outside the run's folder
    assert {path.name for path in trained.parent.iterdir()} <= {"run", "home"}


def test_every_name_in_the_dashboard_is_in_a_run(trained: Path, here: Path) -> None:
    dashboard(None, "vlae", here / "dashboard.json")
    spec = json.loads((here / "dashboard.json").read_text())["spec"]["section"]
    panels = [panel for section in spec["panelBankConfig"]["sections"] for panel in section["panels"]]
    logged = {key.removesuffix("._type") for row in history(trained) for key in row}
    measured = {key for start in starts(trained) for each in records(start, "stats") for key in each["item"]}
    settings = merged(starts(trained)[-1], "config")
    shown = set()
    for panel in panels:
        chosen = panel["config"]
        shown |= {*chosen.get("metrics", []), *chosen.get("mediaKeys", []), chosen.get("xAxis")}
        shown |= {chosen.get("yAxis")}
        if "groupBy" in chosen:
            assert chosen["groupBy"].removesuffix(".value") in settings
    shown = {name.removeprefix("summary:") for name in shown if name}
    assert CONTRACT - {"test/bits_per_dim"} <= shown
    system = {name.removeprefix("system/") for name in shown if name.startswith("system/")}
    assert "proc.memory.rssMB" in system & measured  # the others take a longer run, or a GPU
    assert {name for name in shown if not name.startswith(("system/", "_runtime"))} <= logged
    assert {panel["config"]["groupBy"] for panel in panels if "groupBy" in panel["config"]} == {
        f"{key}.value" for key in DIALS.values()
    }


def test_a_dashboard_is_saved_to_an_account(service: Stub, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dashboard("me", "vlae", here / "dashboard.json")
    (view,) = service.views
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("me", "vlae", "VLAE")
    names = [each.name for each in workspace("me", "vlae").sections]
    assert [each["name"] for each in json.loads(view["spec"])["section"]["panelBankConfig"]["sections"]] == names
    assert f"dashboard.json: the workspace; {service.url}/me/vlae?nw=" in capsys.readouterr().out


def test_without_the_library_or_a_key_a_dashboard_says_so(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dashboard("me", "vlae", here / "dashboard.json")
    assert "dashboard.json: the workspace; not saved in W&B: " in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(ValueError, match="extra `dashboards`"):
        dashboard("me", "vlae", here / "other.json")
    assert not (here / "other.json").exists()


def test_a_broken_loss_raises_an_alert(here: Path) -> None:
    wild = ["optimizer.lr=1e20", "optimizer.warmup_steps=0", "trainer.gradient_clip_val=null"]
    with pytest.raises(FloatingPointError):
        run(config(*FEW, *wild, "wandb.mode=offline"), here / "run", "python train.py")
    (start,) = starts(here / "run")
    (alert,) = records(start, "alert")
    assert alert["title"] == "The loss is not finite"
    assert "try a lower optimizer.lr" in alert["text"]
    assert alert["level"] == "ERROR"
    assert records(start, "exit")[0]["exit_code"] == 1
    assert wandb.run is None


def test_online_without_a_key_is_refused(here: Path) -> None:
    with pytest.raises(SystemExit, match=r"ValueError: wandb.mode=online: No API key configured"):
        command(*FEW, "wandb.mode=online", "folder=run")
    assert not (here / "run").exists()


def test_an_online_run(service: Stub, here: Path) -> None:
    command(*FEW, "wandb.mode=online", "wandb.group=some", "trainer.max_steps=5", "folder=run")
    ((name, found),) = service.runs.items()
    assert name == run_id(here / "run")
    assert {key: found.started[key] for key in ("project", "groupName", "displayName", "jobType")} == {
        "project": "vlae",
        "groupName": "some",
        "displayName": "run",
        "jobType": "train",
    }
    assert found.exit_code == 0
    assert {key for row in found.history.values() for key in row} >= CONTRACT
    assert found.config["model.decoder.receptive_field"] == "3x2"
    for key, value in json.loads(Path("run/metrics.json").read_text()).items():
        assert found.summary[key] == value
    assert set(service.artifacts[f"model-{name}"]) == {"latest", "best"}
    assert service.files["best.ckpt"] == Path("run/checkpoints/best.ckpt").read_bytes()


def test_sync_uploads_what_was_offline_once(service: Stub, trained: Path) -> None:
    first, last = map(str, starts(trained))
    wandb_command("sync", first)
    assert "Skipped 1 synced run" in wandb_command("sync", first, last)
    ((name, found),) = service.runs.items()
    assert name == run_id(trained)
    sent = [found.history[place] for place in sorted(found.history)]
    assert list(found.history) == list(range(len(sent)))  # none in the place of another
    assert [row["_step"] for row in sent] == [row["_step"] for row in history(trained)]
    assert found.summary["steps"] == 20
    assert service.files["best.ckpt"] == (trained / "checkpoints" / "best.ckpt").read_bytes()


def test_a_sweep_by_agents(service: Stub, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = yaml.safe_load((ROOT / "wandb_sweep.yaml").read_text())
    sweep["program"] = str(ROOT / "train.py")
    mine = [text for text in FEW if not text.startswith(("wandb.", "model.prior.depth"))]
    sweep["command"][-1:-1] = [*mine, "trainer.max_steps=5"]
    (here / "sweep.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    wandb_command("sweep", "sweep.yaml")
    wandb_command("agent", "--count", "1", "me/vlae/grid")
    ((name, found),) = service.runs.items()
    assert found.started["sweep"] == "grid"
    depth, window = (found.config[key] for key in DIALS.values())
    (folder,) = Path("runs/wandb/grid").iterdir()
    assert folder.name == f"depth_{depth}_window_{window}"
    assert name == run_id(folder)
    assert found.summary["val/nelbo"] == json.loads((folder / "metrics.json").read_text())["val/nelbo"]


def test_a_report_is_one_run_however_often(here: Path) -> None:
    page, figures, folder = here / "report.html", [here / "curve.png", here / "map.png"], here / "sweep"
    page.write_text("<p>a page</p>")
    for path in figures:
        Image.fromarray(torch.arange(256, dtype=torch.uint8).view(16, 16).numpy()).save(path)
    table = [{"depth": 0, "val/nelbo": 1.5}, {"depth": 1, "state": "failed"}]
    settings = config("wandb.mode=offline")["wandb"]
    for _ in range(2):
        log_report(settings, folder, page, figures, table)
        assert wandb.run is None
    assert len(starts(folder)) == 2
    for start in starts(folder):
        (about,) = records(start, "run")
        assert (about["run_id"], about["display_name"]) == (run_id(folder), "report")
        assert (about["job_type"], about["run_group"]) == ("report", "sweep")
        (row,) = records(start, "history")
        item = row["item"]
        assert {key.split(".")[0] for key in item if "/" in key} >= {
            "report/curve",
            "report/map",
            "report/jobs",
            "report/page",
        }
        stored = json.loads((start / "files" / item["report/jobs.path"]).read_text())
        assert stored["columns"] == ["depth", "val/nelbo", "state"]
        assert stored["data"] == [[0, 1.5, None], [1, None, "failed"]]
        assert (start / "files" / item["report/page.path"]).read_text().count("a page") == 1
