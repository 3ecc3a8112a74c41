"""Weights & Biases: a run's curves, settings and pictures in a dashboard."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import Logger

from vlae.schema import check


def wandb_logger(
    *, mode: Literal["offline", "online", "disabled"], project: str, group: str | None, folder: Path
) -> list[Logger]:
    """No logger where `mode` is disabled."""
    if mode == "disabled":
        return []
    os.environ.setdefault("WANDB_SILENT", "true")  # read at import
    try:
        import wandb  # noqa: F401
        from lightning.pytorch.loggers import WandbLogger
    except ImportError as error:
        raise ValueError(f"wandb.mode={mode}: wandb is not installed; install it or set wandb.mode=disabled") from error
    return [WandbLogger(project=project, name=folder.name, group=group, save_dir=folder, offline=mode == "offline")]


@contextmanager
def tracked(settings: dict[str, Any], folder: Path) -> Iterator[list[Logger]]:
    """The loggers of one run, which ends with the block."""
    check(wandb_logger, settings, "wandb", supplied=("folder",))
    loggers = wandb_logger(**settings, folder=folder)
    try:
        yield loggers
    finally:
        if loggers:  # or the next run of a sweep would go on in this one's dashboard
            sys.modules["wandb"].finish()
