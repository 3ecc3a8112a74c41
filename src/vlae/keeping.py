"""What a run keeps, so that nothing is lost when it is killed: whole checkpoints, a log without gaps, a lock."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, Timer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from vlae.data import Images
from vlae.model import BEST, LAST

PREVIOUS = "previous.ckpt"
MINUTES = 10  # of training that a killed run repeats at most
STEPS = 20  # after which ranks agree on what to do: each time all of them wait for the device
SAVE, OVER = 1, 2  # what may be wished at the end of a step, besides 128 + a signal's number


@contextmanager
def written(path: Path) -> Iterator[None]:
    """An OSError of the block says which file it was, and that no other was harmed."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{path} could not be written: {error.strerror or error}; "
            "the checkpoints there are whole, and the same command goes on from them"
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder, in which no other training may write until the block ends or this process does.

    Raises:
        ValueError: if another training holds it.
        OSError: if it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = FileLock(folder / "lock").acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{folder}: another training is running there; wait for it or give another `folder`") from None
    except OSError as error:
        raise OSError(f"{folder} cannot be written, so no run can be kept there: {error}") from error
    with held:
        yield


def damage(path: Path) -> str:
    """Why a checkpoint cannot be opened; empty if it can, or is not there."""
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return ""
    except Exception as error:  # a damaged file provokes errors of every kind
        return " ".join(str(error).split())[:200] or type(error).__name__
    return ""


def newest(folder: Path) -> Path | None:
    """The checkpoint from which a run goes on: the last one, or where that is damaged the one before; None at first.

    Raises:
        ValueError: if none of those that are there can be opened, or not the best one.
    """
    damaged: dict[Path, str] = {}
    best, *paths = (folder / "checkpoints" / name for name in (BEST, LAST, PREVIOUS))
    for path in paths:
        if not path.exists():
            continue
        if why := damage(path):
            damaged[path] = why
            continue
        if why := damage(best):
            raise ValueError(
                f"{best} cannot be opened ({why}); remove it to go on with the best from there on, "
                f"or {folder} to train again"
            )
        for file, why in damaged.items():
            aside = file.with_name(f"{file.name}.damaged")  # or the next save would put it in the place of this one
            rank_zero_only(file.replace)(aside)
            rank_zero_only(print)(f"{file} cannot be opened ({why}); going on from {path}, it is now {aside}")
        return path
    if damaged:
        found = "; ".join(f"{path}: {why}" for path, why in damaged.items())
        raise ValueError(f"no checkpoint can be opened ({found}); remove {folder} to train again")
    return None


