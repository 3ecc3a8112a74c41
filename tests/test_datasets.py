"""Files become the images they hold, in every layout; anything else is refused by name."""

import gzip
import hashlib
import lzma
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from small import write_chardata, write_cifar10, write_drawings, write_silhouettes

from vlae.datasets import (
    CIFAR10,
    MNIST,
    Part,
    Splits,
    caltech101,
    cifar10,
    default_root,
    digits,
    held_out,
    mnist,
    mnist_grey,
    mnist_static,
    omniglot,
    omniglot_original,
)
from vlae.formats import amat, averaged, chardata, records, silhouettes
from vlae.formats import idx as read_idx

PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}
SETS = [mnist_grey, mnist, mnist_static, omniglot, omniglot_original, caltech101, cifar10]


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def write_idx(folder: Path, end: str = ".gz") -> list[np.ndarray]:
    """Twelve training and five test images in MNIST's format; returns them with their labels."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    arrays = [
        draw.integers(0, high, shape, dtype=np.uint8)
        for n in (12, 5)
        for high, shape in ((256, (n, 28, 28)), (10, (n,)))
    ]
    for name, array in zip(MNIST, arrays, strict=True):
        (folder / (name + end)).write_bytes(PACK[end](idx(array)))
    return arrays


def write_amat(folder: Path, end: str = ".xz", newline: str = "\n") -> list[np.ndarray]:
    """Six, three and two images in the format of static MNIST."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    arrays = [draw.integers(0, 2, (n, 1, 28, 28), dtype=np.uint8) for n in (6, 3, 2)]
    for name, array in zip(("train", "valid", "test"), arrays, strict=True):
        text = newline.join(" ".join(map(str, row)) for row in array.reshape(-1, 784)) + newline
        (folder / f"binarized_mnist_{name}.amat{end}").write_bytes(PACK[end](text.encode()))
    return arrays


def content(splits: Splits) -> str:
    """A fingerprint of the images of each split."""
    return hashlib.md5(b"".join(part.images.numpy().tobytes() for part in splits[:3])).hexdigest()


@pytest.mark.parametrize("place", [".", "mnist", "MNIST/raw", "raw"])
@pytest.mark.parametrize("end", PACK)
def test_mnist_is_read_from_every_layout(tmp_path: Path, place: str, end: str) -> None:
    x, y, test_x, test_y = write_idx(tmp_path / place, end)
    splits = mnist_grey(tmp_path, verify=False)
    found = [part.images[:, 0].numpy() for part in splits[:3]], [part.labels.numpy() for part in splits[:3]]
    for have, want in zip(found, (([x[:10], x[10:], test_x]), ([y[:10], y[10:], test_y])), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(have, want, strict=True))
    assert (splits.levels, splits.dynamic) == (256, False)
    assert (mnist(tmp_path, verify=False).levels, mnist(tmp_path, verify=False).dynamic) == (2, True)


@pytest.mark.parametrize("place", [".", "binarized_mnist"])
@pytest.mark.parametrize("end", PACK)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_static_mnist_is_read_from_every_layout(tmp_path: Path, place: str, end: str, newline: str) -> None:
    arrays = write_amat(tmp_path / place, end, newline)
    splits = mnist_static(tmp_path, verify=False)
    assert all(np.array_equal(part.images, array) for part, array in zip(splits[:3], arrays, strict=True))
    assert all(part.labels is None for part in splits[:3])
    assert (splits.levels, splits.dynamic) == (2, False)


@pytest.mark.parametrize("dataset", SETS)
def test_a_missing_file_that_nobody_serves(tmp_path: Path, dataset: Callable[..., Splits], hurried: None) -> None:
    with pytest.raises(FileNotFoundError) as error:
        dataset(tmp_path)
    assert all(word in str(error.value) for word in (f"below {tmp_path}", "http", "ProxyError", "data.root"))


