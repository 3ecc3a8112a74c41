"""What a person sees of a run: lines and a table on the terminal, pictures on disk and in W&B."""

import math
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table

from vlae.data import EvaluationBatches, Images, independent_pixels
from vlae.datasets import Part
from vlae.figures import grid, save
from vlae.gallery import PICTURES, draw, plot
from vlae.media import media
from vlae.tracking import Tracker

UNITS = {"rate": "nats", "distortion": "nats", "nelbo": "nats, bound", "bits_per_dim": "bound"}


def show(metrics: dict[str, Any], closing: str) -> None:
    """The closing table of a run."""
    table = Table("", "validation", "test", "", title_justify="left")
    for name, unit in UNITS.items():
        cells = (metrics.get(f"{split}/{name}") for split in ("val", "test"))
        table.add_row(name, *("-" if value is None else f"{value:.3f}" for value in cells), unit)
    table.add_row(
        "independent pixels", "", f"{metrics['independent_pixels/bits_per_dim']:.3f}", "bits_per_dim, to beat"
    )
    console = Console(markup=False, emoji=False)  # there may be brackets in a folder's name
    console.print(table)
    console.print(closing, soft_wrap=True, highlight=False)


def show_data(name: str, images: Images, folder: Path) -> None:
    """Prints what a data set holds, and draws a grid of each split into `folder`."""
    splits, console = images.splits, Console(markup=False, emoji=False)
    shape = "x".join(map(str, images.shape))
    kind = "drawn anew each time, as Bernoulli(grey / 255)" if splits.dynamic else "fixed"
    table = Table(
        "split", "images", "classes", "mean", "MB", title=f"{name}: {shape} (C x H x W)", title_justify="left"
    )
    written = []
    for split in ("train", "validation", "test"):
        part: Part = getattr(splits, split)
        top = 255 if splits.dynamic else splits.levels - 1
        means = part.images.sum((0, 2, 3)) / (part.images[:, 0].numel() * top)
        size = sum(tensor.nbytes for tensor in part if tensor is not None) / 1e6
        classes = "-" if part.labels is None else str(len(part.labels.unique()))
        table.add_row(split, f"{len(part.images):,}", classes, " ".join(f"{m:.4f}" for m in means), f"{size:.1f}")
        shuffled = EvaluationBatches(images.part(split), len(part.images), images.seed, 1, 0)
        path = folder / f"{split}.png"
        save(grid(next(iter(shuffled)).x[:64], splits.levels, 16), path)
        written.append(str(path))
    console.print(table)
    bits = independent_pixels(splits)
    nats = f" = {bits * math.log(2) * math.prod(images.shape):.2f} nats per image" if splits.levels == 2 else ""
    console.print(f"levels: {splits.levels}, {kind}; means are of pixels between 0 and 1", highlight=False)
    console.print(
        f"independent pixels, which every model must beat: {bits:.4f} bits/dim{nats} on test", highlight=False
    )
    console.print(f"pictures: {', '.join(written)}", soft_wrap=True, highlight=False)


class Pictures(Callback):
    """After each validation a line of figures, samples and reconstructions, after the test every picture of
    `vlae.gallery`: as files and in W&B, with the averaged weights.

    The same noise each time, so that a picture changes with the weights alone. Must stand before the averaging
    callback.
    """

    def __init__(self, folder: Path, images: Images):
        self.folder, self.images = folder, images

    def draw(
        self, trainer: Trainer, module: LightningModule, split: Literal["validation", "test"], names: Iterable[str]
    ) -> None:
        if not trainer.is_global_zero:
            return
        part, model, seed = self.images.part(split), module.model, self.images.seed
        fair = next(iter(EvaluationBatches(part, min(1000, len(part.images)), seed, 1, 0)))
        x = fair.x.to(module.device).long()
        pictures: dict[str, Any] = dict(draw(model, x, names, seed, self.folder))  # type: ignore[arg-type]
        if split == "test":
            with suppress(ImportError):  # no matplotlib
                pictures |= {path.stem: str(path) for path in plot(model, x, seed, self.folder)}  # type: ignore[arg-type]
        # at the step that Lightning gives the figures
        classes, step = (fair.y, trainer.global_step) if split == "test" else (None, trainer.global_step - 1)
        for logger in trainer.loggers:
            if isinstance(logger, Tracker):
                logger.log_metrics(media(model, x, classes, pictures, seed), step)  # type: ignore[arg-type]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.draw(trainer, pl_module, "validation", ["samples", "reconstructions"])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            values = {name: float(trainer.callback_metrics[f"val/{name}"]) for name in UNITS}
            figures = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
            print(
                f"epoch {trainer.current_epoch + 1:3d}  step {trainer.global_step:6d}  validation: {figures}",
                flush=True,
            )

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.draw(trainer, pl_module, "test", PICTURES)
