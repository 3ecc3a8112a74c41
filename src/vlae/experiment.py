"""One run from plain settings: check everything, train, test, leave figures, pictures and weights in a folder."""

import json
import logging
import sys
import time
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, Timer
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from vlae.dashboard import Pictures, show
from vlae.data import Images, images_for, independent_pixels
from vlae.figures import learning_curves, read_metrics
from vlae.keeping import PREVIOUS, Best, Keeping, Log, WholeFiles, locked, newest
from vlae.model import LAST, kept, load
from vlae.muon import slow_bfloat16
from vlae.records import RESUMABLE, commit, flat, hardware, same, write
from vlae.schema import check
from vlae.tracking import Tracker, conclude, tracked
from vlae.training import Averaging, LitVLAE

PRECISIONS = "32-true", "bf16-mixed", "16-mixed"


@dataclass
class Settings:
    """What `conf/config.yaml` composes; the sections are those of the classes they go to."""

    data: dict[str, Any]
    model: dict[str, Any]
    optimizer: dict[str, Any]
    objective: dict[str, Any]
    trainer: dict[str, Any]
    wandb: dict[str, Any]
    seed: int
    record: str | None
    init_from: str | None
    allow: list[str]
    compile: bool
    averaging: float
    patience: int | None


def finished(folder: Path, config: dict[str, Any]) -> dict[str, float] | None:
    """The metrics of the run that `folder` holds if there is nothing left to do; None if there is.

    Raises:
        ValueError: naming the first setting in which that run is another than `config`.
    """
    path, metrics = folder / "config.json", folder / "metrics.json"
    if not path.exists():
        return None
    before = json.loads(path.read_text())  # first: the first rank changes it when it has removed the metrics
    old, new = (flat({k: v for k, v in c.items() if k not in RESUMABLE}) for c in (before, config))
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            raise ValueError(
                f"{folder} holds a run with {key}={old.get(key)!r}, now {new.get(key)!r}; "
                "give another `folder`, or remove it"
            )
    if not same(before, config) or not metrics.exists():
        return None
    found: dict[str, float] = json.loads(metrics.read_text())
    show(found, f"{folder} is finished already; remove it to train again")
    return found


def prepare(config: dict[str, Any]) -> tuple[Settings, Images, LitVLAE]:
    """The settings, the data and a fresh model; ValueError or FileNotFoundError for what does not fit or is missing."""
    check(Settings, config, "")
    asked = Settings(**config)
    if asked.patience is not None and asked.patience < 1:
        raise ValueError(f"patience={asked.patience}: must be null (never stop early) or at least 1")
    allow = ("vlae.", *asked.allow)
    images = images_for(asked.data, asked.seed, allow)
    torch.manual_seed(asked.seed)
    model = LitVLAE(
        model=asked.model,
        shape=images.shape,
        levels=images.levels,
        seed=asked.seed,
        optimizer=asked.optimizer,
        objective=asked.objective,
        compile=asked.compile,
        allow=allow,
    )
    return asked, images, model


