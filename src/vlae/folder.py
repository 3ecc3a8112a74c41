"""A user's own folder of pictures as a data set."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from tqdm import tqdm

from vlae.datasets import Part, Splits, only

SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff"}


def listed(folder: Path) -> list[Path]:
    """Every PNG, JPEG and TIFF file below a folder, by name; hidden ones are left out.

    Raises:
        ValueError: if there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise ValueError(f"data.folder={folder}: no such folder")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    visible = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    found = [path for path in visible if path.suffix.lower() in SUFFIXES]
    if not found:
        raise ValueError(
            f"data.folder={folder}: no picture among its {len(visible)} files; "
            f"they are told by {', '.join(sorted(SUFFIXES))}"
        )
    return found


def picture(
    path: Path, height: int, width: int, channels: Literal[1, 3] | None
) -> UInt8[np.ndarray, "height width *rgb"]:
    """The middle of a picture in the shape height x width, by Lanczos' filter; None for `channels` keeps its own.

    Raises:
        ValueError: for a broken file, more than 8 bits, transparency, several pages, other colour spaces, or a size
            beyond Pillow's limit for decompression bombs.
    """
    try:
        with Image.open(path, formats=["PNG", "JPEG", "TIFF"]) as image:
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or np.inf):
                raise ValueError(f"{image.width} x {image.height} pixels; at most {Image.MAX_IMAGE_PIXELS:,} in all")
            bits = {"PNG": path.open("rb").read(25)[24:], "TIFF": getattr(image, "tag_v2", {}).get(258, ())}
            if max(bits.get(str(image.format), (8,)), default=1) > 8 or image.mode.startswith(("I", "F")):
                raise ValueError("more than 8 bits a value; convert it to 8")
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:  # a phone's JPEG with a preview is fine
                raise ValueError(f"{image.n_frames} pages; one picture a file")  # type: ignore[attr-defined]
            # a JPEG is decoded at a fraction of its size, no less than twice what is wanted
            image.draft(image.mode, (2 * max(height, width),) * 2)
            upright = ImageOps.exif_transpose(image)
        if upright.has_transparency_data:
            lowest, _ = upright.convert("RGBA").getchannel("A").getextrema()
            if lowest < 255:  # type: ignore[operator]
                raise ValueError("an alpha channel with transparent pixels; lay it on a background")
        modes = {"1": "L", "L": "L", "LA": "L", "P": "RGB", "PA": "RGB", "RGB": "RGB", "RGBA": "RGB"}
        if upright.mode not in modes:
            raise ValueError(f"mode {upright.mode}; grey or RGB is wanted")
        mode = {None: modes[upright.mode], 1: "L", 3: "RGB"}[channels]
        return np.asarray(ImageOps.fit(upright.convert(mode), (width, height), Image.Resampling.LANCZOS))
    except Exception as error:  # a broken file provokes errors of every kind in Pillow
        raise ValueError(f"{path}: {error or type(error).__name__}") from error


def pictures(
    files: list[Path], height: int, width: int, channels: Literal[1, 3] | None
) -> list[UInt8[np.ndarray, "height width *rgb"] | ValueError]:
    """Each `picture`, or what is wrong with it, by as many threads as there are processors."""

    def one(path: Path) -> UInt8[np.ndarray, "height width *rgb"] | ValueError:
        try:
            return picture(path, height, width, channels)
        except ValueError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(tqdm(pool.map(one, files), "reading", len(files), unit="picture", delay=2, disable=None))


def drawn(x: np.ndarray, validation: float, test: float, seed: int) -> np.ndarray:
    """0, 1 or 2 for train, validation and test; equal pictures get the same."""
    _, group = np.unique([blake2b(one.tobytes()).digest() for one in x], return_inverse=True)
    count = group.max() + 1
    rank = np.random.RandomState(seed).permutation(count)[group]
    cut = count - round(test * count)
    return np.digitize(rank, [cut - round(validation * count), cut])


def images(
    root: Path,
    *,
    folder: str,
    height: int,
    width: int,
    channels: Literal[1, 3] | None = None,
    levels: int = 256,
    validation: float = 0.1,
    test: float = 0.1,
    split_seed: int = 0,
    skip_unreadable: bool = False,
) -> Splits:
    """The PNG, JPEG and TIFF files below `folder` (`root` is not looked at); see `picture`.

    Each is cropped around its middle to the shape height x width, resized, and its 256 levels merged into `levels` of
    equal width. `channels` None: as the pictures are, all grey or all colour; 1 or 3 turns them into that.
    Sub-folders are classes. `split_seed` draws the shares `validation` and `test`, equal pictures into one split; or
    the folder holds `train`, `validation` and `test`, each with the pictures or classes. `skip_unreadable` leaves out
    the pictures that it would refuse, with a warning that counts them.

    Raises:
        ValueError: names the folder or the first picture that does not fit, and what is wrong with it.
    """
    top = Path(folder).expanduser()
    if min(height, width) < 1 or not 2 <= levels <= 256:
        raise ValueError(
            f"data.height={height}, width={width}, levels={levels}: sizes of at least 1, levels of 2 to 256"
        )
    if min(validation, test) <= 0 or validation + test >= 1:
        raise ValueError(f"data.validation={validation}, test={test}: shares above 0 that leave a rest to train on")
    files = listed(top)
    made = pictures(files, height, width, channels)
    if bad := [str(one) for one in made if isinstance(one, ValueError)]:
        lost = f"{len(bad):,} of {len(files):,} pictures cannot be used, the first: {bad[0]}"
        if not skip_unreadable or len(bad) == len(files):
            raise ValueError(f"{lost}; data.skip_unreadable=true leaves such out")
        warnings.warn(f"left out: {lost}", stacklevel=2)
    good = [(file, one) for file, one in zip(files, made, strict=True) if not isinstance(one, ValueError)]
    first = {one.ndim: file for file, one in reversed(good)}
    if len(first) > 1:
        raise ValueError(f"{first[2]} is grey and {first[3]} is colour; data.channels=1 or 3 turns all into that")
    places = [file.relative_to(top).parts[:-1] for file, _ in good]
    x = (np.stack([np.atleast_3d(one) for _, one in good]).transpose(0, 3, 1, 2).astype(np.uint16) * levels) >> 8

    named = {"train": 0, "validation": 1, "valid": 1, "val": 1, "test": 2}
    split = np.array([named.get(place[0], 3) if place else 3 for place in places])
    if set(split) == {0, 1, 2}:
        places = [place[1:] for place in places]
    elif split.min() < 3:
        raise ValueError(
            f"{folder} must hold pictures in all of train, validation and test, and none beside, or in none"
        )
    else:
        split = drawn(x, validation, test, split_seed)
    classes = sorted({place[0] for place in places if place})
    if classes and not all(places):
        alone = next(file for (file, _), place in zip(good, places, strict=True) if not place)
        raise ValueError(f"{alone} lies beside folders of classes ({classes[0]}, ...), so that it has none")
    labels = torch.tensor([classes.index(place[0]) for place in places]) if classes else None
    if missing := [name for k, name in enumerate(("train", "validation", "test")) if not (split == k).any()]:
        raise ValueError(f"{len(good)} pictures in {folder} leave none for {', '.join(missing)}")
    whole = Part(torch.from_numpy(x.astype(np.uint8)), labels)
    return Splits(only(whole, split == 0), only(whole, split == 1), only(whole, split == 2), levels=levels)
