"""Data sets: one function each, from the folder of the files to `Splits`; another set is another such function."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from vlae.files import Remote, check, find, members, reading, unpack, wayback
from vlae.formats import amat, averaged, chardata, drawings, idx, records, silhouettes


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


def only(part: Part, chosen: Sequence[bool] | np.ndarray) -> Part:
    index = torch.from_numpy(np.flatnonzero(chosen))
    return Part(part.images[index], None if part.labels is None else part.labels[index])


def held_out(part: Part, share: float, seed: int) -> tuple[Part, Part]:
    """A split without a share of it that the seed draws, and that share."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"data.split_seed={seed}: must be from 0 to 2**32 - 1")
    rank = np.random.RandomState(seed).permutation(len(part.images))  # its streams are frozen, unlike default_rng's
    out = rank < round(share * len(rank))
    return only(part, ~out), only(part, out)


def digits(root: Path) -> Splits:
    """scikit-learn's 1,797 digits of 8x8 pixels and 17 levels, 1,297 / 250 / 250; needs no files."""
    from sklearn.datasets import load_digits  # seconds to import, and only this set needs it

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images.astype(np.uint8)).view(-1, 1, 8, 8)
    y = torch.from_numpy(labels.astype(np.int64))
    # the set is ordered by writer; RandomState's streams are frozen, so every version draws the same splits
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(x)))
    train, validation, test = (Part(x[i], y[i]) for i in order.split([len(x) - 500, 250, 250]))
    return Splits(train, validation, test, levels=17)


