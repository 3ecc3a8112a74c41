"""One run from plain settings: check everything, train, test, leave figures, pictures and weights in a folder."""

import json
import logging
import os
import platform
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from vlae.dashboard import Pictures, show
from vlae.data import Images, independent_pixels
from vlae.figures import learning_curves, read_metrics
from vlae.model import load
from vlae.schema import check
from vlae.training import Averaging, LitVLAE

RESUMABLE = ("trainer", "wandb", "record")  # what may change when a run is continued


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


def write(path: Path, content: dict[str, Any]) -> None:
    """A JSON file that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(part, path)


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.processor() or platform.machine()])[0]}, {torch.get_num_threads()} threads"


def commit() -> str:
    """The commit of the code that runs, `-dirty` if files differ from it, `unknown` outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    answer = subprocess.run(git, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "unknown"


def compare(folder: Path, config: dict[str, Any]) -> None:
    """Refuses a folder that holds a run of other settings.

    Raises:
        ValueError: naming the first setting that differs.
    """
    path = folder / "config.json"
    if not path.exists():
        return
    old, new = (
        flat({k: v for k, v in c.items() if k not in RESUMABLE}) for c in (json.loads(path.read_text()), config)
    )
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            raise ValueError(
                f"{folder} holds a run with {key}={old.get(key)!r}, now {new.get(key)!r}; "
                "give another `folder`, or remove it"
            )


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `model.prior.depth: 4`."""
    pairs: dict[str, Any] = {}
    for key, value in config.items():
        pairs |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return pairs


def wandb_logger(*, mode: Literal["offline", "online", "disabled"], project: str, folder: Path) -> list[Logger]:
    """No logger where `mode` is disabled."""
    if mode == "disabled":
        return []
    try:
        import wandb  # noqa: F401
        from lightning.pytorch.loggers import WandbLogger
    except ImportError as error:
        raise ValueError(f"wandb.mode={mode}: wandb is not installed; install it or set wandb.mode=disabled") from error
    os.environ.setdefault("WANDB_SILENT", "true")
    return [WandbLogger(project=project, name=folder.name, save_dir=folder, offline=mode == "offline")]


def run(config: dict[str, Any], folder: Path, command: str) -> dict[str, float]:
    """Trains what `config` (as composed from conf/) describes, or goes on where `folder` left off; returns the metrics.

    Leaves in `folder`: config.json, checkpoints/, logs/, pictures, learning_curves.png and, last, metrics.json.

    Raises:
        ValueError: for a setting that does not fit, before anything is written.
        FileNotFoundError: for missing data, likewise.
    """
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # a resume, train_on_validation, lightning 2.6 on torch 2.13: all of them meant
    for meant in ("Checkpoint directory .* exists", "Total length of `list`", ".*LeafSpec.* is deprecated"):
        warnings.filterwarnings("ignore", meant)
    started, code = datetime.now(UTC), commit()
    check(Settings, config, "config")
    asked = Settings(**config)
    if asked.patience is not None and asked.patience < 1:
        raise ValueError(f"patience={asked.patience}: must be null (never stop early) or at least 1")
    allow = ("vlae.", *asked.allow)
    torch.manual_seed(asked.seed)

    function, settings = asked.data.get("_target_"), {k: v for k, v in asked.data.items() if k != "_target_"}
    if not isinstance(function, str) or not function.startswith(tuple(f"{name.rstrip('.')}." for name in allow)):
        raise ValueError(f"data._target_={function!r}: not allowed; it must start with {' or '.join(allow)}")
    check(Images, settings, "data", supplied=("dataset", "seed"))
    images = Images(function, seed=asked.seed, **settings)
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
    compare(folder, config)
    finished = folder / "metrics.json"
    if finished.exists() and json.loads((folder / "config.json").read_text()) == config:
        metrics = json.loads(finished.read_text())
        show(metrics, f"{folder} is finished already; remove it to train again")
        return metrics
    newest = folder / "checkpoints" / "last.ckpt"
    if asked.init_from and not newest.exists():
        model.start_from(load(asked.init_from, allow))

    scored = not images.train_on_validation
    timer = Timer()
    callbacks: list[Callback] = [Pictures(folder, images), timer]
    if asked.patience and scored:
        callbacks.append(EarlyStopping("val/nelbo", patience=asked.patience))
    if asked.averaging:
        callbacks.append(Averaging(asked.averaging))  # last: it takes the average out again where others look at it
    # `save_last` of the best would only save when that improves
    last = ModelCheckpoint(newest.parent, filename="last", enable_version_counter=False, save_on_train_epoch_end=True)
    best = ModelCheckpoint(newest.parent, filename="best", monitor="val/nelbo", enable_version_counter=False)
    callbacks += [best, last] if scored else [last]  # in this order, so that the last knows the best
    check(wandb_logger, asked.wandb, "wandb", supplied=("folder",))
    dashboards = wandb_logger(**asked.wandb, folder=folder)
    ours: dict[str, Any] = {"logger": [CSVLogger(folder, name="logs"), *dashboards], "callbacks": callbacks}
    ours |= {"use_distributed_sampler": False, "default_root_dir": folder}
    check(Trainer, asked.trainer, "trainer", supplied=ours)
    try:
        trainer = Trainer(**asked.trainer, **ours)
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise ValueError(f"trainer: {error}") from error
    model.refuse_endless(trainer)
    images.trainer = trainer  # it knows the number of devices
    images.setup()

    rank_zero_only(write)(folder / "config.json", config)
    rank_zero_only(finished.unlink)(missing_ok=True)
    try:
        for logger in dashboards:
            logger.log_hyperparams(flat(config))
        trainer.fit(model, images, ckpt_path=newest if newest.exists() else None, weights_only=True)
        # not `test(ckpt_path=...)`: that would load the weights without the average
        weights = torch.load(best.best_model_path or newest, map_location="cpu", weights_only=True)
        model.load_state_dict(weights["state_dict"])
        begun = time.time()
        metrics = {**weights["metrics"], **trainer.test(model, images, verbose=False)[0]}
        wall = timer.time_elapsed("train") + time.time() - begun
    except SIGTERMException:
        sys.exit(143)  # its own exit code would be 0
    finally:
        if dashboards:  # or the next run of a sweep would go on in this one's dashboard
            sys.modules["wandb"].finish()
    metrics["independent_pixels/bits_per_dim"] = independent_pixels(images.splits)
    if trainer.is_global_zero:
        images_seen = trainer.global_step * images.batch_size * trainer.world_size * trainer.accumulate_grad_batches
        about = {
            "command": command,
            "commit": code,
            "date": started.isoformat(timespec="seconds"),
            "hardware": hardware(model.device),
            "data": function.rsplit(".", 1)[1],
            "split": "test",
            "binarisation": "dynamic" if images.splits.dynamic else "static" if images.levels == 2 else "none",
            "seed": asked.seed,
            "parameters": sum(p.numel() for p in model.model.parameters()),
            "steps": trainer.global_step,
            "images_seen": images_seen,
            "wall_s": round(wall, 1),
        }
        if asked.record:
            write(Path("results") / f"{asked.record}.json", {"name": asked.record, **about, "metrics": metrics})
        left = "metrics.json, samples.png, reconstructions.png, checkpoints/"
        curves = read_metrics(folder / "logs")
        try:
            if curves.keys() & {"train/rate", "val/rate"}:  # none in a run of a few steps
                learning_curves(curves, folder / "learning_curves.png")
                left += ", learning_curves.png"
        except ImportError as error:
            left += f"; no learning curves: {error}"
        metrics = metrics | {name: about[name] for name in ("parameters", "steps", "images_seen", "wall_s")}
        write(finished, metrics)
        show(metrics, f"{folder}: {left}")
    return metrics
