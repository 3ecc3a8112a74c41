"""Sweeps: each job of `python train.py -m` in an interpreter of its own, and a table of all at the end."""

import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from glob import glob
from hashlib import blake2b
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vlae.records import flat, write
from vlae.sweeps import jobs, points, short, varied

UNNAMED = (
    "trainer.max_",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.enable_",
    "wandb.",
    "record",
    "folder",
)
FIGURES = {"val/nelbo": "NELBO", "val/rate": "rate", "val/distortion": "distortion", "test/nelbo": "test"}
EXTERNAL = ("SLURM_PROCID", "TORCHELASTIC_RUN_ID")  # somebody else starts the ranks
RANKS = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def named(overrides: Iterable[str]) -> str:
    """A folder's name from what was asked for."""
    name = ",".join(sorted(text.lstrip("+~") for text in overrides)).replace("/", "%")
    if len(name) > 120:
        name = f"{name[:110]}~{blake2b(name.encode(), digest_size=4).hexdigest()}"
    return name or "default"


def lasting(overrides: Iterable[str], data: str) -> list[str]:
    """Overrides that name a run of the set `data`: without those that may change when it goes on."""
    return [text for text in overrides if text != f"data={data}" and not text.lstrip("+~").startswith(UNNAMED)]


def unresolved(overrides: Any) -> list[str]:
    """A list of the config as it was written: with `${...}` in it."""
    texts = OmegaConf.to_container(overrides, resolve=False)
    assert isinstance(texts, list)
    return [str(text) for text in texts]


def quoted(text: object) -> str:
    """A value as Hydra's command line takes it, whatever characters it holds."""
    return QuotedString(str(text), Quote.single).with_quotes()


def plan(config: DictConfig) -> tuple[Path, list[str]]:
    """The folder of a sweep, and the names of the settings that its jobs share.

    The folder is named by these settings and by the names of those that vary, so that more values find what is done.

    Raises:
        ValueError: for what would not be one sweep.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise ValueError("-m under torchrun: every rank would run the whole sweep; start it by python train.py -m ...")
    own = OmegaConf.to_container(config.hydra.sweeper, resolve=False)
    given = own.get("params") or {} if isinstance(own, dict) else {}
    asked = [*(f"{key}={value}" for key, value in given.items()), *unresolved(config.hydra.overrides.task)]
    parsed = OverridesParser.create().parse_overrides(asked)
    overrides = {each.get_key_element(): each for each in parsed}.values()  # the last, where one is said twice
    fixed = [each for each in overrides if not each.is_sweep_override()]
    varied = [each.get_key_element() for each in overrides if each.is_sweep_override()]
    if any(each.key_or_group == "record" and "$" not in str(each.input_line) for each in fixed):
        raise ValueError("record: all jobs of the sweep would write the same one; let it differ, as record=a_${seed}")
    data = "several" if {"data", "experiment"} & set(varied) else config.hydra.runtime.choices.data
    common = lasting((str(each.input_line) for each in fixed), data)
    folder = Path(config.folder or Path("runs") / data / named([*common, *varied]))
    return folder, [each.key_or_group for each in fixed]


class Sweep(Callback):
    """Hydra's hook: gives a sweep its folder before the first job, and ends it with tables after the last."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        self.begun = time.time()
        logging.getLogger("hydra").setLevel(logging.WARNING)  # says each job's overrides again
        try:
            folder, shared = plan(config)
        except Exception as error:  # of which Hydra would only warn
            sys.exit(f"{type(error).__name__}: {error}")
        with open_dict(config):
            config.hydra.sweep.dir = str(folder)
            # from these the settings of each job are composed, wherever it runs
            excluded = ",".join(map(quoted, shared))
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir={quoted(folder)}")
            config.hydra.overrides.hydra.append(f"hydra.job.config.override_dirname.exclude_keys=[{excluded}]")

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        try:
            show_jobs(folder)
            settings = OmegaConf.to_container(config.wandb)
            assert isinstance(settings, dict)
            publish(folder, {str(key): value for key, value in settings.items()})
        except Exception as error:
            sys.exit(f"{type(error).__name__}: {error}")
        if any(path.stat().st_mtime >= self.begun for path in folder.glob("*/failed.json")):
            sys.exit(1)


def publish(folder: Path, settings: dict[str, Any]) -> None:
    """The report of a sweep, on disk and, as the settings of the section `wandb` say, in W&B."""
    from vlae.report import report
    from vlae.workspace import log_report

    try:
        page, figures = report(folder)
    except ValueError as error:
        print(f"{folder}: {error}")
        return
    runs = jobs(folder)
    names = varied(runs)
    table = [{name: run.settings.get(name) for name in names} | {"state": run.state} | run.metrics for run in runs]
    log_report(settings, folder, page, figures, table)
    print(f"{page}, and {len(figures)} figures in {folder / 'report'}")