ARCHIVES = (".zip", ".tar.gz", ".tar.xz", ".tar.bz2", ".tar")
MNIST = {  # MD5 of the four files unpacked, and as they are served
    "train-images-idx3-ubyte": ("6bbc9ace898e44ae57da46a324031adb", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
    "train-labels-idx1-ubyte": ("a25bea736e30d166cdddb491f175f624", "d53e105ee54ea40749a09fcbcd1e9432"),
    "t10k-images-idx3-ubyte": ("2646ac647ad5339dbf082846283269ea", "9fb629c4189551a2d022fa330f9573f3"),
    "t10k-labels-idx1-ubyte": ("27ae3e4e09519cfbb04c329615203637", "ec29112dd5afa0611ce80d1b7f02629c"),
}


def mnist_grey(root: Path, verify: bool = True) -> Splits:
    """MNIST (LeCun and Cortes) with 256 levels: 50,000 / 10,000 / 10,000, validation the last sixth of the 60,000."""
    sites = ("http://yann.lecun.com/exdb/mnist/", "https://ossci-datasets.s3.amazonaws.com/mnist/")
    tensors = []
    for name, (content, served) in MNIST.items():
        remote = Remote("mnist", f"{name}.gz", tuple(f"{site}{name}.gz" for site in sites), f"md5:{served}")
        tensors.append(read(root, ("mnist", "MNIST/raw", "raw"), name, remote, idx, f"md5:{content}", verify))
    train_x, train_y, test_x, test_y = tensors
    for x, y in ((train_x, train_y), (test_x, test_y)):
        if x.ndim != 3 or y.shape != x.shape[:1]:
            raise ValueError(f"MNIST below {root}: {tuple(y.shape)} labels do not fit images {tuple(x.shape)}")
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
    site = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"
    parts: list[Part] = []
    for name, content in STATIC.items():
        remote = Remote("binarized_mnist", name, (site + name, wayback(site + name)), f"md5:{content}")
        parts.append(Part(read(root, ("binarized_mnist",), name, remote, amat, f"md5:{content}", verify)))
    train, validation, test = parts
    return Splits(train, validation, test, levels=2)


def omniglot(root: Path, verify: bool = True, split_seed: int = 0) -> Splits:
    """OMNIGLOT in 28x28 as Burda et al. (2015) prepared it, binarised anew each time a training image is seen:
    23,000 / 1,345 / 8,070, validation drawn from the 24,345; classes are alphabets, upright.

    Grey levels are rounded to 255ths.
    """
    url = "https://github.com/yburda/iwae/raw/master/datasets/OMNIGLOT/chardata.mat"
    checksum = "git:016a3536ffe5e1d38e42563a18d7a78bfaf643ec"
    remote = Remote("omniglot", "chardata.mat", (url, wayback(url)), checksum)
    pairs = read(root, ("omniglot", "OMNIGLOT"), "chardata.mat", remote, chardata, checksum, verify)
    train, test = (Part(*pair) for pair in pairs)
    return Splits(*held_out(train, OMNIGLOT_VALIDATION, split_seed), test, levels=2, dynamic=True)


OMNIGLOT_VALIDATION = 1345 / 24345  # Tomczak and Welling (2018)
OMNIGLOT = {  # SHA-256 of the bits in the order of characters and drawers, however the pictures are packed; of the zip
    "background": (
        "50ac3e2043f457516ed8e84151b2d85718f4bbccc0a17ad355cd3b6f0c4ed5f3",
        "68d2efa1b9178cc56df9314c21c6e718",
    ),
    "evaluation": (
        "03b046317776af65e56eb1a168e35feb5e254765b51ce5fd1383ec242a5767f3",
        "6b91aef0f799c5bb55b94e3f2daec811",
    ),
}


def omniglot_original(root: Path, verify: bool = True, split_seed: int = 0) -> Splits:
    """OMNIGLOT's 105x105 originals (Lake et al. 2015) averaged over areas to 28x28, binarised anew each time a training
    image is seen. Of each of the 1,623 characters drawers 1-15 train, 1,345 of these images being validation, and
    drawers 16-20 test: 23,000 / 1,345 / 8,115; classes are the 50 alphabets.

    Not comparable with published numbers, which are of `omniglot`: another rendering, another split.
    """
    grey, alphabets, drawers = [], [], []
    for half, (content, served) in OMNIGLOT.items():
        name = f"images_{half}"
        url = f"https://github.com/brendenlake/omniglot/raw/master/python/{name}.zip"
        remote = Remote("omniglot", f"{name}.zip", (url, wayback(url)), f"md5:{served}")
        path = find(root, ("", "omniglot", "omniglot-py"), [name, *(name + end for end in ARCHIVES)], remote)
        with reading(path, remote):
            paper, written_in, drawn_by = drawings(members(path))
            if verify:
                check(np.packbits(paper).tobytes(), f"sha256:{content}")
        grey.append(averaged(~paper))
        alphabets += [(half, alphabet) for alphabet in written_in]
        drawers += drawn_by
    number = {alphabet: k for k, alphabet in enumerate(dict.fromkeys(alphabets))}
    whole = Part(torch.cat(grey), torch.tensor([number[alphabet] for alphabet in alphabets]))
    early = np.array(drawers) <= 15
    train = held_out(only(whole, early), OMNIGLOT_VALIDATION, split_seed)
    return Splits(*train, only(whole, ~early), levels=2, dynamic=True)


def caltech101(root: Path, verify: bool = True) -> Splits:
    """Caltech-101 silhouettes (Marlin et al. 2010), 28x28, split 1: 4,100 / 2,264 / 2,307; 1 is the object, upright."""
    name, checksum = "caltech101_silhouettes_28_split1.mat", "md5:4483e9c14b188fd09937f9ea6f9ea777"
    url = f"https://people.cs.umass.edu/~marlin/data/{name}"
    remote = Remote("caltech101_silhouettes", name, (url, wayback(url)), checksum)
    places = ("caltech101_silhouettes", "Caltech101Silhouettes")
    pairs = read(root, places, name, remote, silhouettes, checksum, verify)
    train, validation, test = (Part(*pair) for pair in pairs)
    return Splits(train, validation, test, levels=2)


CIFAR10 = {  # MD5 of each batch
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
}


def cifar10(root: Path, verify: bool = True) -> Splits:
    """CIFAR-10 (Krizhevsky 2009) from its binary version, 256 levels: 45,000 / 5,000 / 10,000, validation the last
    tenth of the 50,000."""
    urls = (
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/cifar-10-binary.tar.gz",
    )
    remote = Remote("cifar10", "cifar-10-binary.tar.gz", urls, "md5:c32a1d4ab5d03f1284b67883e8d87530")
    names = ["cifar-10-batches-bin", *(f"cifar-10-binary{end}" for end in ARCHIVES)]
    path = find(root, ("", "cifar10"), names, remote)
    with reading(path, remote):
        named = ((name.rsplit("/", 1)[-1], content) for name, content in members(path))
        found = {name: content for name, content in named if name in CIFAR10}
        if missing := [name for name in CIFAR10 if name not in found]:
            raise ValueError(f"it has no {', '.join(missing)}")
        if verify:
            for name, md5 in CIFAR10.items():
                check(found[name], f"md5:{md5}")
        *batches, test = (records(found[name]) for name in CIFAR10)
    x, y = (torch.cat([part[k] for part in batches]) for k in range(2))
    cut = len(x) - len(x) // 10
    return Splits(Part(x[:cut], y[:cut]), Part(x[cut:], y[cut:]), Part(*test), levels=256)


def read(
    root: Path,
    places: tuple[str, ...],
    name: str,
    remote: Remote,
    parse: Callable[[bytes], Any],
    checksum: str,
    verify: bool,
) -> Any:
    """What `parse` makes of the file `name`, plain, .gz or .xz, in `root` or its folders `places`, else of `remote`.

    `checksum` is that of the unpacked content; without `verify` any will do.

    Raises:
        FileNotFoundError: if it is not there and cannot be downloaded.
        ValueError: if it is cut short, of another format, or not the published one.
    """
    path = find(root, ("", *places), (name, f"{name}.gz", f"{name}.xz"), remote)
    with reading(path, remote):
        content = unpack(path)
        if verify:
            check(content, checksum)
        return parse(content)


SETS = (digits, mnist, mnist_grey, mnist_static, omniglot, omniglot_original, caltech101, cifar10)
