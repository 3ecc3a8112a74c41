"""What `python -m vlae` does with trained models: score, draw, encode, compress."""

import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from vlae import compression as codec
from vlae.codes import encode as codes_of
from vlae.container import CodecError, unpack
from vlae.datasets import SETS, Part, Splits
from vlae.evaluation import CHUNK, estimates, own_device, refuse_other
from vlae.evaluation import evaluate as score
from vlae.folder import alike, store, vacant
from vlae.gallery import PICTURES, draw, plot
from vlae.model import VLAE, kept, load
from vlae.noise import generator
from vlae.records import whole
from vlae.sizes import sizes

if TYPE_CHECKING:  # Lightning takes longer to import than all else together, and not every command needs a data set
    import vlae.data


def opened(
    run: str, data: str | None = None, allow: Sequence[str] = ()
) -> tuple[VLAE, Callable[[], "vlae.data.Images"], Path]:
    """Of a run's folder, a checkpoint in it, or weights: the model, what finds its images, the folder for results.

    Weights do not say what they were trained on: `data` names the set, by default the one they are named after. No code
    is called but vlae's and that of the packages in `allow`.

    Raises:
        FileNotFoundError: if there is no such run.
        ValueError: for a damaged file, an unknown name in `data`, or a run that needs other packages; what finds the
            images raises it for a set that is unknown or set up wrongly.
    """
    path, packages = Path(run), ("vlae.", *allow)
    device = own_device()
    if not path.is_dir() and path.suffix != ".ckpt":
        names, name = [dataset.__name__ for dataset in SETS], data or path.stem
        if data and data not in names:
            raise ValueError(f"--data={data}: must be one of {', '.join(names)}")
        model = load(run, packages)
        section = {"_target_": f"vlae.datasets.{name}", "root": None, "batch_size": 1, "eval_batch_size": 1}
        section |= {"train_on_validation": model.description.get("train_on_validation", False)}
        find = partial(trained_on, run, section if name in names else None, 0, packages)
        return model.to(device), find, Path("runs") / path.stem
    folder = path if path.is_dir() else path.absolute().parent.parent
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{run}: no run, as there is no {file}")
    if data:
        raise ValueError(f"--data={data}: {folder} was trained on its own data; leave it out")
    config = settings(file, allow)
    find = partial(trained_on, run, config["data"], config["seed"], packages)
    return load(kept(path) if path.is_dir() else path, packages).to(device), find, folder


def settings(file: Path, allow: Sequence[str]) -> dict[str, Any]:
    """A run's config.json; ValueError if it is damaged, or calls packages that the user does not."""
    try:
        config = json.loads(file.read_text())
        foreign = sorted({*config["allow"]} - {*allow})
        _ = config["data"], config["seed"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file}: not the settings of a run: {error}") from error
    if foreign:
        raise ValueError(
            f"{file}: the run calls code of {', '.join(foreign)}; if you trust it, --allow {' '.join(foreign)}"
        )
    return config


def line() -> str:
    """The command being run."""
    return shlex.join(["python", "-m", "vlae", *sys.argv[1:]])


def trained_on(run: str, section: dict[str, Any] | None, seed: int, packages: tuple[str, ...]) -> "vlae.data.Images":
    """The images of a `data` section; ValueError where it is not known."""
    if section is None:
        raise ValueError(f"{run}: say by --data what it was trained on: {', '.join(one.__name__ for one in SETS)}")
    from vlae.data import images_for

    return images_for(section, seed, packages)


def evaluate(
    run: str, data: str | None, allow: Sequence[str], split: str, samples: int, batch: int | None, part: int | None
) -> None:
    """Log-likelihood by importance sampling: a table, and evaluate.json beside the run."""
    model, find, folder = opened(run, data, allow)
    score(model, find(), split, samples, batch, folder, {"command": line()}, part)


def is_split(sources: Sequence[str]) -> bool:
    """Whether images are a split of the model's data set, not pictures."""
    return len(sources) == 1 and sources[0] in Splits._fields[:3]


def shown(model: VLAE, find: Callable[[], "vlae.data.Images"], sources: Sequence[str], exact: bool = False) -> Part:
    """A split of the model's data set, or pictures of exactly the model's size: files, folders of them, arrays.

    Raises:
        ValueError: if a source is none of these, or the pictures do not fit the model; with `exact`, if they have other
            values than it knows.
    """
    if is_split(sources):
        images = find()
        refuse_other(model, images)
        return images.part(sources[0])  # type: ignore[arg-type]
    for source in sources:
        if not Path(source).exists():
            splits = ", ".join(Splits._fields[:3])
            raise ValueError(f"{source}: neither {splits} alone nor a file or folder of pictures")
    return Part(alike([*map(Path, sources)], model.decoder.shape, model.likelihood.levels, exact))


def place(folder: Path, output: Path | None) -> Path:
    """The folder to draw into; ValueError if it is a file."""
    if output and output.exists() and not output.is_dir():
        raise ValueError(f"--output={output}: a file; pictures go into a folder")
    return output or folder


def sample(run: str, allow: Sequence[str], seed: int, output: Path | None) -> None:
    """Draws samples.png, beside the run or in `output`."""
    model, _, folder = opened(run, None, allow)
    folder = place(folder, output)
    device = next(model.parameters()).device
    draw(model, torch.zeros(8, *model.decoder.shape, dtype=torch.long, device=device), ["samples"], seed, folder)
    say(str(folder / "samples.png"))


