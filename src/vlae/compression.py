"""Images as bytes: all of them, as short as the model's bound says, by bits-back coding; or their codes alone.

Bits-back (Frey and Hinton 1997; BB-ANS, Townsend et al. 2019) with an autoregressive-flow prior (VLAE section 3.2): a
code z is popped from a stack under q(z | x), the pixels are pushed under p(x | z), then the noise of z under N(0, 1).
What that adds to the stack is -ELBO.
"""

import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, repeat
from math import prod
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Integer, UInt8
from rich.console import Console
from rich.progress import track
from torch import Tensor

from vlae.codec import Codec
from vlae.container import CodecError, Header, pack, unpack
from vlae.lossy import choose, codes, likely
from vlae.model import VLAE, digest, evaluating
from vlae.sampling import decode

BATCH = 64  # images at once; fixed, so that no file can ask for memory
THREADS = 1  # or floats would depend on how many cores there are
FINE = -4  # codes whose bits come back are multiples of 1/16: finer saves less than its initial bits take
SPACINGS = range(FINE, 4)  # powers of two
T = TypeVar("T")


def seed(words: int) -> np.ndarray:
    """What lies on the stack before the first image: the upper `words` of a fixed sequence."""
    return np.random.PCG64(0).random_raw(words).astype(np.uint32)[::-1].copy()