def show_jobs(folder: Path) -> None:
    """The closing tables of a sweep: all jobs, and if there are several seeds their means, best on validation first."""
    runs = sorted(jobs(folder), key=lambda run: run.metrics.get("val/nelbo", math.inf))
    means, names, console = points(runs), short(varied(runs)), Console()

    def table(title: str, names: Iterable[str]) -> Table:
        return Table(*names, *FIGURES.values(), "", title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))

    shown = table("jobs, best on validation first; nats", names.values())
    for run in runs:
        figures = (f"{run.metrics[name]:.3f}" if name in run.metrics else "-" for name in FIGURES)
        shown.add_row(*(str(run.settings.get(name)) for name in names), *figures, run.state)
    console.print(shown)
    if any(len(point.runs) > 1 for point in means):
        shown = table("means over seeds ± standard deviation", (names[name] for name in means[0].settings))
        for point in means:
            done = sum(run.state == "done" for run in point.runs)
            settings = (str(value) for value in point.settings.values())
            shown.add_row(*settings, *(point.text(name) for name in FIGURES), f"{done} of {len(point.runs)}")
        console.print(shown)
    for run in runs:
        if run.state == "failed":
            console.print(f"{run.folder.name} failed: {run.reason}", soft_wrap=True, highlight=False)


@contextmanager
def gpus(count: int) -> Iterator[dict[str, str]]:
    """Waits for `count` GPUs of this machine that no other job of ours holds; the environment that shows no others.

    Shows all where there are fewer than that.
    """
    all_of_them = ",".join(str(k) for k in range(len(glob("/dev/nvidia[0-9]*"))))
    ids = [*filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", all_of_them).split(","))]
    with ExitStack() as held:
        free: list[str] = []
        while len(free) < count <= len(ids):
            free, attempt = [], held.enter_context(ExitStack())
            for each in ids:
                lock = FileLock(Path(tempfile.gettempdir()) / f"vlae-{os.getuid()}-gpu-{each.replace('/', '-')}.lock")
                try:
                    attempt.enter_context(lock.acquire(blocking=False))
                    free.append(each)
                except Timeout:
                    continue
                if len(free) == count:
                    break
            else:
                attempt.close()  # or two jobs could wait for each other's
                time.sleep(1)
        yield {"CUDA_VISIBLE_DEVICES": ",".join(free)} if free else {}


def reason(output: str, code: int) -> str:
    """One line that says why a process ended with `code`."""
    number = -code if code < 0 else code - 128
    if number in (each.value for each in signal.Signals):
        name = signal.Signals(number).name
        return f"stopped by {name}; the same command goes on" if code > 0 else f"killed by {name}"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return [f"exit code {code}", *lines[-1:], *errors[-1:]][-1]


def wait(child: subprocess.Popen[bytes]) -> int:
    """Passes on to a process the signals that this one gets; the last of them, 0 if there was none."""
    passed = [0]

    def forward(number: int, _: FrameType | None) -> None:
        passed.append(number)
        child.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return passed[-1]


def score(metrics: dict[str, float]) -> float:
    """What a sweep minimises: the NELBO on validation, or without validation on test."""
    return metrics.get("val/nelbo", metrics["test/nelbo"])


def fail(folder: Path, config: dict[str, Any], text: str) -> float:
    """Notes why a job failed; what such a job scores."""
    write(folder / "failed.json", {"reason": text, "settings": flat(config)})
    print(f"{folder.name}: failed: {text}", flush=True)
    return math.inf


def start(script: str, config: dict[str, Any], overrides: list[str], folder: Path) -> float:
    """Runs one job as a process, so that its ranks, memory and crashes are its own; its terminal is output.log.

    Returns its score, infinite if it failed.
    """
    if (folder / "metrics.json").exists() and json.loads((folder / "config.json").read_text()) == config:
        print(f"{folder.name}: finished before", flush=True)
        return score(json.loads((folder / "metrics.json").read_text()))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "failed.json").unlink(missing_ok=True)
    mine = [f"folder={quoted(folder)}", f"wandb.group={quoted(config['wandb']['group'])}"]
    mine += ["trainer.enable_progress_bar=false", "hydra.mode=RUN"]
    environment = {key: value for key, value in os.environ.items() if key not in RANKS}
    devices = config["trainer"]["devices"]
    count = devices if isinstance(devices, int) and config["trainer"]["accelerator"] != "cpu" else 0
    with gpus(count) as shown, (folder / "output.log").open("a+", errors="replace") as output:
        print(f"{folder.name}: started, {output.name}", flush=True)
        begun, where = time.time(), output.seek(0, os.SEEK_END)
        line = [sys.executable, script, *overrides, *mine]
        # a group of its own: Ctrl-C comes once, from here
        child = subprocess.Popen(
            line, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment | shown, process_group=0
        )
        stopped = wait(child)
        output.seek(where)
        text = output.read()
    if stopped:
        sys.exit(128 + stopped)
    if child.returncode:
        return fail(folder, config, reason(text, child.returncode))
    print(f"{folder.name}: done in {time.time() - begun:.0f} s", flush=True)
    return score(json.loads((folder / "metrics.json").read_text()))
