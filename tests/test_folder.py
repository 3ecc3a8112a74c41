"""A folder of pictures becomes the images it holds; what does not fit is named."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlae.datasets import Splits
from vlae.folder import array, images, picture

NOISE = np.random.default_rng(0)


def values(*shape: int) -> np.ndarray:
    return NOISE.integers(256, size=shape, dtype=np.uint8)


def fill(folder: Path, count: int = 20, shape: tuple[int, ...] = (6, 9, 3), end: str = ".png") -> list[np.ndarray]:
    """Pictures of noise named in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = [values(*shape) for _ in range(count)]
    for number, each in enumerate(arrays):
        Image.fromarray(each).save(folder / f"{number:03d}{end}")
    return arrays


def read(folder: Path, **settings: Any) -> Splits:
    return images(Path(), **{"folder": str(folder), "height": 6, "width": 9} | settings)


def rows(splits: Splits) -> list[list[list[int]]]:
    """Every image of each split as [H W C] values."""
    return [part.images.permute(0, 2, 3, 1).flatten(1).tolist() for part in splits[:3]]


def every(splits: Splits) -> list[list[int]]:
    return [row for part in rows(splits) for row in part]


def flat(arrays: list[np.ndarray]) -> list[list[int]]:
    return sorted(array.flatten().tolist() for array in arrays)


@pytest.mark.parametrize("end", [".png", ".PNG", ".tif", ".tiff"])
@pytest.mark.parametrize("shape", [(6, 9, 3), (6, 9)])
def test_pictures_of_the_right_size_are_taken_as_they_are(tmp_path: Path, shape: tuple[int, ...], end: str) -> None:
    arrays = fill(tmp_path / "deep" / "er", shape=shape, end=end)
    fill(tmp_path / ".hidden", 2)
    (tmp_path / "deep" / "._000.png").write_bytes(b"a Mac's")
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.warns(UserWarning, match=r"left out 1 files of other kinds: \.txt"):
        splits = read(tmp_path)
    assert [len(part.images) for part in splits[:3]] == [16, 2, 2]
    assert splits.train.images.shape[1:] == (shape[2] if len(shape) > 2 else 1, 6, 9)
    assert sorted(every(splits)) == flat(arrays)
    assert (splits.levels, splits.dynamic) == (256, False)
    assert set(splits.test.labels.tolist()) == {0}  # the class `deep`


