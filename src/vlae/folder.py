"""A user's own pictures: a folder of them as a data set, and files of a model's images read and written."""

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Integer, UInt8
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from vlae.datasets import Part, Splits, only
from vlae.records import whole

SPLITS = {"train": 0, "validation": 1, "valid": 1, "val": 1, "test": 2}
SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff"}


def listed(folder: Path) -> list[Path]:
    """Every PNG, JPEG and TIFF file below a folder, by name; hidden ones are left out.

    Raises:
        ValueError: if there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise ValueError(f"data.folder={folder}: no such folder")

    def unreadable(error: OSError) -> None:
        raise ValueError(f"data.folder={folder}: {error}") from error

    files: list[Path] = []
    seen = {os.path.realpath(folder)}
    for place, inner, names in os.walk(folder, onerror=unreadable, followlinks=True):
        real = {name: os.path.realpath(Path(place, name)) for name in sorted(inner) if not name.startswith(".")}
        inner[:] = [name for name, path in real.items() if path not in seen]  # a link back up would never end
        seen |= set(real.values())
        files += [Path(place, name) for name in names if not name.startswith(".")]
    files.sort(key=lambda path: path.relative_to(folder).as_posix())
    found = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not found:
        raise ValueError(
            f"data.folder={folder}: no picture among its {len(files)} files; "
            f"they are told by {', '.join(sorted(SUFFIXES))}"
        )
    if len(found) < len(files):
        others = sorted({path.suffix for path in files} - {path.suffix for path in found})
        warnings.warn(
            f"{folder}: left out {len(files) - len(found)} files of other kinds: {', '.join(others)}", stacklevel=2
        )
    return found


def picture(
    path: Path, height: int, width: int, channels: Literal[1, 3] | None, exact: bool = False
) -> UInt8[np.ndarray, "height width *rgb"]:
    """The middle of a picture in the shape height x width, by Lanczos' filter; None for `channels` keeps its own.
    `exact` refuses other sizes instead.

    Raises:
        ValueError: for a broken file, more than 8 bits, transparency, several pages, other colour spaces, or a size
            beyond Pillow's limit for decompression bombs.
    """
    try:
        with Image.open(path, formats=["PNG", "JPEG", "TIFF"]) as image:
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or np.inf):
                raise ValueError(f"{image.width} x {image.height} pixels; at most {Image.MAX_IMAGE_PIXELS:,} in all")
            with path.open("rb") as file:  # Pillow makes 8 bits of a PNG's 16 without a word
                bits = {"PNG": file.read(25)[24:], "TIFF": getattr(image, "tag_v2", {}).get(258, ())}
            if max(bits.get(str(image.format), (8,)), default=1) > 8 or image.mode.startswith(("I", "F")):
                raise ValueError("more than 8 bits a value; convert it to 8")
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:  # a phone's JPEG with a preview is fine
                raise ValueError(f"{image.n_frames} pages; one picture a file")  # type: ignore[attr-defined]
            if not exact:  # a JPEG is decoded at a fraction of its size, no less than twice what is wanted
                image.draft(image.mode, (2 * max(height, width),) * 2)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            if exact and image.size != (width, height):
                raise ValueError(f"{image.width} x {image.height} pixels; {width} x {height} are wanted")
            if image.has_transparency_data:
                lowest, _ = image.convert("RGBA").getchannel("A").getextrema()
                if lowest < 255:  # type: ignore[operator]
                    raise ValueError("an alpha channel with transparent pixels; lay it on a background")
            modes = {"1": "L", "L": "L", "LA": "L", "P": "RGB", "PA": "RGB", "RGB": "RGB", "RGBA": "RGB"}
            if image.mode not in modes:
                raise ValueError(f"mode {image.mode}; convert it to grey or RGB")
            mode = {None: modes[image.mode], 1: "L", 3: "RGB"}[channels]
            fitting = image if image.mode == mode else image.convert(mode)  # copies of a photograph are large
            return np.asarray(ImageOps.fit(fitting, (width, height), Image.Resampling.LANCZOS))
    except Exception as error:  # a broken file provokes errors of every kind in Pillow
        raise ValueError(f"{path}: {error or type(error).__name__}") from error


def pictures(
    files: list[Path], height: int, width: int, channels: Literal[1, 3] | None
) -> list[UInt8[np.ndarray, "height width *rgb"] | ValueError]:
    """Each `picture`, or what is wrong with it, by several threads."""

    def one(path: Path) -> UInt8[np.ndarray, "height width *rgb"] | ValueError:
        try:
            return picture(path, height, width, channels)
        except ValueError as error:
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # each may hold a large photograph
        return list(tqdm(pool.map(one, files), "reading", len(files), unit="picture", delay=2, disable=None))


def alike(
    sources: Sequence[Path], shape: tuple[int, int, int], levels: int, exact: bool = False
) -> Integer[Tensor, "N C H W"]:
    """Images of exactly the shape (C, H, W) from pictures, folders of them and arrays, in the order of the sources.

    The values of a picture are merged into `levels`, and colours into grey where C is 1; `exact` refuses what `store`
    would not write as it was. Those of an .npy or .npz (its array `images`, or its only one) are integers, [N H W] or
    [N C H W], and stay as they are.

    Raises:
        ValueError: names the first file that has another size or cannot be read.
    """
    channels, height, width = shape

    def images(source: Path) -> Tensor:
        if source.suffix in (".npy", ".npz"):
            return array(source, shape)
        files = [source] if source.is_file() else listed(source)
        found = [picture(path, height, width, 1 if channels == 1 else 3, exact=True) for path in files]
        x = torch.from_numpy(np.stack([np.atleast_3d(one).transpose(2, 0, 1) for one in found]))
        x = (x.long() * levels // 256).to(torch.uint8)
        for path, written in zip(files, shades(x, levels) if exact else (), strict=exact):
            whole = torch.tensor(picture(path, height, width, 3, exact=True)).movedim(2, 0)
            if (whole != written).any():
                kind = f"{levels} levels of {'grey' if channels == 1 else 'each colour'}"
                raise ValueError(f"{path}: other values than the model's {kind}; an .npy of 0 to {levels - 1} is exact")
        return x

    return torch.cat([images(source) for source in sources])


def array(path: Path, shape: tuple[int, int, int]) -> Integer[Tensor, "N C H W"]:
    try:
        found = np.load(path, allow_pickle=False)
        if not isinstance(found, np.ndarray):
            found = found["images" if "images" in found or len(found.files) != 1 else found.files[0]]
        x = found[:, None] if found.ndim == 3 else found
        if x.dtype.kind not in "iub" or x.shape[1:] != shape or x.min(initial=0) < 0 or x.max(initial=0) > 255:
            raise ValueError(
                f"{x.dtype} {list(found.shape)}; integers 0 to 255 of [N, {str([*shape])[1:-1]}] are wanted"
            )
    except Exception as error:  # a damaged file provokes errors of every kind
        raise ValueError(f"{path}: {error}") from error
    return torch.from_numpy(x.astype(np.uint8))


def shades(x: UInt8[Tensor, "N C H W"], levels: int) -> UInt8[Tensor, "N C H W"]:
    """0..levels-1 as 0..255, rounded up, or some would be read back as the level below."""
    return (-(-255 * x.long() // (levels - 1))).to(torch.uint8)


def vacant(output: Path) -> None:
    """ValueError unless `output` is a new file or folder, or an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output={output}: is there already; a new .npz or a new folder is needed")


