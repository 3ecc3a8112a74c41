"""Sweeps: each job of `python train.py -m` in an interpreter of its own, and a table of all at the end."""

import ctypes
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

from vlae.records import flat, same, write
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
STOP = "stop"  # in a sweep's folder: no more jobs
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
RANKS = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_")


def named(overrides: Iterable[str]) -> str:
    """A folder's name from what was asked for."""
    name = ",".join(sorted(text.lstrip("+~") for text in overrides)).replace("/", "%")
    if len(name.encode()) > 120:  # bytes are what a file system counts
        name = f"{name.encode()[:110].decode(errors='ignore')}~{blake2b(name.encode(), digest_size=4).hexdigest()}"
    return name or "default"


def lasting(overrides: Iterable[str], data: str) -> list[str]:
    """Overrides that name a run of the set `data`: without those that may change when it goes on."""
    return [text for text in overrides if text != f"data={data}" and not text.lstrip("+~").startswith(UNNAMED)]


def unresolved(overrides: Any) -> list[str]:
    """A list of the config as it was written: with `${...}` in it."""
    texts = OmegaConf.to_container(overrides, resolve=False)
    assert isinstance(texts, list)
    return [str(text) for text in texts]


def score(metrics: dict[str, float]) -> float:
    """What a sweep minimises: the NELBO on validation, never that on test."""
    return metrics.get("val/nelbo", math.inf)


def quoted(text: object) -> str:
    """A value as Hydra's command line takes it, whatever characters it holds."""
    return QuotedString(str(text), Quote.single).with_quotes()