class WholeFiles(TorchCheckpointIO):
    """Checkpoints that are whole or not there; the last one becomes the previous one when the next is on the disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        part = path.with_name(f"{path.name}.part")
        content = BytesIO()  # torch's own errors of writing to a full disk say nothing
        torch.save(checkpoint, content)
        with written(path):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with part.open("wb") as file:
                    file.write(content.getbuffer())
                    file.flush()
                    os.fsync(file.fileno())
                if path.name == LAST and path.exists():
                    os.replace(path, path.with_name(PREVIOUS))
                os.replace(part, path)
            except OSError:
                with suppress(OSError):
                    part.unlink()
                raise


class Best(ModelCheckpoint):
    """best.ckpt in `place`, the best on validation; it goes on from there also when the run's folder was moved."""

    def __init__(self, place: Path) -> None:
        name = Path(BEST).stem
        super().__init__(place, name, monitor="val/nelbo", save_on_train_epoch_end=False, enable_version_counter=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        here = Path(str(self.dirpath)) / BEST
        if here.exists():  # else the next one is the best
            paths = {"best_model_path": str(here), "kth_best_model_path": str(here), "dirpath": self.dirpath}
            scores = {str(here): score for score in state_dict["best_k_models"].values()}
            super().load_state_dict({**state_dict, **paths, "best_k_models": scores})


class Log(Logger):
    """Every logged metric as a line of `log.jsonl`: its step, and the values by name."""

    name = version = None

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / "log.jsonl"

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """They stand in config.json."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        values = {name: value for name, value in metrics.items() if name != "epoch"}
        with written(self.path), self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def size(self) -> int:
        """Bytes, which are on the disk now."""
        if not self.path.exists():
            return 0
        with self.path.open("ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    @rank_zero_only
    def cut(self, size: int) -> None:
        """Forget what was logged after `size` bytes."""
        if self.path.exists() and self.path.stat().st_size > size:
            os.truncate(self.path, size)


class Keeping(Checkpoint):
    """Saves last.ckpt after every epoch and every ten minutes, and ends a run that was told to end where it can go on.

    On SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 or Ctrl-C a single process saves after its step, several ranks all after the
    same one of the next twenty. Then a handler that was there before (submitit's, SLURM's) is called; without one the
    process exits with 128 + the signal's number. A validation is finished first: to go back to the last checkpoint
    would cost more. When the time of `timer` is over, training ends likewise, but regularly. Must stand after all
    callbacks that change what is saved.
    """

    def __init__(self, path: Path, log: Log, timer: Timer) -> None:
        self.path, self.rows, self.timer = path, log, timer
        self.saved = time.monotonic()
        self.logged = self.received = self.agreed = self.at = 0
        self.earlier: dict[int, Any] = {}

    @property
    def best_model_path(self) -> str:
        """Where the checkpoint lies, under the name of Lightning's own callbacks; empty if there is none yet."""
        return str(self.path) if self.path.exists() else ""

    def state_dict(self) -> dict[str, Any]:
        return {"logged": self.rows.size()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.logged = state_dict["logged"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.earlier[signal.SIGTERM] = signal.getsignal(signal.SIGTERM)  # before Lightning's, which saves nothing
        # with max_steps Lightning would go on in an epoch that was over, and count it twice
        trainer.fit_loop._iteration_based_training = lambda: False  # type: ignore[method-assign]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rows.cut(self.logged)
        # one that was stopped early, and killed before it was tested, must not train on
        early = trainer.early_stopping_callbacks
        trainer.should_stop |= any(callback.wait_count >= callback.patience for callback in early)  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.saved, self.agreed = time.monotonic(), trainer.global_step
        images: Images = trainer.datamodule  # type: ignore[attr-defined]
        if images.before and images.train is not None:  # Lightning counts batches, and an epoch may have others now
            done = trainer.fit_loop.epoch_loop.batch_progress.current
            moved = done.ready * len(images.train) // images.before - done.ready
            for name in ("ready", "started", "processed", "completed"):
                setattr(done, name, getattr(done, name) + moved)
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
            self.earlier.setdefault(number, signal.getsignal(number))
            if self.earlier[number] != signal.SIG_IGN:
                signal.signal(number, self.receive)  # Lightning puts the earlier one back when training ends

    def receive(self, number: int, frame: Any) -> None:
        self.received = 128 + number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)  # a second one stops at once
        if number == signal.SIGHUP:
            for output in (1, 2):
                try:
                    os.write(output, b"")
                except OSError:  # its terminal is gone: the next line would end the run before it has saved
                    os.dup2(os.open(os.devnull, os.O_WRONLY), output)

    def wish(self, trainer: Trainer) -> int:
        """What all ranks are to do now: the strongest wish of any."""
        left = self.timer.time_remaining()
        over = left is not None and left <= 0 and trainer.fit_loop._can_stop_early
        late = time.monotonic() - self.saved > 60 * MINUTES
        wish = self.received or (OVER if over else SAVE if late else 0)
        if trainer.world_size > 1:
            self.agreed = trainer.global_step
            wishes = torch.tensor(wish, device=trainer.strategy.root_device)
            wish = int(trainer.strategy.reduce(wishes, reduce_op="max"))
        return wish

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        loop, batches = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        assert batches is not None
        # from within an accumulation, or just before a validation, Lightning would not go on as if nothing had been
        if loop._should_accumulate() or loop._num_ready_batches_reached() or loop._should_check_val_fx(batches):
            return
        last = loop._is_training_done  # by max_steps
        if trainer.world_size > 1 and not last and trainer.global_step < self.agreed + STEPS:
            return
        if wish := self.wish(trainer) or SAVE * last:
            self.save(trainer, wish)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # an epoch that was cut short was saved where it was cut: here it would count as a whole one
        if self.at != trainer.global_step:
            self.save(trainer, self.wish(trainer))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # the step of the test's figures; one less where training was over when the run went on
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def save(self, trainer: Trainer, wish: int) -> None:
        trainer.save_checkpoint(self.path, weights_only=False)
        self.saved, self.at = time.monotonic(), trainer.global_step
        if wish == OVER:
            trainer.should_stop, trainer.limit_val_batches = True, 0  # or it would be validated at a step of its own
        elif wish > OVER:
            number = signal.Signals(wish - 128)
            if trainer.is_global_zero:
                print(f"{number.name}: step {trainer.global_step} saved; the same command goes on from it", flush=True)
            self.received, earlier = 0, self.earlier.get(number)
            if callable(earlier) and earlier is not signal.default_int_handler:
                earlier(number, None)
            else:  # Lightning kills the first rank at once if another fails
                sys.exit(wish if trainer.is_global_zero else 0)