def trainer_for(asked: Settings, images: Images, folder: Path, loggers: list[Tracker]) -> Trainer:
    """Lightning's Trainer with our callbacks; of the checkpoints, best.ckpt is the best on validation."""
    place, scored = folder / "checkpoints", not images.train_on_validation
    callbacks: list[Callback] = [Pictures(folder, images)]
    if asked.patience and scored:
        callbacks.append(EarlyStopping("val/nelbo", patience=asked.patience, check_on_train_epoch_end=False))
    if asked.averaging:
        callbacks.append(Averaging(asked.averaging))  # after those that look at the average: it takes it out again
    if scored:
        callbacks.append(Best(place))
    log = Log(folder)
    plugins: list[Any] = [WholeFiles()]
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():  # which may run inside a job of SLURM's
        # or on SIGUSR1 Lightning would save a file of its own, and test those weights
        plugins.append(SLURMEnvironment(auto_requeue=False))
    ours: dict[str, Any] = {"logger": [log, *loggers], "callbacks": callbacks, "plugins": plugins}
    ours |= {"use_distributed_sampler": False, "default_root_dir": folder}
    check(Trainer, asked.trainer, "trainer", supplied=ours)
    settings = dict(asked.trainer)
    try:
        # Lightning's own for `max_time` would end an epoch in its middle, and count it as a whole one
        timer = Timer(settings.pop("max_time", None), interval="epoch")
        callbacks += [timer, Keeping(place / LAST, log, timer)]
        trainer = Trainer(**settings, **ours)
    except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
        raise ValueError(f"trainer: {error}") from error
    for name in ("max_steps", "max_epochs"):
        if getattr(trainer, name) == 0:
            raise ValueError(f"trainer.{name}=0: nothing would be trained; at least 1, or -1 for no end")
    for name in ("accumulate_grad_batches", "check_val_every_n_epoch"):
        value = getattr(trainer, name)
        if value is not None and value < 1:
            raise ValueError(f"trainer.{name}={value}: must be at least 1")
    for name in ("limit_train_batches", "limit_test_batches"):
        if getattr(trainer, name) == 0:
            raise ValueError(f"trainer.{name}=0: leaves nothing to train on or to test")
    every, epochs = trainer.check_val_every_n_epoch, trainer.max_epochs or -1
    if scored and every and epochs > 0 and epochs % every:
        left = f"the last {epochs % every} epochs are not validated, so their weights cannot be the best"
        left = left if epochs > every else "nothing is validated, and the last weights count"
        warnings.warn(f"trainer.max_epochs={epochs} with trainer.check_val_every_n_epoch={every}: {left}", stacklevel=2)
    if settings.get("fast_dev_run"):
        raise ValueError("trainer.fast_dev_run: leaves nothing to test; use trainer.max_steps=2")
    if settings.get("overfit_batches"):
        raise ValueError("trainer.overfit_batches: each epoch takes the next batches; use data=images and few images")
    if str(asked.trainer.get("strategy")).startswith(("ddp_spawn", "ddp_fork", "ddp_notebook")):
        strategy = asked.trainer["strategy"]
        raise ValueError(f"trainer.strategy={strategy}: what its processes count is lost with them; use ddp")
    if trainer.precision not in PRECISIONS:
        allowed = ", ".join(PRECISIONS)
        raise ValueError(f"trainer.precision={trainer.precision}: weights are float32; allowed: {allowed}")
    if trainer.precision.endswith("mixed") and slow_bfloat16(trainer.strategy.root_device):
        slow = "bfloat16 can be several times slower than 32-true on this processor, without AVX512's bfloat16 or SVE"
        warnings.warn(f"trainer.precision={trainer.precision}: {slow}", stacklevel=2)
    return trainer


def evaluated(asked: Settings, images: Images, model: LitVLAE, trainer: Trainer) -> dict[str, Any]:
    """The part of a record that says what was evaluated, where."""
    return {
        "hardware": hardware(trainer.strategy.root_device),  # the model is back on the CPU by now
        "data": images.dataset_name,
        "split": "test",
        "binarisation": images.binarisation,
        "seed": asked.seed,
        "parameters": sum(p.numel() for p in model.model.parameters()),
    }