def layout(images: int) -> tuple[list[int], int]:
    """Sizes of the first batches, and how many of BATCH images follow.

    Each is about a quarter of all before, as what those have left on the stack pays for its codes: the initial bits
    are those of a few images instead of BATCH.
    """
    sizes: list[int] = []
    while (size := 1 + sum(sizes) // 4) < BATCH and sum(sizes) + size <= images:
        sizes.append(size)
    full, rest = divmod(images - sum(sizes), BATCH)
    return sorted([*sizes, rest]) if rest else sizes, full


def progress(batches: Iterable[T], what: str, images: int, total: int | None = None) -> Iterable[T]:
    """A bar for what takes longer than a batch."""
    return track(batches, what, total, console=Console(stderr=True), disable=images <= BATCH)


def least(images: int) -> int:
    """Bytes that so many images take at least, a byte each in whole words."""
    return 4 * -(-images // 4)


@contextmanager
def alike() -> Iterator[None]:
    """What would make floats differ between two runs on one machine is switched off."""
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_num_threads(threads)


def own(x: Integer[Tensor, "B C H W"], device: torch.device) -> Integer[Tensor, "B C H W"]:
    """x with the strides that `scan` gives images: a convolution may choose its way by them."""
    return torch.empty(x.shape, dtype=torch.long, device=device).copy_(x)


def shortest(model: VLAE, x: Integer[Tensor, "B C H W"]) -> int:
    """The spacing of codes at which codes and pixels together take least, where no bits come back."""

    def bits(spacing: int) -> int:
        codec = Codec(model, 2.0**spacing)
        stack, k = codec.stack(), codec.nearest(x)
        codec.push_pixels(stack, k, x)
        codec.push_code(stack, k)
        return stack.num_valid_bits()

    return min(SPACINGS, key=bits)


def fingerprint(model: VLAE, spacing: int) -> int:
    """A checksum of what this machine makes of fixed images, as it would be in a file."""
    codec = Codec(model, 2.0**spacing)
    stack = codec.stack(seed(4 * (1 + model.prior.code)))
    raw = np.random.PCG64(1).random_raw(4 * prod(model.decoder.shape)) % np.uint64(model.likelihood.levels)
    x = own(torch.from_numpy(raw.astype(np.int64)).view(4, *model.decoder.shape), codec.device)
    k = codec.draw(stack, x)
    codec.push_pixels(stack, k, x)
    codec.push_code(stack, k)
    return zlib.crc32(stack.get_compressed().tobytes())


def header(model: VLAE, kind: str, images: int) -> Header:
    """What every file of this model says; ValueError for weights in half precision."""
    weight = next(model.parameters())
    try:
        constriction = version("constriction")
    except PackageNotFoundError:  # no need of it where the code is all
        constriction = "0.0"
    if weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"weights in {weight.dtype}: compression needs a model in float32 or float64")
    return Header(
        kind=kind,
        floats=str(weight.dtype).removeprefix("torch."),
        spacing=0,
        batch=BATCH,
        threads=THREADS,
        images=images,
        initial=0,
        fingerprint=0,
        content=0,
        model=digest(*model.state_dict().values())[:8],
        torch=".".join(torch.__version__.split(".")[:2]),
        constriction=".".join(constriction.split(".")[:2]),
    )


def checksum(about: Header, content: bytes) -> int:
    """Of what decoding gives, and of all else that the header says."""
    return zlib.crc32(content, zlib.crc32(str(about._replace(content=0)).encode()))


@evaluating
def compress(model: VLAE, x: Integer[Tensor, "N C H W"], lossy: int = 0) -> bytes:
    """A file that `decompress` makes the images of, with the same model on a machine that computes alike.

    Bits come back among images, so that a few of them may take less with codes rounded to the grid that makes them
    shortest, and paid for: two parts, code and pixels. `lossy` keeps nothing but the code, in so many bytes an image,
    with any prior on any machine (see `vlae.lossy`).

    Raises:
        ValueError: for no images, images that the model is not for, a prior with scales, a posterior with a flow, or no
            code to keep.
        FloatingPointError: for a model whose codes or pixels are not finite.
    """
    if not len(x):
        raise ValueError("no images to compress")
    if lossy and not (0 < lossy <= 255 and model.prior.code):
        raise ValueError(f"lossy={lossy} with model.code={model.prior.code}: 1 to 255 bytes of a code are needed")
    model.refuse_other(x)
    model.encode(x[:1].to(next(model.parameters()).device))  # refuses what does not fit
    if lossy:
        parts = progress(x.split(BATCH), "compress", len(x))
        packed = b"".join(choose(model, part, lossy).tobytes() for part in parts)
        about = header(model, "lossy", len(x))
        return pack(about._replace(content=checksum(about, packed)), packed)
    kinds = ["bits-back", "two-part"] if len(x) <= BATCH else ["bits-back"]
    with alike():
        return min((encoded(model, x, kind) for kind in kinds), key=len)


def encoded(model: VLAE, x: Integer[Tensor, "N C H W"], kind: str) -> bytes:
    device, backed, start = next(model.parameters()).device, kind == "bits-back", 0
    spacing = FINE if backed else shortest(model, own(x[:BATCH], device))
    codec = Codec(model, 2.0**spacing)
    words = seed(BATCH * (1 + model.prior.code) + len(x) if backed else 0)
    stack, untouched = codec.stack(words), len(words)
    small, full = layout(len(x))
    for size in progress([*small, *[BATCH] * full], "compress", len(x)):
        part = own(x[start : start + size], device)
        k = codec.draw(stack, part) if backed else codec.nearest(part)
        untouched = min(untouched, stack.pos()[0])
        codec.push_pixels(stack, k, part)
        codec.push_code(stack, k)
        start += size
    packed = stack.get_compressed()[untouched:].astype("<u4").tobytes().ljust(least(len(x)), b"\0")
    about = header(model, kind, len(x))._replace(
        spacing=spacing, initial=len(words) - untouched, fingerprint=fingerprint(model, spacing)
    )
    return pack(about._replace(content=checksum(about, x.cpu().numpy().astype(np.uint8).tobytes())), packed)


@evaluating
def decompress(model: VLAE, data: bytes, uniform: Float[Tensor, "N C H W"] | None = None) -> UInt8[Tensor, "N C H W"]:
    """The images of a file. Of a lossy one, pixels drawn at `uniform` in [0, 1), by default the most likely ones.

    Raises:
        CodecError: for damaged bytes, another model than the file's, or a machine that computes otherwise.
        ValueError: for a prior with scales, or `uniform` that is not for the images or with a file that needs none.
    """
    about, payload = unpack(data)
    lossy = about.kind == "lossy"
    if uniform is not None and (not lossy or uniform.shape != (about.images, *model.decoder.shape)):
        of = f"{about.images} of {tuple(model.decoder.shape)}, {about.kind}"
        raise ValueError(f"uniform of shape {tuple(uniform.shape)} for {of}")
    here = header(model, about.kind, about.images)
    for name in ("batch", "threads", "floats", "model"):
        refuse(about, name, getattr(here, name))
    return from_codes(model, about, payload, uniform) if lossy else decoded(model, about, payload)


def refuse(about: Header, name: str, here: int | str) -> None:
    """CodecError unless the file has here's value of a field."""
    if getattr(about, name) != here:
        made = f"the file: by torch {about.torch} and constriction {about.constriction}"
        raise CodecError(f"made with {name} {getattr(about, name)}, which is {here} here ({made})")


def from_codes(model: VLAE, about: Header, payload: bytes, uniform: Tensor | None) -> UInt8[Tensor, "N C H W"]:
    images = about.images
    if len(payload) % images or checksum(about, payload) != about.content:
        raise CodecError(f"damaged: {images} images in {len(payload)} bytes")
    numbers, parts = np.frombuffer(payload, np.uint8).reshape(images, -1), []
    for start in progress(range(0, images, BATCH), "decompress", images):
        here = slice(start, start + BATCH)
        z = codes(model, numbers[here])
        x = likely(model, z) if uniform is None else decode(model, z, uniform[here].to(z))
        parts.append(x.to(torch.uint8).cpu())
    return torch.cat(parts)


def decoded(model: VLAE, about: Header, payload: bytes) -> UInt8[Tensor, "N C H W"]:
    backed = about.kind == "bits-back"
    if about.spacing not in SPACINGS or len(payload) % 4:
        raise CodecError(f"damaged: codes at 2^{about.spacing} in {len(payload)} bytes")
    words = np.trim_zeros(np.frombuffer(payload, "<u4").astype(np.uint32), "b")
    many = not backed and about.images > BATCH
    if many or len(payload) != max(4 * len(words), least(about.images)):
        raise CodecError(f"damaged: {about.images} images in {len(payload)} bytes")
    codec, parts = Codec(model, 2.0**about.spacing), []
    stack, (small, full) = codec.stack(words), layout(about.images)
    sizes = chain(repeat(BATCH, full), reversed(small))  # last in, first out
    with alike():
        refuse(about, "fingerprint", fingerprint(model, about.spacing))
        for size in progress(sizes, "decompress", about.images, full + len(small)):
            try:
                k = codec.pop_code(stack, size)
                x = codec.pop_pixels(stack, k)
                if backed:
                    if stack.num_words() < 2:  # `encoded` left as many below the images
                        raise CodecError("damaged: fewer images than it says")
                    codec.give_back(stack, k, x)
            except FloatingPointError as error:
                raise CodecError(f"damaged: {error}") from error
            parts.append(x.to(torch.uint8).cpu())
    x = torch.cat(parts[::-1])
    restored = np.array_equal(stack.get_compressed(), seed(about.initial))
    if not restored or checksum(about, x.numpy().tobytes()) != about.content:
        raise CodecError("damaged, or this machine computes otherwise than the one that made it")
    return x