@pytest.mark.parametrize("dataset", SETS)
def test_a_file_that_is_not_the_published_one_is_refused(tmp_path: Path, dataset: Callable[..., Splits]) -> None:
    write_idx(tmp_path)
    write_amat(tmp_path)
    write_chardata(tmp_path, 4, 2)
    write_silhouettes(tmp_path, 4, 2)
    write_cifar10(tmp_path / "cifar-10-batches-bin", 2, 2)
    write_drawings(tmp_path / "images_background", 1, 1)
    with pytest.raises(ValueError, match=r"checksum \w+, the published one is \w+\); get it from http"):
        dataset(tmp_path)


@pytest.mark.parametrize("end", PACK)
@pytest.mark.parametrize("cut", [0, 2, 10, 40, -3])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, end: str, cut: int) -> None:
    for write, name, dataset in (
        (write_idx, "t10k-images-idx3-ubyte", mnist_grey),
        (write_amat, "binarized_mnist_test.amat", mnist_static),
    ):
        write(tmp_path, end)
        path = tmp_path / (name + end)
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(ValueError, match=f"{name}.* is damaged or another file"):
            dataset(tmp_path, verify=False)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("train-images-idx3-ubyte", b"<html>404</html>"),
        ("train-images-idx3-ubyte", idx(np.zeros((3, 4), np.uint8))),  # too few axes
        ("train-images-idx3-ubyte", idx(np.zeros((3, 4, 4), np.uint8))),  # other number than the labels
        ("train-images-idx3-ubyte", b"\0\0\x0d" + idx(np.zeros((12, 1, 1), np.uint8))[3:]),  # floats
    ],
)
def test_other_content_is_refused(tmp_path: Path, name: str, text: bytes) -> None:
    write_idx(tmp_path, end="")
    (tmp_path / name).write_bytes(text)
    with pytest.raises(ValueError, match=r"train-images|labels do not fit images"):
        mnist_grey(tmp_path, verify=False)


@pytest.mark.parametrize("text", [b"", b"0 1 2", b"0 1 " * 391, b"2 " * 784, b"<html>404</html>"])
def test_other_text_is_refused(tmp_path: Path, text: bytes) -> None:
    write_amat(tmp_path, end="")
    (tmp_path / "binarized_mnist_valid.amat").write_bytes(text)
    with pytest.raises(ValueError, match=r"valid\.amat is damaged or another file"):
        mnist_static(tmp_path, verify=False)


@pytest.mark.parametrize("place", [".", "omniglot", "OMNIGLOT"])
def test_chardata(tmp_path: Path, place: str) -> None:
    """Columns of the arrays are images by columns; levels in [0, 1]; a row for each class."""
    (tmp_path / place).mkdir(exist_ok=True)
    arrays = write_chardata(tmp_path / place, train=40, test=5)
    splits = omniglot(tmp_path, verify=False)
    assert (len(splits.train.images), len(splits.validation.images), splits.levels, splits.dynamic) == (38, 2, 2, True)
    train, test = chardata((tmp_path / place / "chardata.mat").read_bytes())
    for (images, labels), prefix in ((train, ""), (test, "test")):
        for n in range(len(images)):
            for i, j in ((0, 0), (0, 27), (27, 0), (3, 11), (11, 3)):
                assert images[n, 0, i, j] == round(255 * arrays[f"{prefix}data"][28 * j + i, n])
            assert arrays[f"{prefix}target"][labels[n], n] == 1
    assert torch.equal(splits.test.images, test[0])
    rows = sorted(image.flatten().tolist() for part in splits[:2] for image in part.images)
    assert rows == sorted(train[0].flatten(1).tolist())


@pytest.mark.parametrize("place", [".", "caltech101_silhouettes", "Caltech101Silhouettes"])
def test_silhouettes(tmp_path: Path, place: str) -> None:
    (tmp_path / place).mkdir(exist_ok=True)
    arrays = write_silhouettes(tmp_path / place, train=6, test=3)
    splits = caltech101(tmp_path, verify=False)
    for part, split in zip(splits[:3], ("train", "val", "test"), strict=True):
        for n, row in enumerate(arrays[f"{split}_data"]):
            upright = [[1 - row[28 * j + i] for j in range(28)] for i in range(28)]
            assert part.images[n, 0].tolist() == upright
        assert part.labels.tolist() == [label - 1 for (label,) in arrays[f"{split}_labels"].tolist()]
    assert (splits.levels, splits.dynamic) == (2, False)


