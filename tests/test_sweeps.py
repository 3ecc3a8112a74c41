"""Sweeps: a folder and a process a job, what is done is done, what fails is told and ends nothing else."""

import math
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from small import DIGITS, ROOT, config

from vlae.launch import fail, gpus, lasting, named, plan, quoted, reason, start
from vlae.records import write
from vlae.sweeps import job, jobs, points, short, varied


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def line(*overrides: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), "-m", *DIGITS, *overrides]


def sweep(*overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(line(*overrides), capture_output=True, text=True, stdin=subprocess.DEVNULL)


def planned(*overrides: str) -> tuple[Path, list[str]]:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        plain = [text for text in overrides if "," not in text and "(" not in text]
        config = compose("config", plain, return_hydra_config=True)
    config.hydra.overrides.task = list(overrides)
    return plan(config)


@pytest.mark.parametrize(
    ("overrides", "folder"),
    [
        (["model.prior.depth=0,2", "seed=0,1"], "runs/digits/model.prior.depth,seed"),
        (["seed=range(0,2)", "model.code=4", "trainer.max_steps=9"], "runs/digits/model.code=4,seed"),
        (["optimizer.lr=interval(0.1,1)", "data=mnist"], "runs/mnist/optimizer.lr"),
        (["trainer.max_epochs=1,2"], "runs/digits/trainer.max_epochs"),
        (["data=mnist,omniglot", "seed=1"], "runs/several/data,seed=1"),
        (["experiment=mnist_static,mnist"], "runs/several/experiment"),
        (["seed=0,1", "folder=mine"], "mine"),
        ([], "runs/digits/default"),
        (
            ["experiment=digits_sweep", "seed=0", "model.code=4,8"],
            "runs/digits/experiment=digits_sweep,model.code,model.decoder.receptive_field,model.prior.depth,seed=0",
        ),
    ],
)
def test_a_sweep_s_folder_is_named_by_what_its_jobs_share(overrides: list[str], folder: str) -> None:
    assert planned(*overrides)[0] == Path(folder)


def test_ranks_do_not_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(ValueError, match="-m under torchrun"):
        planned("seed=0,1")


@pytest.mark.parametrize("text", ["a=b,c~d", "it's", "back\\slash", "x'y\\", "[1]{2} $3"])
def test_any_name_can_be_an_override(text: str) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        assert compose("config", [f"wandb.group={quoted(text)}"]).wandb.group == text


def run_files(folder: Path, seed: int, depth: int, nelbo: float | None, failed: str = "") -> None:
    settings = {"seed": seed, "model": {"prior": {"depth": depth}}, "wandb": {"mode": "offline" if seed else "online"}}
    write(folder / "config.json", settings)
    if nelbo is not None:
        write(folder / "metrics.json", {"val/nelbo": nelbo, "test/nelbo": nelbo + 1})
    if failed:
        fail(folder, settings, failed)


@pytest.mark.parametrize("section", ["wandb=disabled", "trainer=cpu"])
def test_a_section_is_no_value(section: str, here: Path) -> None:
    done = sweep(section, "seed=0,1")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert f"ValueError: {section}: a section, of which single keys are set" in done.stderr


def test_points_are_means_over_seeds(tmp_path: Path) -> None:
    values = {0: [3.0, 5.5, 4.25], 2: [1.0, 2.5, None], 4: [None, None, None]}
    for depth, each in values.items():
        for seed, nelbo in enumerate(each):
            run_files(tmp_path / f"depth={depth},seed={seed}", seed, depth, nelbo, "" if nelbo else "ValueError: no")
    run_files(tmp_path / "again" / "depth=2,seed=0", 0, 2, 1.0)  # a run in two folders counts once
    run_files(tmp_path / "again" / "depth=2,seed=1", 1, 2, 2.5, "ValueError: refused")
    write(tmp_path / "cut" / "config.json", {})
    (tmp_path / "cut" / "config.json").write_text("[")
    runs = jobs(tmp_path)
    assert [run.reason[:20] for run in runs if run.folder.name == "cut"] == ["its files cannot be "]
    assert {run.state: run.metrics for run in runs if "again" in run.folder.parts and run.state == "failed"} == {
        "failed": {}
    }
    runs = [run for run in runs if run.folder.name != "cut" and run.folder.parent == tmp_path] + [
        run for run in runs if run.folder.parent != tmp_path
    ]
    assert varied(runs) == ["model.prior.depth", "seed"]
    assert short(varied(runs)) == {"model.prior.depth": "depth", "seed": "seed"}
    assert [run.state for run in runs if run.folder.parent == tmp_path] == ["done"] * 5 + ["failed"] * 4
    assert {run.reason for run in runs} == {"", "ValueError: no", "ValueError: refused"}
    found = points(runs)
    assert [len(point.runs) for point in found] == [3, 3, 3]
    assert [point.settings for point in found] == [
        {"model.prior.depth": depth} for depth in (0, 2, 4)
    ]  # of 2 a seed is missing
    for point in found:
        done = [value for value in values[point.settings["model.prior.depth"]] if value is not None]
        assert len(point.runs) == 3
        if done:
            assert point.means["val/nelbo"] == pytest.approx(statistics.fmean(done))
            assert point.spreads["test/nelbo"] == pytest.approx(statistics.stdev(done))
        else:
            assert not point.means
    assert [point.text("val/nelbo") for point in found] == ["4.25±1.25", "1.75±1.06", "-"]


def test_what_a_folder_without_runs_says(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no runs in this folder"):
        jobs(tmp_path)


def test_names_of_equal_ends_stay_whole() -> None:
    names = ["model.decoder.depth", "model.prior.depth", "seed"]
    assert short(names) == {names[0]: names[0], names[1]: names[1], "seed": "seed"}


@pytest.mark.parametrize(
    ("code", "output", "text"),
    [
        (1, "a\nValueError: lr=-1\n\n", "ValueError: lr=-1"),
        (1, "torch.OutOfMemoryError: 3 GiB\nwandb: bye", "torch.OutOfMemoryError: 3 GiB"),
        (1, "something else", "something else"),
        (3, "", "exit code 3"),
        (143, "x", "stopped by SIGTERM; the same command goes on"),
        (-9, "x", "killed by SIGKILL"),
    ],
)
def test_a_reason_is_one_line(code: int, output: str, text: str) -> None:
    assert reason(output, code) == text


def test_jobs_wait_for_a_gpu_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-x")
    stop = tmp_path / "stop"
    with gpus(2, stop) as both, gpus(0, stop) as none:
        assert (both, none) == ({"CUDA_VISIBLE_DEVICES": "3,GPU-x"}, {})
    with gpus(-1, stop) as shown:
        assert shown == both
    got: list[str] = []
    tried = threading.Event()
    monkeypatch.setattr("vlae.launch.time.sleep", lambda seconds: tried.set())

    def third() -> None:
        with gpus(2, stop) as shown:
            got.append(shown["CUDA_VISIBLE_DEVICES"])

    with gpus(1, stop) as one:
        with gpus(1, stop) as two:
            assert {one["CUDA_VISIBLE_DEVICES"], two["CUDA_VISIBLE_DEVICES"]} == {"3", "GPU-x"}
        waiting = threading.Thread(target=third)
        waiting.start()
        tried.wait()  # it has looked, and found only one of the two
        assert not got
    waiting.join()
    assert got == ["3,GPU-x"]
    with gpus(5, stop) as shown:  # there are not so many: all of them
        assert shown == {}
    stop.touch()
    with gpus(1, stop) as one, gpus(2, stop) as shown:  # nobody waits any more
        assert one == shown == {}


def test_a_job_that_could_not_be_started_again_is_done_still(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, folder = config(*DIGITS), tmp_path / "job"
    write(folder / "config.json", settings)
    write(folder / "metrics.json", {"val/nelbo": 3.0})
    assert fail(folder, settings, "another training is running there") == math.inf
    assert start([], settings, folder) == 3.0
    assert "finished before" in capsys.readouterr().out
    assert job(folder).state == "done"


def test_long_names_fit_a_file_system() -> None:
    name = named([f"data.folder={'写' * 110}", "seed=1"])
    assert len(name.encode()) <= 120
    assert name != named([f"data.folder={'写' * 111}", "seed=1"])


def test_a_sweep_from_outside(here: Path) -> None:
    """Jobs are stopped at a step, are no success, and go on and end by the same command, whatever launches them; what
    is done is done, and what fails is told and ends nothing else."""
    settings = ["trainer.max_epochs=100000", "trainer.check_val_every_n_epoch=10", "optimizer.schedule=constant"]
    folder = here / "runs" / "digits" / named([*lasting([*DIGITS, *settings], "digits"), "seed"])
    names, joblib = ["seed=3", "seed=4"], ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    logs: dict[Path, str] = {}
    for launcher, stop, begun in (([], signal.SIGTERM, names[:1]), (joblib, signal.SIGINT, names)):
        last = [folder / name / "checkpoints" / "last.ckpt" for name in begun]
        before = {path: path.stat().st_mtime_ns for path in last if path.exists()}
        going = subprocess.Popen(
            line(*settings, "seed=3,4", *launcher), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        while going.poll() is None:
            if all(path.exists() and path.stat().st_mtime_ns != before.get(path) for path in last):
                break
            time.sleep(0.1)
        going.send_signal(stop)
        output, _ = going.communicate()
        assert going.returncode == 128 + stop, output
        assert {run.folder.name: run.state for run in jobs(folder)} == dict.fromkeys(begun, "unfinished")
        assert output.count("; the same command goes on") == len(begun)
        logs = {path.parents[1] / "log.jsonl": "" for path in last} | logs
        for path, rows in logs.items():  # it went on, and did not begin again
            assert path.read_text().startswith(rows)
            logs[path] = path.read_text()
    most = max(torch.load(path, weights_only=True)["global_step"] for path in last)
    steps = (most // 50 + 1) * 50  # to the next validation

    asked = [*settings, f"trainer.max_steps={steps}", "seed=3,x,4"]
    first = sweep(*asked)
    assert first.returncode == 1
    assert not first.stderr
    runs = jobs(folder)
    assert {run.folder.name: run.state for run in runs} == {"seed=3": "done", "seed=4": "done", "seed=x": "failed"}
    assert all(path.read_text().startswith(rows) for path, rows in logs.items())
    for run in runs:
        assert (run.folder / "metrics.json").exists() == (run.state == "done")
        assert ("seed='x': expected int" in run.reason) == (run.state == "failed")
        found = re.findall(rf"^{re.escape(run.folder.name)} failed: (.*)$", first.stdout, re.MULTILINE)
        assert found == ([run.reason] if run.state == "failed" else [])
        if run.state == "done":
            assert run.metrics["steps"] == steps
            assert f"{run.metrics['val/nelbo']:.3f}" in first.stdout
    (refused,) = (folder / "seed=x" / "output.log").read_text().splitlines()  # one line, no traceback
    assert refused == job(folder / "seed=x").reason
    assert points(runs)[0].text("val/nelbo") in first.stdout
    assert "2 of 3" in first.stdout
    assert (folder / "report.html").exists()

    finished = {run.folder: (run.folder / "metrics.json").stat().st_mtime_ns for run in runs if run.state == "done"}
    again = sweep(*asked, *joblib)
    assert again.returncode == 1
    assert again.stdout.count("finished before") == 2
    assert finished == {path: (path / "metrics.json").stat().st_mtime_ns for path in finished}
    assert {path.name for path in here.iterdir()} == {"runs"}
