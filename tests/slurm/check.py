"""Trains on a SLURM cluster of this machine alone, in a temporary folder, and checks what is left; see README.md."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

TRAIN = str(Path(__file__).resolve().parents[2] / "train.py")
SETTINGS = ["trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "objective.free_bits=1.0"]
SHORT = [*SETTINGS, "trainer.max_epochs=2", "trainer.check_val_every_n_epoch=1"]
LONG = [*SETTINGS, "trainer.max_epochs=60", "trainer.check_val_every_n_epoch=20"]
RANKS = ["trainer.devices=2", "trainer.strategy=ddp", "data.batch_size=125"]
SUBMITIT = ["-m", "hydra/launcher=submitit_slurm", "hydra.launcher.mem_gb=2", "hydra.launcher.timeout_min=60"]

CONFIG = """
ClusterName=vlae
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge/socket,cred_expire=5  # how long a requeued job waits, too
SlurmctldPort={controller}
SlurmdPort={node}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides  # as many processors as are told, not as are there
SchedulerParameters=sched_interval=5
FirstJobId={first}
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=8000
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE
"""


def until(what: str, happened: Callable[[], object], seconds: float = 600) -> None:
    """Waits; TimeoutError that names `what` did not happen."""
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            raise TimeoutError(f"{seconds} seconds, and {what} did not happen")
        time.sleep(0.2)


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """munged, slurmctld and slurmd as long as the block lasts, with all that they write below `folder`."""
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge" / "key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    host = socket.gethostname().split(".")[0]
    config = folder / "slurm.conf"
    first = secrets.randbelow(9000) + 1  # ranks meet at the port 15000 + a job's id
    config.write_text(CONFIG.format(folder=folder, host=host, controller=free_port(), node=free_port(), first=first))
    os.environ["SLURM_CONF"] = str(config)
    files = {name: folder / "munge" / name for name in ("socket", "pid-file", "log-file", "seed-file")}
    munge = ["munged", "--foreground", "--force", f"--key-file={key}", *(f"--{k}={v}" for k, v in files.items())]
    daemons = [subprocess.Popen(munge, stderr=subprocess.DEVNULL)]
    try:
        until("the start of munged", files["socket"].exists)
        daemons += [subprocess.Popen([name, "-D"], stderr=subprocess.DEVNULL) for name in ("slurmctld", "slurmd")]
        ready = ["sinfo", "--noheader", "--format=%t"]
        until("a node", lambda: subprocess.run(ready, capture_output=True, text=True).stdout.strip() == "idle")
        yield
    finally:
        if len(daemons) > 1:  # or what they run would outlive them
            subprocess.run(["scancel", "--full", "--signal=KILL", "--partition=main"], capture_output=True)
            subprocess.run(["scancel", "--partition=main"], capture_output=True)
            queue = ["squeue", "--noheader"]
            until("the end of all jobs", lambda: not subprocess.run(queue, capture_output=True).stdout, 60)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()


def train(*overrides: str, before: tuple[str, ...] = ()) -> None:
    """`python train.py *overrides` to its end, which must be a good one."""
    subprocess.run([*before, sys.executable, TRAIN, *overrides], check=True)


def left(folder: Path) -> tuple[set[str], dict[str, float]]:
    """The names of what a run left, W&B's and the terminal's aside, and its metrics, the clock's aside."""
    dashboards = {path.name for path in folder.glob("wandb/offline-run-*/*.wandb")}  # a resumed run has one twice
    assert len(dashboards) == 1, f"{folder}: not one W&B run but {dashboards}"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    metrics = json.loads((folder / "metrics.json").read_text())
    return {name for name in files if not name.startswith(("wandb", "output.log"))}, {**metrics, "wall_s": 0.0}


def same(folder: Path, other: Path) -> None:
    """AssertionError unless two runs left the same files and metrics."""
    (files, metrics), (expected, wanted) = left(folder), left(other)
    assert files == expected, f"{folder}: {files ^ expected}"
    assert metrics.keys() == wanted.keys()
    for name, value in wanted.items():
        assert abs(metrics[name] - value) <= 1e-4 * max(1, abs(value)), f"{folder}: {name} {metrics[name]}, not {value}"