@pytest.mark.parametrize("layout", ["cifar-10-batches-bin", "cifar10/cifar-10-batches-bin", "x.tar.gz", "x.zip"])
def test_cifar10_is_read_from_every_layout(tmp_path: Path, layout: str) -> None:
    folder = tmp_path / (layout if "." not in layout else "made/cifar-10-batches-bin")
    batches = write_cifar10(folder, train=4, test=3)
    if "." in layout:
        kind = {"x.tar.gz": "gztar", "x.zip": "zip"}[layout]
        shutil.make_archive(str(tmp_path / "cifar10" / "cifar-10-binary"), kind, tmp_path / "made")
    splits = cifar10(tmp_path, verify=False)
    rows = np.concatenate(batches[:5])
    assert [len(part.images) for part in splits[:3]] == [18, 2, 3]
    for part, want in zip(splits[:3], (rows[:18], rows[18:], batches[5]), strict=True):
        assert part.labels.tolist() == want[:, 0].tolist()
        for image, row in zip(part.images, want, strict=True):
            for c, i, j in ((0, 0, 0), (0, 0, 1), (1, 0, 0), (2, 31, 5)):
                assert image[c, i, j] == row[1 + 1024 * c + 32 * i + j]
    assert (splits.levels, splits.dynamic) == (256, False)


@pytest.mark.parametrize("layout", ["", "omniglot", "omniglot-py", "zip"])
def test_drawings_are_split_by_drawer(tmp_path: Path, layout: str) -> None:
    folder = tmp_path / ("omniglot" if layout == "zip" else layout)
    ink = np.concatenate(
        [write_drawings(folder / f"images_{h}", f, 3) for h, f in (("background", 1), ("evaluation", 4))]
    )
    if layout == "zip":
        for half in ("background", "evaluation"):
            shutil.make_archive(str(folder / f"images_{half}"), "zip", folder, f"images_{half}")
            shutil.rmtree(folder / f"images_{half}")
    splits = omniglot_original(tmp_path, verify=False)
    assert [len(part.images) for part in splits[:3]] == [85, 5, 30]
    # exact: every pixel as 4x4 of a quarter's width, then blocks of 15x15
    fine = ink.reshape(-1, 105, 105).repeat(4, 1).repeat(4, 2)
    grey = np.rint(255 * fine.reshape(-1, 28, 15, 28, 15).mean((2, 4))).astype(int).reshape(6, 20, 784)
    assert splits.test.images.flatten(1).tolist() == grey[:, 15:].reshape(-1, 784).tolist()
    assert splits.test.labels.tolist() == [0] * 10 + [1] * 5 + [2] * 10 + [3] * 5  # two characters an alphabet
    rows = sorted(image.flatten().tolist() for part in splits[:2] for image in part.images)
    assert rows == sorted(grey[:, :15].reshape(-1, 784).tolist())
    assert (splits.levels, splits.dynamic) == (2, True)


def test_ink_is_averaged_over_areas() -> None:
    white, one = np.zeros((2, 105, 105), dtype=bool)
    one[3, 0] = True  # three of its four quarters lie in the first pixel
    assert averaged(np.stack([white, ~white, one])).flatten(1)[:, [0, 28, 1]].tolist() == [
        [0, 0, 0],
        [255, 255, 255],
        [round(255 * 12 / 225), round(255 * 4 / 225), 0],
    ]


def test_other_seeds_are_refused() -> None:
    part = Part(torch.zeros(9, 1, 1, 1, dtype=torch.uint8))
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=rf"data\.split_seed={seed}: must be from 0"):
            held_out(part, 0.5, seed)


