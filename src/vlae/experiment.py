"""One run from plain settings: check everything, train, test, leave figures, pictures and weights in a folder."""

import json
import logging
import os
import platform
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from vlae.dashboard import Pictures, show
from vlae.data import Images, independent_pixels
from vlae.figures import learning_curves, read_metrics
from vlae.model import load
from vlae.schema import check
from vlae.training import Averaging, LitVLAE

RESUMABLE = ("trainer", "wandb", "record")  # what may change when a run is continued


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


def wandb_logger(wandb: dict[str, Any], folder: Path, config: dict[str, Any]) -> list[Logger]:
    if wandb["mode"] == "disabled":
        return []
    if wandb["mode"] not in ("offline", "online"):
        raise ValueError(f"wandb.mode={wandb['mode']!r}: must be offline, online or disabled")
    try:
        import wandb as _  # noqa: F401
        from lightning.pytorch.loggers import WandbLogger
    except ImportError as error:
        raise ValueError("wandb.mode: wandb is not installed; install it or set wandb.mode=disabled") from error
    os.environ.setdefault("WANDB_SILENT", "true")
    folder.mkdir(parents=True, exist_ok=True)
    logger = WandbLogger(
        project=wandb["project"], name=folder.name, save_dir=folder, offline=wandb["mode"] == "offline"
    )
    logger.log_hyperparams(flat(config))
    return [logger]


def run(config: dict[str, Any], folder: Path, command: str) -> dict[str, float]:
    """Trains what `config` (as composed from conf/) describes, or goes on where `folder` left off; returns the metrics.

    Leaves in `folder`: config.json, checkpoints/, logs/, pictures, learning_curves.png and, last, metrics.json.

    Raises:
        ValueError: for a setting that does not fit, before anything is written.
        FileNotFoundError: for missing data, likewise.
    """
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.WARNING)
    started, code = datetime.now(UTC), commit()
    torch.manual_seed(config["seed"])

    settings = dict(config["data"])
    function = settings.pop("_target_")
    check(Images, settings, "data", supplied=("dataset", "seed"))
    images = Images(function, seed=config["seed"], **settings)
    images.setup()
    model = LitVLAE(
        model=config["model"],
        shape=images.shape,
        levels=images.levels,
        seed=config["seed"],
        optimizer=config["optimizer"],
        objective=config["objective"],
        compile=config["compile"],
        allow=("vlae.", *config["allow"]),
    )
    check(Trainer, config["trainer"], "trainer")
    compare(folder, config)
    finished = folder / "metrics.json"
    last = folder / "checkpoints" / "last.ckpt"
    if finished.exists() and json.loads((folder / "config.json").read_text()) == config:
        metrics = json.loads(finished.read_text())
        show(metrics, f"{folder} is finished already; remove it to train again")
        return metrics
    if config["init_from"] and not last.exists():
        model.model.load_state_dict(load(config["init_from"], ("vlae.", *config["allow"])).state_dict())
        model.fresh = False

    averaging = Averaging(config["averaging"]) if config["averaging"] else None
    scored = not images.train_on_validation
    best = ModelCheckpoint(
        folder / "checkpoints",
        filename="best",
        monitor="val/nelbo" if scored else None,
        save_last=True,
        enable_version_counter=False,
        save_on_train_epoch_end=not scored,
    )
    timer = Timer()
    callbacks: list[Callback] = [Pictures(folder, images), best, timer]
    if config["patience"] and scored:
        callbacks.append(EarlyStopping("val/nelbo", patience=config["patience"]))
    if averaging:
        callbacks.append(averaging)  # last: it takes the average out again where the others still look at it
    loggers: list[Logger] = [CSVLogger(folder, name="logs"), *wandb_logger(config["wandb"], folder, config)]
    trainer = Trainer(
        **config["trainer"], logger=loggers, callbacks=callbacks, use_distributed_sampler=False, default_root_dir=folder
    )
    rank_zero_only(write)(folder / "config.json", config)
    finished.unlink(missing_ok=True)

    trainer.fit(model, images, ckpt_path=last if last.exists() else None, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    weights = Path(best.best_model_path if scored else best.last_model_path)
    # not `test(ckpt_path=...)`: that would load the weights without the average
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True)["state_dict"])
    begun = time.time()
    metrics = {name: float(value) for name, value in trainer.test(model, images, verbose=False)[0].items()}
    metrics |= {name: float(value) for name, value in trainer.logged_metrics.items() if name.startswith("val/")}
    if scored:
        metrics["val/nelbo"] = float(best.best_model_score)  # type: ignore[arg-type]
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
            "seed": config["seed"],
            "parameters": sum(p.numel() for p in model.model.parameters()),
            "steps": trainer.global_step,
            "images_seen": images_seen,
            "wall_s": round(timer.time_elapsed("train") + time.time() - begun, 1),
        }
        if config["record"]:
            write(Path("results") / f"{config['record']}.json", {"name": config["record"], **about, "metrics": metrics})
        learning_curves(read_metrics(folder / "logs"), folder / "learning_curves.png")
        metrics = metrics | {name: about[name] for name in ("parameters", "steps", "images_seen", "wall_s")}
        write(finished, metrics)
        show(metrics, f"{folder}: metrics.json, learning_curves.png, samples.png, reconstructions.png, checkpoints/")
    return metrics