def jobs(sweep: Path) -> dict[int, Path]:
    """The folders of a sweep's jobs by their seeds."""
    return {json.loads(path.read_text())["seed"]: path.parent for path in sweep.glob("*/config.json")}


def tasks_of_srun() -> None:
    """srun starts the ranks of one run."""
    train(*SHORT, *RANKS, "folder=srun", before=("srun", "--ntasks-per-node=2"))
    same(Path("srun"), Path("alone"))


def submitted_sweep() -> None:
    """Two jobs, each with two ranks that SLURM starts."""
    train(*SUBMITIT, "hydra.launcher.tasks_per_node=2", *SHORT, *RANKS, "folder=submitted", "seed=0,1")
    assert jobs(Path("submitted")).keys() == {0, 1}
    same(jobs(Path("submitted"))[0], Path("alone"))


def sweep_in_an_allocation() -> None:
    """A sweep in a script for sbatch: each job starts its own ranks."""
    line = " ".join([sys.executable, TRAIN, "-m", *SHORT, *RANKS, "folder=allocated", "seed=0,1"])
    subprocess.run(["sbatch", "--wait", "--ntasks=2", f"--wrap={line}"], check=True)
    assert len(list(Path("allocated").glob("*/output.log"))) == 2, "jobs without a process of their own"
    assert jobs(Path("allocated")).keys() == {0, 1}
    same(jobs(Path("allocated"))[0], Path("alone"))


def interrupted(folder: Path, name: str) -> None:
    """Signals the only job in the middle of its training; it must come back by itself and end as if nothing had been.

    The steps of a job get the signal, as they would before a pre-emption or the end of their time.
    """
    until("the first checkpoint", lambda: list(folder.rglob("last.ckpt")))
    (job,) = output("squeue", "--noheader", "--states=RUNNING", "--format=%i").splitlines()
    subprocess.run(["scancel", f"--signal={name}", job], check=True)
    until("the end of the job", lambda: list(folder.rglob("metrics.json")))
    assert "Restarts=1" in output("scontrol", "show", "job", job), f"job {job} was not requeued once"
    (settings,) = folder.rglob("config.json")
    same(settings.parent, Path("long"))


def preempted_submission() -> None:
    """SIGUSR2, submitit's, to both ranks of a job: saved, requeued, resumed in the same folder."""
    two = ["hydra.launcher.tasks_per_node=2", *LONG, *RANKS]
    submitting = subprocess.Popen([sys.executable, TRAIN, *SUBMITIT, *two, "folder=preempted"])
    interrupted(Path("preempted"), "USR2")
    assert submitting.wait() == 0


def preempted_script() -> None:
    """SIGUSR1 to both ranks of a script for sbatch: saved, exit code 138, with which the script requeues itself."""
    train = " ".join(["srun", sys.executable, TRAIN, "folder=script", *LONG, *RANKS])
    script = f"{train}; code=$?; [ $code = 138 ] && scontrol requeue $SLURM_JOB_ID; exit $code"
    subprocess.run(["sbatch", "--requeue", "--ntasks-per-node=2", f"--wrap={script}"], check=True)
    interrupted(Path("script"), "USR1")


CHECKS = [tasks_of_srun, submitted_sweep, sweep_in_an_allocation, preempted_submission, preempted_script]


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the cluster ends, too
    with TemporaryDirectory() as temporary:
        os.chdir(temporary)
        train("folder=alone", "data.batch_size=250", *SHORT)
        train("folder=long", *LONG, *RANKS)  # ranks round in an order of their own, and hundreds of steps enlarge that
        with cluster(Path(temporary) / "cluster"):
            for check in [check for check in CHECKS if not sys.argv[1:] or check.__name__ in sys.argv]:
                begun = time.monotonic()
                check()
                print(f"passed in {time.monotonic() - begun:.0f} s: {check.__doc__}", flush=True)


if __name__ == "__main__":
    main()