@pytest.mark.parametrize("levels", [2, 3, 32, 255])
def test_levels_are_merged_evenly(tmp_path: Path, levels: int) -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for n in range(4):
        Image.fromarray(np.roll(grey, n)).save(tmp_path / f"{n}.png")
    splits = read(tmp_path, height=16, width=16, levels=levels, test=0.25, validation=0.25)
    found = sorted(splits.train.images[0].flatten().tolist())
    assert found == [level * levels // 256 for level in range(256)]
    counts = np.bincount(found)
    assert len(counts) == levels == splits.levels
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(("size", "box"), [((40, 20), (10, 0, 30, 20)), ((20, 50), (0, 15, 20, 35))])
def test_the_middle_is_kept(tmp_path: Path, size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    """Half as large, each pixel is near the mean of the four it stands for where the picture is smooth."""
    across, down = np.meshgrid(np.linspace(0, 200, size[0]), np.linspace(0, 50, size[1]))
    smooth = (across + down).round().astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "x.png")
    left, top, right, bottom = box
    want = smooth[top:bottom, left:right].reshape(10, 2, 10, 2).mean((1, 3))
    assert np.abs(picture(tmp_path / "x.png", 10, 10, None) - want)[1:-1, 1:-1].max() < 2.5


def test_large_photographs(tmp_path: Path) -> None:
    """JPEG is decoded at a fraction of its size; a turned camera is turned back."""
    across, down = np.meshgrid(np.linspace(0, 255, 1200), np.linspace(0, 255, 800))
    photo = Image.fromarray(np.stack([across, down, 255 - across], 2).astype(np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6  # shown turned clockwise
    photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", exif=turned, quality=95)
    photo.save(tmp_path / "photo.jpg", quality=95)
    want = np.stack([across, down, 255 - across], 2).reshape(8, 100, 12, 100, 3).mean((1, 3))
    for name in ("photo.jpg", "turned.jpg"):
        assert np.abs(picture(tmp_path / name, 8, 12, None) - want)[1:-1, 1:-1].max() < 4


def test_folders_are_classes(tmp_path: Path) -> None:
    fill(tmp_path / "b" / "c", 10)
    fill(tmp_path / "a", 10)
    splits = read(tmp_path, test=0.3)
    found = {
        tuple(row): label
        for part, more in zip(splits[:3], rows(splits), strict=True)
        for row, label in zip(more, part.labels.tolist(), strict=True)
    }
    for file in tmp_path.rglob("*.png"):
        assert found[tuple(np.asarray(Image.open(file)).flatten().tolist())] == (
            file.relative_to(tmp_path).parts[0] == "b"
        )


def test_links_are_followed_once(tmp_path: Path) -> None:
    arrays = fill(tmp_path / "elsewhere" / "cats", 5) + fill(tmp_path / "here" / "dogs", 15)
    (tmp_path / "here" / "cats").symlink_to(tmp_path / "elsewhere" / "cats")
    (tmp_path / "here" / "dogs" / "back").symlink_to(tmp_path / "here")
    (tmp_path / "here" / "dogs" / "again").symlink_to(tmp_path / "here" / "dogs")
    splits = read(tmp_path / "here")
    assert sorted(every(splits)) == flat(arrays)
    assert sorted(torch.cat([part.labels for part in splits[:3]]).tolist()) == [0] * 5 + [1] * 15
    (tmp_path / "here" / "dogs" / "gone.png").symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"1 of 21 pictures .*gone\.png"):
        read(tmp_path / "here")


def test_a_picture_in_two_splits_of_one_s_own(tmp_path: Path) -> None:
    for name in ("train", "val", "test"):
        fill(tmp_path / name, 3)
    (tmp_path / "test" / "same.png").write_bytes((tmp_path / "train" / "000.png").read_bytes())
    with pytest.warns(UserWarning, match="1 pictures lie in more than one of its splits"):
        read(tmp_path)


@pytest.mark.parametrize("validation", ["validation", "valid", "Val"])
def test_splits_of_one_s_own(tmp_path: Path, validation: str) -> None:
    arrays = [fill(tmp_path / name / "x", n) for name, n in (("train", 5), (validation, 3), ("test", 2))]
    more = [fill(tmp_path / name / "y", n) for name, n in (("train", 1), (validation, 1), ("test", 1))]
    splits = read(tmp_path)
    assert [sorted(part) for part in rows(splits)] == [flat(a + b) for a, b in zip(arrays, more, strict=True)]
    assert [sorted(part.labels.tolist()) for part in splits[:3]] == [[0] * 5 + [1], [0] * 3 + [1], [0, 0, 1]]


def test_the_seed_draws_the_splits(tmp_path: Path) -> None:
    arrays = fill(tmp_path, 50)
    one, again, other = read(tmp_path, split_seed=1), read(tmp_path, split_seed=1), read(tmp_path, split_seed=2)
    assert rows(one) == rows(again) != rows(other)
    assert sorted(every(other)) == flat(arrays)
    assert one.train.labels is None
    counts = [len(part.images) for part in read(tmp_path, validation=0.2, test=0.3)[:3]]
    assert counts == [25, 10, 15]


def test_splits_do_not_depend_on_what_is_made_of_the_pictures(tmp_path: Path) -> None:
    fill(tmp_path, 60)
    sets = [{}, {"levels": 128}, {"height": 5, "width": 7}, {"channels": 1}]
    labels = []
    for settings in sets:
        for number in range(60):  # a class for each picture, so that labels tell which is where
            path = tmp_path / f"{number:03d}.png"
            if path.exists():
                (tmp_path / f"{number:03d}").mkdir()
                path.rename(tmp_path / f"{number:03d}" / "x.png")
        labels.append([part.labels.tolist() for part in read(tmp_path, **settings)[:3]])
    assert labels == labels[:1] * len(sets)
    fill(tmp_path / "more", 1)  # another picture moves at most one across each cut
    train, validation, test = (set(part.labels.tolist()) - {60} for part in read(tmp_path)[:3])
    assert len(set(labels[0][0]) - train) + len(set(labels[0][1]) - validation) + len(set(labels[0][2]) - test) <= 2


def test_equal_pictures_never_cross_splits(tmp_path: Path) -> None:
    fill(tmp_path, 40)
    for file in list(tmp_path.glob("*.png")):
        for copy in range(3):
            (tmp_path / f"copy{copy}{file.name}").write_bytes(file.read_bytes())
    train, validation, test = ({tuple(row) for row in part} for part in rows(read(tmp_path)))
    assert not train & validation | train & test | validation & test
    assert (len(train), len(validation), len(test)) == (32, 4, 4)


def test_pictures_turn_grey_or_colour_when_asked(tmp_path: Path) -> None:
    colour, grey = fill(tmp_path, 5), values(6, 9)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    with pytest.raises(ValueError, match=r"grey\.png is grey and .*000\.png is colour; data\.channels=1 or 3"):
        read(tmp_path)
    share = {"validation": 0.2, "test": 0.2}
    three, one = (every(read(tmp_path, channels=n, **share)) for n in (3, 1))
    assert grey.repeat(3).tolist() in three
    assert grey.flatten().tolist() in one
    luma = (colour[0] @ [0.299, 0.587, 0.114]).flatten()
    assert any(np.abs(np.array(row) - luma).max() <= 1 for row in one)


def saved(image: Image.Image, **more: Any) -> Callable[[Path], None]:
    return lambda path: image.save(path, **more)


def alpha(lowest: int) -> Image.Image:
    array = values(6, 9, 4)
    array[..., 3] = 255
    array[2, 2, 3] = lowest
    return Image.fromarray(array)


def palette() -> Image.Image:
    return Image.fromarray(values(6, 9, 3)).quantize(8)


BAD: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "empty": ("x.png", lambda path: path.write_bytes(b"") and None, "cannot identify|empty"),
    "text": ("x.jpg", lambda path: path.write_text("<html>404</html>") and None, "cannot identify"),
    "truncated": ("x.png", saved(Image.fromarray(values(90, 90, 3))), "truncated|broken|unrecognized|incomplete"),
    "webp": ("x.png", saved(Image.fromarray(values(6, 9, 3)), format="WEBP"), "cannot identify"),
    "16 bits": ("x.png", saved(Image.fromarray(values(6, 9).astype(np.uint16) * 257)), "more than 8 bits"),
    "16-bit tiff": ("x.tif", saved(Image.fromarray(values(6, 9).astype(np.uint16) * 257)), "more than 8 bits"),
    "floats": ("x.tif", saved(Image.fromarray(values(6, 9).astype(np.float32) / 255)), "more than 8 bits"),
    "NaN": ("x.tiff", saved(Image.fromarray(np.full((6, 9), np.nan, np.float32))), "more than 8 bits"),
    "alpha": ("x.png", saved(alpha(254)), "alpha channel with transparent pixels"),
    "transparent palette": ("x.png", saved(palette(), transparency=0), "alpha channel with transparent pixels"),
    "transparent grey": ("x.png", saved(Image.new("L", (9, 6), 7), transparency=7), "alpha channel with transparent"),
    "cmyk": ("x.jpg", saved(Image.new("CMYK", (9, 6))), "mode CMYK"),
    "pages": (
        "x.tif",
        saved(Image.new("L", (9, 6)), save_all=True, append_images=[Image.new("L", (9, 6), 9)]),
        "2 pages",
    ),
    "animation": (
        "x.png",
        saved(Image.new("L", (9, 6)), save_all=True, append_images=[Image.new("L", (9, 6), 9)]),
        "2 pages",
    ),
}


def spoil(folder: Path, kind: str) -> Path:
    name, write, _ = BAD[kind]
    path = folder / name
    write(path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-2000])
    return path


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_picture_is_named_or_left_out(tmp_path: Path, kind: str) -> None:
    arrays = fill(tmp_path, 20)
    path = spoil(tmp_path, kind)
    settings = {"channels": 3}
    with pytest.raises(ValueError, match=rf"1 of 21 pictures.*{path}.*({BAD[kind][2]}).*skip_unreadable=true"):
        read(tmp_path, **settings)
    with pytest.warns(UserWarning, match=rf"left out: 1 of 21 pictures.*{path}"):
        splits = read(tmp_path, skip_unreadable=True, **settings)
    assert sorted(every(splits)) == flat(arrays)


