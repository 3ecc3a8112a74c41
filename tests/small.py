"""Small files in the formats of the published sets, small models as overrides, and `train.py` called as a function."""

import sys
from itertools import product
from pathlib import Path
from runpy import run_path
from typing import Any

import numpy as np
import scipy.io
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from vlae.datasets import CIFAR10, MNIST, STATIC

ROOT = Path(__file__).parent.parent
CPU = ["trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "wandb.mode=disabled"]
TINY = [
    *["model.code=3", "model.encoder.widths=[4]", "model.encoder.hidden=8", "model.prior.depth=1"],
    *["model.prior.width=8", "model.decoder.features=4", "model.decoder.width=4", "model.decoder.depth=1"],
    *["model.decoder.widths=[4]", "model.decoder.hidden=8"],
]
DIGITS = [*CPU, *TINY, "model.likelihood.components=2", "data.batch_size=250", "trainer.log_every_n_steps=2"]


def write_files(root: Path, train: int = 160, test: int = 2) -> None:
    """Few images of noise in the format of every set, and `pictures/` of two classes."""
    noise = np.random.default_rng(0)
    for name in MNIST:
        shape = (train if "train" in name else test, *([28, 28] if "images" in name else []))
        header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
        values = noise.integers(256 if "images" in name else 10, size=shape, dtype=np.uint8)
        (root / name).write_bytes(header + values.tobytes())
    for name in STATIC:
        np.savetxt(root / name, noise.integers(2, size=(train if "train" in name else test, 784)), fmt="%d")
    write_chardata(root, train, test)
    write_silhouettes(root, train, test)
    write_cifar10(root / "cifar-10-batches-bin", train // 5, test)
    for half, first in (("background", 1), ("evaluation", 6)):
        write_drawings(root / f"images_{half}", first, characters=5)
    for number, values in enumerate(noise.integers(256, size=(train, 9, 12, 3), dtype=np.uint8)):
        path = root / "pictures" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(path)


def overrides(data: str, root: Path) -> list[str]:
    """What makes the set `data` read what `write_files` wrote."""
    mine = {"digits": [], "images": [f"data.folder={root / 'pictures'}", "data.height=8"]}
    return mine.get(data, [f"data.root={root}", "data.verify=false"])


def write_chardata(root: Path, train: int, test: int) -> dict[str, np.ndarray]:
    """OMNIGLOT's file with 50 alphabets; returns its arrays."""
    noise = np.random.default_rng(1)
    arrays = {}
    for prefix, n in (("", train), ("test", test)):
        arrays[f"{prefix}data"] = noise.random((784, n))
        arrays[f"{prefix}target"] = np.eye(50)[:, noise.integers(50, size=n)]
    scipy.io.savemat(root / "chardata.mat", arrays)
    return arrays


def write_silhouettes(root: Path, train: int, test: int) -> dict[str, np.ndarray]:
    """The file of the Caltech-101 silhouettes; returns its arrays."""
    noise = np.random.default_rng(2)
    arrays = {}
    for split, n in (("train", train), ("val", test), ("test", test)):
        arrays[f"{split}_data"] = noise.integers(2, size=(n, 784), dtype=np.uint8)
        arrays[f"{split}_labels"] = noise.integers(1, 102, size=(n, 1), dtype=np.uint8)
    scipy.io.savemat(root / "caltech101_silhouettes_28_split1.mat", arrays)
    return arrays


def write_cifar10(folder: Path, train: int, test: int) -> list[np.ndarray]:
    """CIFAR-10's six batches of records; returns them."""
    noise = np.random.default_rng(3)
    folder.mkdir(parents=True, exist_ok=True)
    batches = [noise.integers(256, size=(test if "test" in name else train, 3073), dtype=np.uint8) for name in CIFAR10]
    for name, batch in zip(CIFAR10, batches, strict=True):
        batch[:, 0] %= 10
        (folder / name).write_bytes(batch.tobytes())
    return batches


def write_drawings(folder: Path, first: int, characters: int) -> np.ndarray:
    """A half of OMNIGLOT's pictures, two characters an alphabet; returns the ink by character and drawer."""
    ink = np.random.default_rng(first).random((characters, 20, 105, 105)) < 0.1
    for k, drawer in product(range(characters), range(20)):
        path = folder / f"Alphabet_{k // 2}" / f"character{k % 2 + 1:02d}" / f"{first + k:04d}_{drawer + 1:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(~ink[k, drawer]).save(path)
    return ink


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
