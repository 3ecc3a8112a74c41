"""Files become the images they hold, in every layout; anything else is refused by name."""

import gzip
import hashlib
import lzma
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from vlae.datasets import MNIST, Splits, default_root, digits, mnist, mnist_grey, mnist_static

PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}
SETS = [mnist_grey, mnist, mnist_static]


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
def test_a_missing_file_says_where_it_was_sought(tmp_path: Path, dataset: Callable[..., Splits]) -> None:
    with pytest.raises(FileNotFoundError) as error:
        dataset(tmp_path)
    assert all(word in str(error.value) for word in ("train", str(tmp_path), "http", "data.root"))


@pytest.mark.parametrize("dataset", SETS)
def test_a_file_that_is_not_the_published_one_is_refused(tmp_path: Path, dataset: Callable[..., Splits]) -> None:
    write_idx(tmp_path)
    write_amat(tmp_path)
    with pytest.raises(ValueError, match=r"train.*MD5 .*published.*data\.verify"):
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
    try:
        grey, static = mnist_grey(data_root), mnist_static(data_root)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    for splits in (grey, static):
        assert [part.images.shape for part in splits[:3]] == [(n, 1, 28, 28) for n in (50_000, 10_000, 10_000)]
    assert grey.test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert [len(part.labels) for part in grey[:3]] == [50_000, 10_000, 10_000]
    # each pixel's ink in 10,000 draws from other images of the same kind
    difference = static.test.images.double().mean(0) - (grey.test.images / 255).double().mean(0)
    assert difference.abs().max() < 0.01