def test_any_name_of_a_file_will_do(tmp_path: Path) -> None:
    arrays = fill(tmp_path, 20)
    os.rename(tmp_path / "003.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    assert sorted(every(read(tmp_path))) == flat(arrays)


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_a_damaged_array_is_named(tmp_path: Path, name: str) -> None:
    x = np.zeros((4, 6, 9), np.uint8)
    np.savez_compressed(tmp_path / name, images=x) if name == "x.npz" else np.save(tmp_path / name, x)
    good, noise = (tmp_path / name).read_bytes(), np.random.default_rng(0)
    refused: list[str] = []
    for _ in range(100):
        bad = bytearray(good[: noise.integers(1, len(good) + 1)])
        bad[noise.integers(len(bad))] ^= 1 << noise.integers(8)
        (tmp_path / name).write_bytes(bad)
        try:
            array(tmp_path / name, (1, 6, 9))
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 30
    assert all(line.startswith(f"{tmp_path / name}: ") for line in refused)


def sixteen_bit_colour(path: Path) -> None:
    """Pillow reads these as 8 bits without a word, and writes none."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = b"".join(b"\0" + values(9 * 6).tobytes() for _ in range(6))
    header = struct.pack(">IIBBBBB", 9, 6, 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    )


def test_sixteen_bit_colour_is_refused(tmp_path: Path) -> None:
    sixteen_bit_colour(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"x\.png: more than 8 bits"):
        picture(tmp_path / "x.png", 6, 9, None)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (40, 30)).save(tmp_path / "x.png")
    for limit in (1199, 300):  # Pillow warns up to twice its limit and refuses from there
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match=r"x\.png: .*pixels"):
            picture(tmp_path / "x.png", 6, 9, None)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1200)
    picture(tmp_path / "x.png", 6, 9, None)


@pytest.mark.parametrize(
    ("image", "channels"),
    [
        (alpha(255), 3),  # opaque
        (palette(), 3),
        (Image.fromarray(values(6, 9) > 127), 1),
        (Image.merge("LA", [Image.new("L", (9, 6), 3), Image.new("L", (9, 6), 255)]), 1),
    ],
)
def test_other_kinds_of_8_bits_are_taken(tmp_path: Path, image: Image.Image, channels: int) -> None:
    image.save(tmp_path / "x.png")
    found = picture(tmp_path / "x.png", 6, 9, None)
    assert np.array_equal(found, np.asarray(image.convert("RGB" if channels == 3 else "L")))


def layout(*names: str) -> Callable[[Path], None]:
    return lambda folder: [fill(folder / name, 3) for name in names] and None


@pytest.mark.parametrize(
    ("make", "settings", "found"),
    [
        (lambda folder: folder.rmdir(), {}, "no such folder"),
        (layout(), {}, "no picture among its 0 files"),
        (lambda folder: (folder / "a.txt").write_text("x") and None, {}, "no picture among its 1 files; .*jpeg"),
        (layout("a", ""), {}, r"000\.png lies beside folders of classes \(a, \.\.\.\)"),
        (layout("train", "test"), {}, "must hold pictures in all of train, validation"),
        (layout("train", "val", "test", ""), {}, r"train, validation \(or val, valid\) and test, and none beside"),
        (layout("Train", "Test"), {}, "must hold pictures in all of train"),
        (layout("deep/train", "deep/val", "deep/test"), {}, "or in no folder of such a name"),
        (layout(""), {}, "3 pictures in .* leave none for validation, test"),
        (layout(""), {"validation": 0.5, "test": 0.5}, r"data\.validation=0\.5, test=0\.5"),
        (layout(""), {"test": 0.0}, r"test=0\.0"),
        (layout(""), {"validation": float("nan")}, r"data\.validation=nan"),
        (layout(""), {"height": 0}, r"data\.height=0"),
        (layout(""), {"levels": 257}, "levels=257"),
    ],
)
def test_other_folders_are_refused(
    tmp_path: Path, make: Callable[[Path], None], settings: dict[str, Any], found: str
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    make(folder)
    with pytest.raises(ValueError, match=found):
        read(folder, **settings)


def test_a_folder_of_bad_pictures_is_refused(tmp_path: Path) -> None:
    spoil(tmp_path, "text")
    with pytest.raises(ValueError, match="1 of 1 pictures cannot be used"):
        read(tmp_path, skip_unreadable=True)


def test_the_order_of_the_file_system_does_not_matter(tmp_path: Path) -> None:
    arrays = fill(tmp_path / "one", 30)
    (tmp_path / "two").mkdir()
    for number in reversed(range(30)):
        Image.fromarray(arrays[number]).save(tmp_path / "two" / f"{number:03d}.png")
    assert rows(read(tmp_path / "one")) == rows(read(tmp_path / "two"))
    assert torch.equal(read(tmp_path / "one").train.images, read(tmp_path / "two").train.images)