def store(x: UInt8[Tensor, "N C H W"], levels: int, output: Path) -> None:
    """Writes images so that `alike` reads them back: an .npz with the array `images`, or a new folder of PNG files.

    Raises:
        ValueError: for a file or a folder that holds something, or images that a PNG cannot hold.
    """
    vacant(output)
    if output.suffix == ".npz":
        with whole(output) as part, part.open("wb") as file:
            np.savez_compressed(file, images=x.numpy())
        return
    if x.shape[1] not in (1, 3):
        raise ValueError(f"--output={output}: pictures are grey or colour, and these have {x.shape[1]} channels; .npz")
    output.mkdir(parents=True, exist_ok=True)
    digits = max(5, len(str(len(x) - 1)))  # of equal length, or names would not be in order
    for number, image in enumerate(shades(x, levels).movedim(1, 3).numpy()):
        Image.fromarray(image.squeeze(2) if x.shape[1] == 1 else image).save(output / f"{number:0{digits}}.png")


def drawn(equal: list[str], validation: float, test: float, seed: int) -> np.ndarray:
    """0, 1 or 2 for train, validation and test of each picture, from the name of the first that equals it.

    So no picture lies in two splits, and size, levels or a few more pictures move hardly any to another.
    """
    names = sorted(set(equal), key=lambda name: blake2b(f"{seed}/{name}".encode(errors="surrogateescape")).digest())
    rank, count = {name: k for k, name in enumerate(names)}, len(names)
    cut = count - round(test * count)
    return np.digitize([rank[name] for name in equal], [cut - round(validation * count), cut])


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
    Sub-folders are classes. `split_seed` draws the shares `validation` and `test`, pictures of equal pixels into one
    split; or the folder holds `train`, `validation` and `test`, each with the pictures or classes. `skip_unreadable`
    leaves out the pictures that it would refuse, with a warning that counts them.

    Raises:
        ValueError: names the folder or the first picture that does not fit, and what is wrong with it.
    """
    top = Path(folder).expanduser()
    if min(height, width) < 1 or not 2 <= levels <= 256:
        raise ValueError(
            f"data.height={height}, width={width}, levels={levels}: sizes of at least 1, levels of 2 to 256"
        )
    if not (validation > 0 and test > 0 and validation + test < 1):
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
    names = [file.relative_to(top).as_posix() for file, _ in good]
    x = np.stack([np.atleast_3d(one) for _, one in good]).transpose(0, 3, 1, 2)
    del made, good
    merged = (np.arange(256) * levels >> 8).astype(np.uint8)
    for one in x:  # one by one: an index takes eight times as much as a value
        one[...] = merged[one]
    # of pictures with the same pixels, the first
    pixels = [blake2b(one.tobytes()).digest() for one in x]
    first_of = dict(zip(reversed(pixels), reversed(names), strict=True))

    split = np.array([SPLITS.get(place[0].lower(), 3) if place else 3 for place in places])
    if set(split) == {0, 1, 2}:
        places = [place[1:] for place in places]
        if twice := len(set(zip(pixels, split, strict=True))) - len(first_of):
            warnings.warn(f"{folder}: {twice:,} pictures lie in more than one of its splits", stacklevel=2)
    elif split.min() < 3 or any(name.lower() in SPLITS for place in places for name in place):
        raise ValueError(
            f"{folder} must hold pictures in all of train, validation (or val, valid) and test, and none beside, "
            "or in no folder of such a name"
        )
    else:
        split = drawn([first_of[one] for one in pixels], validation, test, split_seed)
    classes = sorted({place[0] for place in places if place})
    if classes and not all(places):
        alone = next(name for name, place in zip(names, places, strict=True) if not place)
        raise ValueError(f"{top / alone} lies beside folders of classes ({classes[0]}, ...), so that it has none")
    number = {name: k for k, name in enumerate(classes)}
    labels = torch.tensor([number[place[0]] for place in places]) if classes else None
    if missing := [name for k, name in enumerate(Splits._fields[:3]) if not (split == k).any()]:
        raise ValueError(f"{len(x)} pictures in {folder} leave none for {', '.join(missing)}")
    whole = Part(torch.from_numpy(x), labels)
    return Splits(only(whole, split == 0), only(whole, split == 1), only(whole, split == 2), levels=levels)