def reconstruct(
    run: str, data: str | None, allow: Sequence[str], sources: Sequence[str], seed: int, output: Path | None
) -> None:
    """Draws, beside the run or in `output`, what codes keep of images, in every way of `vlae.gallery`."""
    model, find, folder = opened(run, data, allow)
    part, folder = shown(model, find, sources), place(folder, output)
    chosen = torch.randperm(len(part.images), generator=generator("shown", seed))[:1000]
    x = part.images[chosen].long().to(next(model.parameters()).device)
    model.encode(x[:1])  # refuses what does not fit before anything is drawn
    written = [folder / f"{name}.png" for name in draw(model, x, PICTURES, seed, folder)]
    try:
        written += plot(model, x, seed, folder)
    except ImportError as error:
        say(f"no figures of bits, noise and window: {error}")
    say(", ".join(map(str, written)))


def encode(run: str, data: str | None, allow: Sequence[str], sources: Sequence[str], output: Path | None) -> None:
    """Writes codes.npz: arrays mean and scale [N D], rate [N] in nats, and labels [N] where there are any.

    Rates are by one draw of each code; of validation and test, by the draw that scores them.
    """
    model, find, folder = opened(run, data, allow)
    path = output or folder
    path = path / "codes.npz" if path.suffix != ".npz" or path.is_dir() else path
    part = shown(model, find, sources)
    key = ("eps", find().seed, sources[0]) if is_split(sources) else ("eps", "pictures")
    noise = torch.randn(1, len(part.images), model.prior.code, generator=generator(*key))
    codes = codes_of(model, part.images, noise)
    if not all(tensor.isfinite().all() for tensor in codes):
        raise FloatingPointError(f"{run}: codes that are not finite; nothing is written")
    arrays = {name: tensor.numpy() for name, tensor in codes._asdict().items()}
    if part.labels is not None:
        arrays["labels"] = part.labels.numpy()
    with whole(path) as new, new.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    say(f"{path}: {len(part.images):,} codes of {model.prior.code} numbers, mean rate {codes.rate.mean():.3f} nats")


def compress(
    run: str,
    data: str | None,
    allow: Sequence[str],
    sources: Sequence[str],
    samples: int,
    lossy: int,
    portable: bool,
    output: Path | None,
) -> None:
    """Images as one file, opened again before it counts, and a table of what they take here and in other formats.

    `portable` computes in float64, whose last bits, where processors differ, next to never decide a symbol.
    """
    model, find, folder = opened(run, data, allow)
    x, begun = shown(model, find, sources, exact=not lossy).images, time.time()
    output = output or folder / f"{Path(sources[0]).stem}.vlae"
    if samples < 1:
        raise ValueError(f"samples={samples}: must be at least 1")
    if output.is_dir():
        raise ValueError(f"--output={output}: a folder; a file is needed")
    device = next(model.parameters()).device
    model.cpu().to(torch.float64 if portable else torch.float32)  # no two kinds of GPU compute alike
    file = codec.compress(model, x, lossy)
    again = codec.decompress(model, file)  # or the only copy might be one that nobody can open
    wrong = (again != x).double().mean().item()
    if wrong and not lossy:
        raise FloatingPointError(f"{output}: not written, as it would not give the images back")
    with whole(output) as part:
        part.write_bytes(file)
    taken = time.time() - begun
    table = Table("", "bits/dim", "bytes", "", title_justify="left")

    def row(name: str, bits: float | int, text: str) -> None:
        table.add_row(name, f"{bits / x.numel():.4f}", f"{math.ceil(bits / 8):,}", text)

    if lossy:
        text = f"{lossy} an image, for its code; {wrong:.2%} of the most likely values are not the image's"
        row(output.name, 8 * len(file), text)
    else:
        row(output.name, 8 * len(file), f"of them {unpack(file)[0].initial * 4:,} for the first codes")
        found = estimates(model.to(device, torch.float32), x, ("compress",), samples, CHUNK[device.type])
        row("-ELBO", (found.rate + found.distortion).sum().item() / math.log(2), f"mean of {samples} codes an image")
        row("-log p(x)", -found.log_px.sum().item() / math.log(2), "at most, by importance of the same codes")
    for name, size in sizes(x, model.likelihood.levels).items():
        row(name, 8 * size, "the bare values" if name == "xz" else "one picture of all images")
    Console().print(table)
    say(f"{output}: {len(file):,} bytes for {len(x):,} images, opened again in {taken:.1f} s")


def decompress(run: str, allow: Sequence[str], file: Path, seed: int, likely: bool, output: Path | None) -> None:
    """The images of a file as .npz or a folder of PNGs; of a lossy one drawn by a seed, or the most likely."""
    model, _, _ = opened(run, None, allow)
    packed, output = file.read_bytes(), output or file.with_suffix(".npz")
    vacant(output)
    try:
        about, _ = unpack(packed)
        lossy = about.kind == "lossy"
        if likely and not lossy:
            raise ValueError(f"--likely: {file} holds every pixel, so that there is nothing to choose")
        shape = (about.images if lossy and not likely else 0, *model.decoder.shape)
        uniform = torch.rand(shape, generator=generator("texture", seed))
        x = codec.decompress(model.to("cpu", getattr(torch, about.floats)), packed, uniform if len(uniform) else None)
    except CodecError as error:
        raise CodecError(f"{file}: {error}") from error
    store(x, model.likelihood.levels, output)
    say(f"{output}: {len(x):,} images, {'anew from their codes' if lossy else 'exactly those that were compressed'}")


def say(line: str) -> None:
    Console().print(line, soft_wrap=True, highlight=False)
