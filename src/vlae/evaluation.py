"""How likely images are: log p(x) by importance sampling, of a batch, and of a split as a record."""

import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int64, Integer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlae.datasets import Splits
from vlae.model import VLAE, Terms, digest, evaluating
from vlae.noise import generator
from vlae.records import commit, hardware, write

if TYPE_CHECKING:  # a DataModule: Lightning takes longer to import than all else together
    import vlae.data

BLOCK = 128  # samples whose noise is drawn together, so that a pass of any size sees the same noise
PARTS = "evaluate.[0-9]*.part"  # of each rank, what it has found
CHUNK = {"cpu": 16, "cuda": 4096}  # rows a pass: what a processor's cache holds, what fills a GPU


class Estimate(NamedTuple):
    """Of each image: log p(x), effective sample size (1 to K), rate and distortion averaged over its K codes; nats."""

    log_px: Float[Tensor, "B"]
    ess: Float[Tensor, "B"]
    rate: Float[Tensor, "B"]
    distortion: Float[Tensor, "B"]


@evaluating
def log_likelihood(model: VLAE, x: Integer[Tensor, "B C H W"], noise: Iterable[Tensor]) -> Estimate:
    """log of the mean of the weights p(x, z) / q(z | x) over K codes from q: at most log p(x) in expectation, and
    rising to it with K (Burda et al. 2016, equation 8). Effective sample size: (sum w)^2 / sum w^2.

    Each item of `noise` ~ N(0, 1), [k B D], is a pass of k * B rows that leaves nothing behind but sums in float64;
    `eps.split(k)` makes such items. The encoder runs once. Networks may run under autocast.

    Raises:
        ValueError: for images of another shape or more levels than the model's, or no noise.
    """
    model.refuse_other(x)
    q = model.encode(x)
    samples, zero = 0, torch.zeros(len(x), dtype=torch.float64, device=x.device)
    total, squares, elbo, rate = zero.log(), zero.log(), zero, zero
    for eps in noise:
        if eps.shape[1] != len(x):
            raise ValueError(f"noise of shape {tuple(eps.shape)} for {len(x)} images; [k, {len(x)}, D] is needed")
        k = len(eps)
        rows = x if len(x) == 1 else x.repeat(k, 1, 1, 1)
        z, log_qz = q.repeat(k).rsample_with_log_prob(eps.flatten(0, 1))
        terms = Terms(*(term.double() for term in model.terms(rows, z, log_qz)))
        log_w = terms.elbo.view(k, -1)
        total = torch.logaddexp(total, log_w.logsumexp(0))
        squares = torch.logaddexp(squares, (2 * log_w).logsumexp(0))
        elbo, rate = elbo + log_w.sum(0), rate + terms.rate.view(k, -1).sum(0)
        samples += k
    if samples == 0:
        raise ValueError("noise: no samples; at least 1")
    return Estimate(total - math.log(samples), (2 * total - squares).exp(), rate / samples, -(elbo + rate) / samples)


def noise(
    key: tuple[int | str, ...], index: Int64[Tensor, " B"], code: int, samples: int, k: int
) -> Iterator[Float[Tensor, "k B D"]]:
    """What `log_likelihood` takes, at most `k` samples a pass: a function of key, image and sample alone."""
    for start in range(0, samples, BLOCK):
        streams = [generator("importance", *key, image, start) for image in index.tolist()]
        block = torch.stack([torch.randn(BLOCK, code, generator=stream) for stream in streams], 1)
        yield from block[: samples - start].split(k)


@torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # or a GPU's convolutions would round to ten bits
def estimates(
    model: VLAE,
    x: Integer[Tensor, "B C H W"],
    key: tuple[int | str, ...],
    samples: int,
    chunk: int,
    folder: Path | None = None,
    every: float = 30.0,
    numbers: Int64[Tensor, " B"] | None = None,
) -> Estimate:
    """`log_likelihood` of many images with a progress bar, about `chunk` rows (images x samples) a pass; on the CPU.

    Noise is a function of key, sample and the image's number, by default its place in `x`. Rank r of the w of
    torch.distributed takes images r::w, and all ranks return what one process would. With a `folder`, results are kept
    there in `evaluate.*.part` every so many seconds, and what is kept is not computed again, be the number of ranks the
    same or not. Convolutions of float32 weights are in float32 on a GPU, too, where torch would take TensorFloat-32.

    Raises:
        ValueError: for sizes below 1, images the model is not for, or files kept of another evaluation.
        FloatingPointError: for an estimate that is not finite.
    """
    for name, size in (("samples", samples), ("chunk", chunk)):
        if size < 1:
            raise ValueError(f"{name}={size}: must be at least 1")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = next(model.parameters()).device
    together = max(1, chunk // min(samples, BLOCK))  # images
    numbers = torch.arange(len(x)) if numbers is None else numbers
    values, done = torch.zeros(len(x), 4, dtype=torch.float64), torch.zeros(len(x), dtype=torch.bool)
    if folder:
        about = {"samples": samples, "key": list(key), "images": digest(x, numbers)}
        about["weights"] = digest(*model.state_dict().values())
        about["model"] = model.description
        for file in folder.glob(PARTS):
            values, done = resumed(file, about, values, done)
    saved = time.monotonic()
    groups = torch.arange(len(x))[rank::world].split(together)
    for index in track(groups, "log p(x)", console=Console(stderr=True), refresh_per_second=2, disable=rank > 0):
        if done[index].all():
            continue
        passes = noise(key, numbers[index], model.prior.code, samples, max(1, chunk // together))
        group = log_likelihood(model, x[index].to(device), (eps.to(device) for eps in passes))
        values[index], done[index] = torch.stack(group, 1).cpu(), True
        if not values[index].isfinite().all():
            raise FloatingPointError(f"the estimate of an image among {index.tolist()} is not finite")
        if folder and time.monotonic() - saved >= every:
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"evaluate.{rank}.part"
            save_file({"values": values, "done": done}, file.with_suffix(".new"), {"vlae": json.dumps(about)})
            os.replace(file.with_suffix(".new"), file)
            saved = time.monotonic()
    if world > 1:
        own = torch.zeros_like(values, device=device)
        own[rank::world] = values[rank::world].to(device)
        dist.all_reduce(own)  # of every image one rank adds its values, the others zeros
        values = own.cpu()
    return Estimate(*values.unbind(1))


def resumed(file: Path, about: dict[str, Any], values: Tensor, done: Tensor) -> tuple[Tensor, Tensor]:
    """Values and marks with those that a file keeps; ValueError if it is of another evaluation."""
    try:
        with safe_open(file, "pt") as opened:
            begun = json.loads(opened.metadata()["vlae"])
            kept, finished = opened.get_tensor("values"), opened.get_tensor("done")
        for mine, theirs in ((values, kept), (done, finished)):
            if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
                raise ValueError(f"{theirs.dtype} {list(theirs.shape)} instead of {mine.dtype} {list(mine.shape)}")
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not the results of an evaluation ({error}); remove it") from error
    for name, now in about.items():
        if begun.get(name) != now:
            raise ValueError(f"{file}: of an evaluation with {name}={begun.get(name)}, now {now}; finish or remove it")
    return torch.where(finished[:, None], kept, values), done | finished


def evaluate(
    model: VLAE,
    images: "vlae.data.Images",
    split: str,
    samples: int,
    chunk: int | None,
    folder: Path,
    about: dict[str, Any],
    part: int | None = None,
) -> dict[str, float]:
    """Scores a split, prints a table, writes evaluate.json into `folder`, `about` first in it; returns the metrics.

    `chunk` rows (images x samples) a pass, None: CHUNK. `part`: so many of its images, drawn by seed 0, instead of all.
    Under torchrun the ranks share the images.

    Raises:
        ValueError, FloatingPointError: as `estimates`, and for an unknown split; an older evaluate.json stays.
    """
    begun, started, code = time.time(), datetime.now(UTC).isoformat(timespec="seconds"), commit()
    if split not in Splits._fields[:3]:
        raise ValueError(f"split={split}: must be one of {', '.join(Splits._fields[:3])}")
    for name, size in (("samples", samples), ("batch", chunk), ("images", part)):
        if size is not None and size < 1:
            raise ValueError(f"{name}={size}: must be at least 1")
    if split == "validation" and images.train_on_validation:
        raise ValueError("split=validation: the run was trained on it (data.train_on_validation)")
    refuse_other(model, images)
    x = images.part(split).images  # type: ignore[arg-type]
    numbers = torch.arange(len(x))
    if part is not None:  # never its first rows: these may be easier or harder than the rest
        numbers = torch.randperm(len(x), generator=generator("part", 0))[:part]
    x = x[numbers]
    same = {"split": split, "data": images.dataset_name, "weights": digest(*model.state_dict().values())}
    refuse_loss(folder / "evaluate.json", samples, len(x), **same)
    begun_here = dist.is_torchelastic_launched() and not dist.is_initialized()
    if begun_here:
        dist.init_process_group()
    device = own_device()
    samples = samples if model.prior.code else min(samples, 1)  # of an empty code all samples are equal
    chunk = CHUNK[device.type] if chunk is None else chunk
    found = estimates(model.to(device), x, (images.seed, split), samples, chunk, folder, numbers=numbers)
    log_px, ess, rate, distortion = (values.mean().item() for values in found)
    gap = found.rate + found.distortion + found.log_px
    bits = 1 / (math.log(2) * math.prod(images.shape))
    figures = {  # value, digits, unit
        "nelbo": (rate + distortion, 3, "nats, bound"),
        "rate": (rate, 3, "nats"),
        "distortion": (distortion, 3, "nats"),
        "bits_per_dim": ((rate + distortion) * bits, 4, "bound"),
        "nll": (-log_px, 3, f"nats, {samples:,} samples an image"),
        "nll_standard_error": (standard_error(found.log_px), 3, "nats, over images"),
        "gap": (gap.mean().item(), 3, "nats, from nll up to nelbo"),
        "gap_standard_error": (standard_error(gap), 3, "nats, over images"),
        "nll_bits_per_dim": (-log_px * bits, 4, f"{samples:,} samples an image"),
        "ess": (ess, 1, f"effective samples of {samples:,}, mean over images"),
    }
    prefix = "val" if split == "validation" else split
    metrics = {f"{prefix}/{name}": value for name, (value, _, _) in figures.items()}
    if not dist.is_initialized() or dist.get_rank() == 0:
        record: dict[str, Any] = {
            **about,
            **same,
            "commit": code,
            "date": started,
            "hardware": hardware(device),
        }
        record |= {"binarisation": images.binarisation, "seed": images.seed, "samples": samples, "images": len(x)}
        record |= {"wall_s": round(time.time() - begun, 1), "metrics": metrics}
        refuse_loss(folder / "evaluate.json", samples, len(x), **same)  # of an evaluation that ended meanwhile
        write(folder / "evaluate.json", record)
        for file in folder.glob(PARTS):
            file.unlink()
        table = Table("", split, "", title_justify="left")
        for name, (value, digits, unit) in figures.items():
            table.add_row(name, f"{value:.{digits}f}", unit)
        Console().print(table)
        Console().print(f"{folder / 'evaluate.json'}: {-log_px:.3f} nats", soft_wrap=True, highlight=False)
    if begun_here:
        dist.destroy_process_group()
    return metrics


def own_device() -> torch.device:
    """The GPU of this process, under torchrun its rank's own, or the processor."""
    gpu = torch.cuda.is_available()
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")


def standard_error(values: Float[Tensor, " B"]) -> float:
    """Of the mean of independent values; 0 of a single one."""
    return values.std(correction=0).item() / max(1, len(values) - 1) ** 0.5


def refuse_other(model: VLAE, images: "vlae.data.Images") -> None:
    """ValueError for a data set that the model is not for."""
    shape, levels = tuple(model.decoder.shape), model.likelihood.levels
    if (images.shape, images.levels) != (shape, levels):
        raise ValueError(f"images of {images.shape}, {images.levels} levels; the model is for {shape}, {levels} levels")


def refuse_loss(file: Path, samples: int, images: int, **same: str) -> None:
    """ValueError where an older record has more samples or images, or something else than `same` (split, data, weights;
    what it does not say is taken for the same): it may have taken hours."""
    if not file.exists():
        return
    try:
        old: dict[str, Any] = json.loads(file.read_text())
        more = old["samples"] > samples or old["images"] > images
        other = [name for name, value in same.items() if old.get(name, value) != value]
        holds = f"{old['split']} at {old['samples']} samples of {old['images']} images"
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file}: no record of an evaluation ({error}); move it elsewhere") from error
    if other or more:
        differs = "".join(f", {name} {old[name]}" for name in other if name != "split")
        now = "".join(f", {name} {same[name]}" for name in other if name != "split")
        wanted = f"{same['split']} at {samples} of {images}{now}"
        raise ValueError(f"{file}: holds {holds}{differs}; move it to have {wanted}")
