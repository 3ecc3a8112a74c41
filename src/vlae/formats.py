"""The formats in which data sets are published: bytes to integer images and classes; ValueError for others."""

import re
from collections.abc import Iterable
from io import BytesIO

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from PIL import Image
from torch import Tensor

Pair = tuple[UInt8[Tensor, "N C H W"], Int64[Tensor, " N"] | None]


def idx(content: bytes) -> UInt8[Tensor, "..."]:
    """LeCun's idx format, bytes only: 0, 0, type 8, number of axes, their lengths as big-endian uint32, the values."""
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError("no idx file of bytes")
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:start], ">u4").astype(int)
    if len(content) - start != shape.prod():
        raise ValueError(f"{max(0, len(content) - start)} values instead of {' x '.join(map(str, shape))}")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


def amat(content: bytes) -> UInt8[Tensor, "N 1 28 28"]:
    """Text of 0 and 1, a row of 784 for each 28x28 image."""
    text = np.frombuffer(content, np.uint8)
    bits = text[text > ord(" ")] - ord("0")
    if bits.size == 0 or bits.size % 784 or bits.max() > 1:
        raise ValueError(f"{bits.size} symbols are no rows of 784 zeros and ones")
    return torch.from_numpy(bits.reshape(-1, 1, 28, 28))


def mat(content: bytes, names: list[str]) -> dict[str, np.ndarray]:
    """The arrays `names` of a MATLAB file."""
    from scipy.io import loadmat  # a quarter of a second, and only two sets need it

    try:
        found = loadmat(BytesIO(content), variable_names=names)
    except Exception as error:  # a broken file provokes errors of every kind in SciPy
        raise ValueError(f"no MATLAB file: {error}") from error
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"it has no array {', '.join(missing)}")
    return {name: found[name] for name in names}


def upright(values: np.ndarray, key: str) -> UInt8[Tensor, "N 1 28 28"]:
    """Rows of 784 values in [0, 1], column by column of an image, as 0..255."""
    if values.ndim != 2 or values.shape[1] != 784 or values.dtype.kind not in "fiub":
        raise ValueError(f"{key} is {values.dtype} of shape {values.shape}, not images of 784 values")
    if bad := int((~np.isfinite(values) | (values < 0) | (values > 1)).sum()):
        raise ValueError(f"{key} has {bad} values that are not a number or outside 0..1")
    grey = np.rint(255 * values.astype(np.float64)).astype(np.uint8)
    return torch.from_numpy(grey.reshape(-1, 1, 28, 28).swapaxes(2, 3).copy())


def chardata(content: bytes) -> list[Pair]:
    """Train and test of Burda's OMNIGLOT: grey levels 0..255 by columns of the arrays; classes are alphabets."""
    found = mat(content, ["data", "testdata", "target", "testtarget"])
    pairs: list[Pair] = []
    for prefix in ("", "test"):
        images = upright(found[f"{prefix}data"].T, f"{prefix}data")
        target = found[f"{prefix}target"]
        if target.ndim != 2 or target.shape[1] != len(images):
            raise ValueError(f"{prefix}target of shape {target.shape} does not fit {len(images)} images")
        pairs.append((images, torch.from_numpy(target.argmax(0).astype(np.int64))))
    return pairs


def silhouettes(content: bytes) -> list[Pair]:
    """Train, validation and test of the Caltech-101 silhouettes; 1 is the object, which the file writes as 0."""
    names = [f"{split}_{kind}" for split in ("train", "val", "test") for kind in ("data", "labels")]
    found = mat(content, names)
    pairs: list[Pair] = []
    for data, labels in zip(names[::2], names[1::2], strict=True):
        images, classes = upright(found[data], data), found[labels].reshape(-1)
        if len(classes) != len(images) or not set(images.unique().tolist()) <= {0, 255}:
            raise ValueError(f"{data} is not {len(classes)} images of 0 and 1")
        pairs.append(((images == 0).to(torch.uint8), torch.from_numpy(classes.astype(np.int64)) - 1))
    return pairs


def records(content: bytes) -> tuple[UInt8[Tensor, "N 3 32 32"], Int64[Tensor, " N"]]:
    """CIFAR-10's binary version: a byte for the class, then 1,024 of red, green and blue each."""
    if not content or len(content) % 3073:
        raise ValueError(f"{len(content)} bytes are no records of 3073")
    rows = torch.from_numpy(np.frombuffer(content, np.uint8).reshape(-1, 3073).copy())
    if rows[:, 0].max() > 9:
        raise ValueError(f"class {int(rows[:, 0].max())} where 0..9 are allowed")
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].long()


def drawings(
    files: Iterable[tuple[str, bytes]],
) -> tuple[Bool[np.ndarray, "N 105 105"], list[str], list[int]]:
    """OMNIGLOT's pictures among named files by character and drawer: paper (not ink), alphabets, drawers."""
    found: dict[tuple[int, int], tuple[str, np.ndarray]] = {}
    for name, content in files:
        if match := re.search(r"([^/]+)/character\d+/(\d{4})_(\d{2})\.png$", name):
            with Image.open(BytesIO(content), formats=["PNG"]) as image:
                if image.size != (105, 105) or image.mode != "1":
                    raise ValueError(f"{name} is {image.width}x{image.height} in mode {image.mode}, not 105x105 in 1")
                found[int(match[2]), int(match[3])] = match[1], np.asarray(image)
    if not found:
        raise ValueError("it has no <alphabet>/character<NN>/<character>_<drawer>.png")
    keys = sorted(found)
    return np.stack([found[key][1] for key in keys]), [found[key][0] for key in keys], [drawer for _, drawer in keys]


def averaged(ink: Bool[np.ndarray, "N 105 105"]) -> UInt8[Tensor, "N 1 28 28"]:
    """Share of ink in each of 28x28 equal areas as 0..255, exact but for that rounding."""
    # an output pixel is 15/4 pixels wide: in quarters, how far it overlaps each of them
    quarter = np.arange(420)
    overlap = np.zeros((28, 105), dtype=np.float32)
    np.add.at(overlap, (quarter // 15, quarter // 4), 1)
    grey = np.empty((len(ink), 1, 28, 28), dtype=np.uint8)
    for start in range(0, len(ink), 1024):  # floats of all the pictures would take more than a gigabyte
        share = overlap @ ink[start : start + 1024].astype(np.float32) @ overlap.T
        grey[start : start + 1024, 0] = np.rint(share * (255 / 225))
    return torch.from_numpy(grey)