def test_held_out_images_depend_on_the_seed_alone() -> None:
    part = Part(torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1), torch.arange(100))
    (rest, out), (_, again), (_, other) = held_out(part, 0.13, 1), held_out(part, 0.13, 1), held_out(part, 0.13, 2)
    assert len(out.images) == 13
    assert sorted([*rest.labels.tolist(), *out.labels.tolist()]) == list(range(100))
    assert out.images.flatten().tolist() == out.labels.tolist() == again.labels.tolist() != other.labels.tolist()


MATS: list[tuple[str, Callable[[bytes], object], dict[str, object], str]] = [
    ("NaN", chardata, {"data": np.full((784, 4), np.nan)}, "data has 3136 values that are not a number"),
    ("grey", chardata, {"testdata": np.full((784, 2), 2.0)}, "testdata has 1568 values that are .* outside 0..1"),
    ("rows", chardata, {"data": np.zeros((4, 784))}, r"data is float64 of shape \(784, 4\)"),
    ("text", chardata, {"data": "abc"}, "data is .*not images"),
    ("labels", chardata, {"target": np.zeros((50, 3))}, "target of shape .* does not fit 4 images"),
    ("no labels", chardata, {"testtarget": None}, "no array testtarget"),
    ("grey", silhouettes, {"val_data": np.full((2, 784), 0.5)}, "val_data is not 2 images of 0 and 1"),
    ("shape", silhouettes, {"test_data": np.zeros((2, 256))}, "test_data is .*256"),
    ("labels", silhouettes, {"train_labels": np.ones((3, 1))}, "train_data is not 3 images"),
    ("no labels", silhouettes, {"train_labels": None}, "no array train_labels"),
]


@pytest.mark.parametrize(("parse", "change", "found"), [case[1:] for case in MATS], ids=[case[0] for case in MATS])
def test_other_arrays_are_refused(
    tmp_path: Path, parse: Callable[[bytes], object], change: dict[str, object], found: str
) -> None:
    write = write_chardata if parse is chardata else write_silhouettes
    arrays = {key: value for key, value in {**write(tmp_path, 4, 2), **change}.items() if value is not None}
    file = BytesIO()
    scipy.io.savemat(file, arrays)
    with pytest.raises(ValueError, match=found):
        parse(file.getvalue())
    for content in (b"", b"<html>", file.getvalue()[:200], file.getvalue()[:-200]):
        with pytest.raises(ValueError, match=r"no MATLAB file|no array|is "):
            parse(content)


def test_other_records_are_refused(tmp_path: Path) -> None:
    for content in (b"", bytes(3072), bytes(2 * 3073 + 1)):
        with pytest.raises(ValueError, match=f"{len(content)} bytes are no records of 3073"):
            records(content)
    with pytest.raises(ValueError, match="class 10 where"):
        records(bytes([10]) + bytes(3072))
    write_cifar10(tmp_path / "cifar-10-batches-bin", 1, 1)
    (tmp_path / "cifar-10-batches-bin" / next(iter(CIFAR10))).unlink()
    with pytest.raises(ValueError, match=r"cifar-10-batches-bin is damaged .*it has no data_batch_1\.bin.*http"):
        cifar10(tmp_path, verify=False)


def test_other_drawings_are_refused(tmp_path: Path) -> None:
    write_drawings(tmp_path / "images_evaluation", 4, 1)
    (tmp_path / "images_background").mkdir()
    with pytest.raises(ValueError, match=r"images_background is damaged .*it has no <alphabet>"):
        omniglot_original(tmp_path, verify=False)
    write_drawings(tmp_path / "images_background", 1, 1)
    file = tmp_path / "images_background" / "Alphabet_0" / "character01" / "0001_07.png"
    Image.new("1", (28, 28)).save(file)
    with pytest.raises(ValueError, match=r"background is damaged .*0001_07\.png is 28x28 in mode 1, not 105x105"):
        omniglot_original(tmp_path, verify=False)
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match="images_background is damaged"):
        omniglot_original(tmp_path, verify=False)


