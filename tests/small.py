"""Small files in the formats of the published sets, small models as overrides, and `train.py` called as a function."""

import sys
from pathlib import Path
from runpy import run_path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from vlae.datasets import MNIST, STATIC

ROOT = Path(__file__).parent.parent
CPU = ["trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "wandb.mode=disabled"]
TINY = [
    *["model.code=3", "model.encoder.widths=[4]", "model.encoder.hidden=8", "model.prior.depth=1"],
    *["model.prior.width=8", "model.decoder.features=4", "model.decoder.width=4", "model.decoder.depth=1"],
    *["model.decoder.widths=[4]", "model.decoder.hidden=8"],
]
DIGITS = [*CPU, *TINY, "model.likelihood.components=2", "data.batch_size=250", "trainer.log_every_n_steps=2"]


def write_files(root: Path, train: int = 160, test: int = 6) -> list[str]:
    """idx files of MNIST and .amat files of static MNIST with few images of noise; the overrides that accept them."""
    noise = np.random.default_rng(0)
    for name in MNIST:
        shape = (train if "train" in name else test, *([28, 28] if "images" in name else []))
        header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
        values = noise.integers(256 if "images" in name else 10, size=shape, dtype=np.uint8)
        (root / name).write_bytes(header + values.tobytes())
    for name in STATIC:
        np.savetxt(root / name, noise.integers(2, size=(train if "train" in name else test, 784)), fmt="%d")
    return [f"data.root={root}", "data.verify=false"]


def config(*overrides: str) -> dict[str, Any]:
    """The settings that `train.py` makes of a command line."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = OmegaConf.to_container(compose("config", list(overrides)), resolve=True)
    assert isinstance(composed, dict)
    return {str(key): value for key, value in composed.items() if key != "folder"}


def command(*overrides: str) -> None:
    """`python train.py *overrides` in this process."""
    before, sys.argv = sys.argv, [str(ROOT / "train.py"), *overrides]
    try:
        run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.argv = before
