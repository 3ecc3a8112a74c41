"""Data sets: one function each, from the folder of the files to `Splits`; another set is another such function."""

import gzip
import hashlib
import lzma
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor


class Part(NamedTuple):
    """One split: integer images, and a class for each where the set has classes."""

    images: UInt8[Tensor, "N C H W"]
    labels: Int64[Tensor, " N"] | None = None


class Splits(NamedTuple):
    """A data set. `levels` values a pixel, 0 to levels - 1; where `dynamic`, `images` hold grey levels 0..255 and
    what the model sees are draws of Bernoulli(grey / 255), so `levels` is 2."""

    train: Part
    validation: Part
    test: Part
    levels: int
    dynamic: bool = False


def default_root() -> Path:
    """Where data are looked for and kept: VLAE_DATA_DIR, else the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("VLAE_DATA_DIR") or Path(cache) / "vlae").expanduser()


def digits(root: Path, verify: bool = True) -> Splits:
    """scikit-learn's 1,797 digits of 8x8 pixels and 17 levels, 1,297 / 250 / 250; needs no files."""
    from sklearn.datasets import load_digits  # seconds to import, and only this set needs it

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images.astype(np.uint8)).view(-1, 1, 8, 8)
    y = torch.from_numpy(labels.astype(np.int64))
    # the set is ordered by writer; RandomState's streams are frozen, so every version draws the same splits
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(x)))
    train, validation, test = (Part(x[i], y[i]) for i in order.split([len(x) - 500, 250, 250]))
    return Splits(train, validation, test, levels=17)


MNIST = {  # MD5 of the four files unpacked
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def mnist_grey(root: Path, verify: bool = True) -> Splits:
    """MNIST (LeCun and Cortes) with 256 levels: 50,000 / 10,000 / 10,000, validation the last sixth of the 60,000."""
    places = [root, root / "mnist", root / "MNIST" / "raw", root / "raw"]
    source = "http://yann.lecun.com/exdb/mnist"
    train_x, train_y, test_x, test_y = (
        read(places, name, idx, source, md5 if verify else None) for name, md5 in MNIST.items()
    )
    for x, y in ((train_x, train_y), (test_x, test_y)):
        if x.ndim != 3 or y.shape != x.shape[:1]:
            raise ValueError(f"MNIST under {root}: {tuple(y.shape)} labels do not fit images {tuple(x.shape)}")
    cut = len(train_x) - len(train_x) // 6
    x, y = train_x[:, None], train_y.long()
    test = Part(test_x[:, None], test_y.long())
    return Splits(Part(x[:cut], y[:cut]), Part(x[cut:], y[cut:]), test, levels=256)


def mnist(root: Path, verify: bool = True) -> Splits:
    """MNIST binarised anew each time a training image is seen (Burda et al. 2015); the files of `mnist_grey`."""
    return mnist_grey(root, verify)._replace(levels=2, dynamic=True)


STATIC = {  # MD5 of the text
    "binarized_mnist_train.amat": "db28b1a6ae0fe70cbd3da91acf46e477",
    "binarized_mnist_valid.amat": "bf37822a04e94123630de6a7dfd9c9ef",
    "binarized_mnist_test.amat": "14e41ae11040adba6ab8cb291eda0dd8",
}


def mnist_static(root: Path, verify: bool = True) -> Splits:
    """MNIST binarised once (Larochelle and Murray 2011), 50,000 / 10,000 / 10,000; no labels."""
    places = [root, root / "binarized_mnist"]
    source = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist"
    train, validation, test = (
        Part(read(places, name, amat, source, md5 if verify else None)) for name, md5 in STATIC.items()
    )
    return Splits(train, validation, test, levels=2)


def read(
    places: list[Path], name: str, parse: Callable[[bytes], np.ndarray], source: str, md5: str | None
) -> UInt8[Tensor, "..."]:
    """The array in the first of `places` that holds `name`, plain, .gz or .xz.

    `md5` is that of the unpacked content; None accepts any. FileNotFoundError when no place has the file, ValueError
    when it is cut short, of another format or not the published one.
    """
    unpack: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.decompress, ".xz": lzma.decompress}
    found = [(place / (name + end), end) for place in places for end in unpack if (place / (name + end)).is_file()]
    if not found:
        where = ", ".join(map(str, places))
        raise FileNotFoundError(f"no {name} (nor .gz, .xz) in {where}; it comes from {source}; set data.root")
    path, end = found[0]
    try:
        content = unpack[end](path.read_bytes())
        if md5 and (have := hashlib.md5(content, usedforsecurity=False).hexdigest()) != md5:
            raise ValueError(f"MD5 of the content is {have}, the published file has {md5}; data.verify=false takes any")
        return torch.from_numpy(parse(content))
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{path} is damaged or another file ({error}); get it from {source}") from error


def idx(content: bytes) -> np.ndarray:
    """LeCun's idx format, bytes only: 0, 0, type 8, number of axes, their lengths as big-endian uint32, the values."""
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError("no idx file of bytes")
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:start], ">u4").astype(int)
    if len(content) - start != shape.prod():
        raise ValueError(f"{max(0, len(content) - start)} values instead of {' x '.join(map(str, shape))}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


def amat(content: bytes) -> np.ndarray:
    """Text of 0 and 1, a row of 784 for each 28x28 image."""
    text = np.frombuffer(content, np.uint8)
    bits = text[text > ord(" ")] - ord("0")
    if bits.size == 0 or bits.size % 784 or bits.max() > 1:
        raise ValueError(f"{bits.size} symbols are no rows of 784 zeros and ones")
    return bits.reshape(-1, 1, 28, 28)