def quiet() -> None:
    """Keeps off the terminal what Lightning says of things that are meant."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # a resume, train_on_validation, lightning 2.6 on torch 2.13
    for meant in ("Checkpoint directory .* exists", "Total length of `list`", ".*LeafSpec.* is deprecated"):
        warnings.filterwarnings("ignore", meant)


def train(trainer: Trainer, model: LitVLAE, images: Images, resume: Path | None) -> tuple[dict[str, float], float]:
    """Trains and tests; returns the metrics of the weights that count, and the seconds it took."""
    try:
        trainer.fit(model, images, ckpt_path=resume, weights_only=True)
        # not `test(ckpt_path=...)`: that would load the weights without the average
        weights = torch.load(kept(Path(trainer.default_root_dir)), map_location="cpu", weights_only=True)
        model.load_state_dict(weights["state_dict"])
        begun = time.time()
        metrics = {**weights["metrics"], **trainer.test(model, images, verbose=False)[0]}
    except MisconfigurationException as error:  # of what needs the data, such as a share of too few batches
        raise ValueError(f"trainer: {error}") from error
    except SIGTERMException:  # outside training, where there is nothing to save
        sys.exit(143)  # its own exit code would be 0
    timer = next(callback for callback in trainer.callbacks if isinstance(callback, Timer))  # type: ignore[attr-defined]
    metrics["independent_pixels/bits_per_dim"] = independent_pixels(images.splits)
    return metrics, timer.time_elapsed("train") + time.time() - begun


def run(config: dict[str, Any], folder: Path, command: str) -> dict[str, float]:
    """Trains what `config` (as composed from conf/) describes, or goes on where `folder` left off; returns the metrics.

    Leaves in `folder`: config.json, checkpoints/, log.jsonl, pictures, learning_curves.png and, last, metrics.json.

    Raises:
        ValueError: for a setting that does not fit, before anything is written; if another training is running in
            `folder`, or its checkpoints cannot be opened.
        FileNotFoundError: for missing data, likewise.
        FloatingPointError: if the loss is not finite.
        OSError: if a file cannot be written; earlier checkpoints are whole.
    """
    quiet()
    started, code = datetime.now(UTC).isoformat(timespec="seconds"), commit()
    asked, images, model = prepare(config)
    if done := finished(folder, config):
        return done
    if asked.init_from and not any((folder / "checkpoints" / name).exists() for name in (LAST, PREVIOUS)):
        model.start_from(load(asked.init_from, ("vlae.", *asked.allow)))
    with tracked(asked.wandb, folder) as loggers, ExitStack() as until_done:
        trainer = trainer_for(asked, images, folder, loggers)
        model.refuse_endless(trainer)
        images.trainer = trainer  # it knows the number of devices
        images.setup()
        if trainer.is_global_zero:  # after all that may be refused, as this makes the folder
            until_done.enter_context(locked(folder))
        if done := finished(folder, config):  # by another training, which had the lock until now
            return done
        resume = newest(folder)
        # in this order: another process must not see the old result beside the new settings
        for name in ("metrics.json", "failed.json"):
            rank_zero_only((folder / name).unlink)(missing_ok=True)
        rank_zero_only(write)(folder / "config.json", config)
        for logger in loggers:
            logger.log_hyperparams(config)
        metrics, wall = train(trainer, model, images, resume)
        if trainer.is_global_zero:
            seen = images.state_dict()["number"] * images.batch_size * trainer.world_size
            cost = {"steps": trainer.global_step, "images_seen": seen, "wall_s": round(wall, 1)}
            about = evaluated(asked, images, model, trainer)
            if asked.record:
                head = {"name": asked.record, "command": command, "commit": code, "date": started}
                write(Path("results") / f"{asked.record}.json", {**head, **about, **cost, "metrics": metrics})
            left = "metrics.json, checkpoints/"
            curves = read_metrics(folder)
            try:
                if curves.keys() & {"train/rate", "val/rate"}:  # none in a run of a few steps
                    learning_curves(curves, folder / "learning_curves.png")
            except ImportError as error:
                left += f"; no learning curves: {error}"
            metrics |= {"parameters": about["parameters"], **cost}
            for logger in loggers:
                conclude(logger, metrics, kept(folder))
            write(folder / "metrics.json", metrics)
            (folder / "failed.json").unlink(missing_ok=True)  # of who tried to start it meanwhile
            drawn = ", ".join(sorted(path.name for path in folder.glob("*.png")))
            show(metrics, f"{folder}: {drawn}, {left}")
    return metrics