def plan(config: DictConfig) -> tuple[Path, list[str]]:
    """The folder of a sweep, and the names of the settings that do not name its jobs.

    The folder is named by what all jobs share and by the names of what varies, so that more values find what is done;
    in a folder that the user names, jobs are named by all.

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
    data = "several" if {"data", "experiment"} & set(varied) else config.hydra.runtime.choices.data
    common = lasting((str(each.input_line) for each in fixed), data)
    keys = [each.key_or_group for each in fixed]
    if config.folder is not None:
        return Path(str(config.folder)), [key for key in keys if key.startswith(UNNAMED)]
    return Path("runs") / data / named([*common, *varied]), keys


class Sweep(Callback):
    """Hydra's hook: gives a sweep its folder before the first job, and ends it with tables and a report after the last.

    Told to stop by a signal, it lets the jobs save what they have, and begins no more.
    """

    stopped = 0

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        self.begun = time.time()
        logging.getLogger("hydra").setLevel(logging.WARNING)  # says each job's overrides again
        try:
            self.folder, unnamed = plan(config)
            (self.folder / STOP).unlink(missing_ok=True)
        except Exception as error:  # of which Hydra would only warn
            sys.exit(f"{type(error).__name__}: {error}")
        with open_dict(config):
            config.hydra.sweep.dir = str(self.folder)
            # from these the settings of each job are composed, wherever it runs
            excluded = ",".join(map(quoted, unnamed))
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir={quoted(self.folder)}")
            config.hydra.overrides.hydra.append(f"hydra.job.config.override_dirname.exclude_keys=[{excluded}]")
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.halt)

    def halt(self, number: int, _: FrameType | None) -> None:
        self.stopped = number
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / STOP).touch()  # also for jobs that other processes started
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C is not asked to wait

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        try:
            show_jobs(self.folder)
            settings = OmegaConf.to_container(config.wandb)
            assert isinstance(settings, dict)
            publish(self.folder, {str(key): value for key, value in settings.items()})
        except Exception as error:
            sys.exit(f"{type(error).__name__}: {error}")
        (self.folder / STOP).unlink(missing_ok=True)
        failed = (run.folder / "failed.json" for run in jobs(self.folder) if run.state == "failed")
        if self.stopped or any(path.exists() and path.stat().st_mtime >= self.begun for path in failed):
            sys.exit(128 + self.stopped if self.stopped else 1)


def publish(folder: Path, settings: dict[str, Any]) -> None:
    """The report of a sweep, on disk and, as the settings of the section `wandb` say, in W&B."""
    from vlae.report import report

    try:
        page, figures = report(folder)
    except ValueError as error:
        print(f"{folder}: {error}")
        return
    if settings["mode"] != "disabled":
        from vlae.workspace import log_report  # here, as Lightning comes with it

        runs = jobs(folder)
        names = varied(runs)
        table = [{name: run.settings.get(name) for name in names} | {"state": run.state} | run.metrics for run in runs]
        log_report(settings, folder, page, figures, table)
    print(f"{page}, and {len(figures)} figures in {folder / 'report'}")


def show_jobs(folder: Path) -> None:
    """The closing tables of a sweep: all jobs, and if there are several seeds their means, best on validation first."""
    runs = sorted(jobs(folder), key=lambda run: run.metrics.get("val/nelbo", math.inf))
    means, names, console = points(runs), short(varied(runs)), Console(markup=False, emoji=False)

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
            settings = (str(value) for value in point.settings.values())
            shown.add_row(*settings, *(point.text(name) for name in FIGURES), f"{point.done} of {len(point.runs)}")
        console.print(shown)
    for run in runs:
        if run.state == "failed":
            console.print(f"{run.folder.name} failed: {run.reason}", soft_wrap=True, highlight=False)


@contextmanager
def gpus(count: int, stop: Path) -> Iterator[dict[str, str]]:
    """Waits for `count` GPUs (-1: all) of this machine that no other job of ours holds, or for the file `stop`; the
    environment that shows no others.

    Shows all where there are fewer than that.
    """
    all_of_them = ",".join(str(k) for k in range(len(glob("/dev/nvidia[0-9]*"))))
    ids = [*filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", all_of_them).split(","))]
    with ExitStack() as held:
        free: list[str] = []
        count = len(ids) if count == -1 else count
        while len(free) < count <= len(ids) and not stop.exists():
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
    lines = [line.strip() for line in output.splitlines() if line.strip() and "HYDRA_FULL_ERROR" not in line]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return [f"exit code {code}", *lines[-1:], *errors[-1:]][-1]


def wait(child: subprocess.Popen[bytes], stop: Path) -> bool:
    """Waits for the end of a process, which is told to save and go if `stop` appears or whoever asked for it is gone.

    Returns whether it was told so.
    """
    parent, told = os.getppid(), False
    alone = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if alone:  # in a worker of joblib, which a terminal tells of Ctrl-C too
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            child.wait(0.5)
            break
        except subprocess.TimeoutExpired:
            if not told and (stop.exists() or os.getppid() != parent):
                child.terminate()
                told = True
    if alone:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return told


def die_with_parent() -> None:
    """A process that its parent cannot tell to stop any more stops by itself (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def fail(folder: Path, config: dict[str, Any], text: str) -> float:
    """Notes why a job failed; what such a job scores."""
    if os.environ.get("SLURM_PROCID", "0") == "0":
        write(folder / "failed.json", {"reason": text, "settings": flat(config)})
        print(f"{folder.name}: failed: {text}", flush=True)
    return math.inf


def start(line: list[str], config: dict[str, Any], folder: Path) -> float:
    """Runs one job as a process, so that its ranks, memory and crashes are its own; its terminal is output.log.

    `line` is the command but for what makes it this sweep's. Returns the NELBO on validation, infinite without one.
    """
    done, stop = folder / "metrics.json", folder.parent / STOP
    if done.exists() and same(json.loads((folder / "config.json").read_text()), config):
        (folder / "failed.json").unlink(missing_ok=True)  # of other settings that were tried since
        print(f"{folder.name}: finished before", flush=True)
    elif stop.exists():
        return math.inf
    else:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "failed.json").unlink(missing_ok=True)
        mine = [f"folder={quoted(folder)}", f"wandb.group={quoted(config['wandb']['group'])}", "hydra.mode=RUN"]
        mine += ["trainer.enable_progress_bar=false", f"record={quoted(config['record'])}" if config["record"] else ""]
        environment = {key: value for key, value in os.environ.items() if not key.startswith(RANKS)}
        devices = config["trainer"]["devices"]
        devices = -1 if devices in ("auto", "-1") else devices
        count = devices if isinstance(devices, int) and config["trainer"]["accelerator"] != "cpu" else 0
        with gpus(count, stop) as shown, (folder / "output.log").open("a+", errors="replace") as output:
            if stop.exists():
                return math.inf
            print(f"{folder.name}: started, {output.name}", flush=True)
            begun, where = time.time(), output.seek(0, os.SEEK_END)
            # a group of its own, or Ctrl-C would come twice
            child = subprocess.Popen(
                [*line, *filter(None, mine)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment | shown,
                process_group=0,
                preexec_fn=die_with_parent,
            )
            told = wait(child, stop)
            output.seek(where)
            text = output.read()
        if told:
            print(f"{folder.name}: stopped; the same command goes on", flush=True)
            return math.inf
        if child.returncode:
            return fail(folder, config, reason(text, child.returncode))
        print(f"{folder.name}: done in {time.time() - begun:.0f} s", flush=True)
    return score(json.loads(done.read_text()))