@pytest.mark.parametrize("parse", [read_idx, amat, chardata, silhouettes, records])
def test_noise_is_refused(parse: Callable[[bytes], object]) -> None:
    noise = np.random.default_rng(0)
    for size in (1, 7, 100, 3073, 5000):
        with pytest.raises(ValueError, match=r"no idx file|no rows of|no MATLAB file|no records|class"):
            parse(b"\xff" + noise.integers(256, size=size - 1, dtype=np.uint8).tobytes())


def test_digits_need_no_files() -> None:
    splits = digits(Path("no such folder"))
    assert [len(part.images) for part in splits[:3]] == [len(part.labels) for part in splits[:3]] == [1297, 250, 250]
    assert all(part.images.shape[1:] == (1, 8, 8) and part.images.dtype == torch.uint8 for part in splits[:3])
    assert (
        torch.cat([part.images for part in splits[:3]]).unique().tolist() == list(range(17)) == [*range(splits.levels)]
    )
    assert content(splits) == content(digits(Path()))
    assert all(len(part.labels.unique()) == 10 for part in splits[:3])
    # whole and disjoint: the multiset of (image, label) is scikit-learn's
    from sklearn.datasets import load_digits

    rows = torch.cat([torch.cat([part.images.flatten(1), part.labels[:, None]], 1) for part in splits[:3]])
    want = np.column_stack(load_digits(return_X_y=True)).astype(int).tolist()
    assert sorted(rows.tolist()) == sorted(want)


def test_default_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("VLAE_DATA_DIR", str(tmp_path / "mine"))
    assert default_root() == tmp_path / "mine"
    monkeypatch.setenv("VLAE_DATA_DIR", "")
    assert default_root() == tmp_path / "cache" / "vlae"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_root() == Path.home() / ".cache" / "vlae"


def test_real_mnist(data_root: Path) -> None:
    """Published checksums hold, the splits are the standard ones, and the static set is a binarisation of the grey."""
    grey, static = mnist_grey(data_root), mnist_static(data_root)
    for splits in (grey, static):
        assert [part.images.shape for part in splits[:3]] == [(n, 1, 28, 28) for n in (50_000, 10_000, 10_000)]
    assert grey.test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert [len(part.labels) for part in grey[:3]] == [50_000, 10_000, 10_000]
    # each pixel's ink in 10,000 draws from other images of the same kind
    difference = static.test.images.double().mean(0) - (grey.test.images / 255).double().mean(0)
    assert difference.abs().max() < 0.01


def test_real_omniglot(data_root: Path) -> None:
    splits = omniglot_original(data_root)
    assert [len(part.images) for part in splits[:3]] == [23_000, 1_345, 8_115]
    assert all(len(part.labels.unique()) == 50 for part in splits[:3])
    assert 0.07 < (splits.train.images / 255).mean() < 0.09  # ink is 1
    assert splits.test.labels.bincount().sum() == 5 * 1623


def test_real_silhouettes(data_root: Path) -> None:
    splits = caltech101(data_root)
    assert [len(part.images) for part in splits[:3]] == [4_100, 2_264, 2_307]
    assert all(len(part.labels.unique()) == 101 for part in splits[:3])
    # objects touch all four sides of their frame and fill its middle
    middle = splits.train.images[:, 0, 10:18, 10:18].double().mean()
    corners = splits.train.images[:, 0, ::27, ::27].double().mean()
    assert middle > 0.7 > 0.3 > corners


def test_real_cifar10(data_root: Path) -> None:
    splits = cifar10(data_root)
    assert [len(part.images) for part in splits[:3]] == [45_000, 5_000, 10_000]
    assert splits.test.labels.bincount().tolist() == [1000] * 10
    whole = sum(part.images.sum((0, 2, 3)) for part in splits[:2]).double() / (255 * 50_000 * 1024)
    published = torch.tensor([0.49139968, 0.48215841, 0.44653091], dtype=torch.float64)
    torch.testing.assert_close(whole, published, rtol=0, atol=1e-7)
