"""Images as bytes: bits-back coding, as short as the model's bound says; or their codes alone.

Bits-back (Frey and Hinton 1997; BB-ANS, Townsend et al. 2019) with an autoregressive-flow prior (VLAE section 3.2): a
code z is popped from a stack under q(z | x), the pixels are pushed under p(x | z), then the noise of z under N(0, 1).
What that adds to the stack is -ELBO.
"""

import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from itertools import chain, repeat
from math import prod

import numpy as np
import torch
from jaxtyping import Float, Integer, UInt8
from rich.console import Console
from rich.progress import track
from torch import Tensor

from vlae.codec import Codec, symbols
from vlae.container import CodecError, Header, pack, unpack
from vlae.evaluation import digest
from vlae.model import VLAE
from vlae.sampling import decode

BATCH = 64  # images at once; fixed, so that no file can ask for memory
THREADS = 1  # or floats would depend on how many cores there are
FINE = -4  # codes whose bits come back are multiples of 1/16: finer saves less than its initial bits take
SPACINGS = range(FINE, 4)  # powers of two


def seed(words: int) -> np.ndarray:
    """What lies on the stack before the first image: the upper `words` of a fixed sequence."""
    return np.random.PCG64(0).random_raw(words).astype(np.uint32)[::-1].copy()


def layout(images: int) -> tuple[list[int], int]:
    """Sizes of the first batches, and how many of BATCH images follow.

    Each batch is a quarter larger than the one before, as what those have left on the stack pays for its codes: the
    initial bits are those of a few images instead of BATCH.
    """
    sizes: list[int] = []
    size = 1
    while size < BATCH and sum(sizes) + size <= images:
        sizes.append(size)
        size += -(-size // 4)
    full, rest = divmod(images - sum(sizes), BATCH)
    return sorted([*sizes, rest]) if rest else sizes, full


def progress(batches: Iterable[int], what: str, images: int, total: int | None = None) -> Iterable[int]:
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


def header(model: VLAE, kind: str, spacing: int, images: int) -> Header:
    """What a file of this model on this machine says of itself, but for initial words and content."""
    codec = Codec(model, 2.0**spacing)
    stack = codec.stack(seed(4 * (1 + model.prior.code)))
    raw = np.random.PCG64(1).random_raw(4 * prod(model.decoder.shape)) % np.uint64(model.likelihood.levels)
    x = own(torch.from_numpy(raw.astype(np.int64)).view(4, *model.decoder.shape), codec.device)
    k = codec.draw(stack, x)
    codec.push_pixels(stack, k, x)
    codec.push_code(stack, k)
    return Header(
        kind=kind,
        floats=str(codec.dtype).removeprefix("torch."),
        spacing=spacing,
        batch=BATCH,
        threads=THREADS,
        images=images,
        initial=0,
        fingerprint=zlib.crc32(stack.get_compressed().tobytes()),
        content=0,
        model=digest(*model.state_dict().values())[:8],
        torch=".".join(torch.__version__.split(".")[:2]),
        constriction=".".join(version("constriction").split(".")[:2]),
    )


def compress(model: VLAE, x: Integer[Tensor, "N C H W"], lossy: bool = False) -> bytes:
    """A file that `decompress` makes the images of, with the same model on a machine that computes alike.

    Bits come back among images, so that a few of them may take less with codes rounded to the grid that makes them
    shortest, and paid for: two parts, code and pixels. `lossy` keeps nothing but such codes.

    Raises:
        ValueError: for no images, images that the model is not for, a prior with scales, or no code to keep.
        FloatingPointError: for a model whose codes are not finite.
    """
    if not len(x):
        raise ValueError("no images to compress")
    if lossy and not model.prior.code:
        raise ValueError("model.code=0: a lossy file holds the code alone, and there is none")
    model.refuse_other(x)
    model.encode(x[:1].to(next(model.parameters()).device))  # refuses what does not fit
    kinds = ["lossy"] if lossy else ["bits-back", "two-part"] if len(x) <= BATCH else ["bits-back"]
    with alike():
        return min((encoded(model, x, kind) for kind in kinds), key=len)


def encoded(model: VLAE, x: Integer[Tensor, "N C H W"], kind: str) -> bytes:
    device, backed, start, codes = next(model.parameters()).device, kind == "bits-back", 0, []
    spacing = FINE if backed else shortest(model, own(x[:BATCH], device))
    about, codec = header(model, kind, spacing, len(x)), Codec(model, 2.0**spacing)
    words = seed(BATCH * (1 + model.prior.code) + len(x) if backed else 0)
    stack, untouched = codec.stack(words), len(words)
    small, full = layout(len(x))
    for size in progress([*small, *[BATCH] * full], "compress", len(x)):
        part = own(x[start : start + size], device)
        k = codec.draw(stack, part) if backed else codec.nearest(part)
        untouched = min(untouched, stack.pos()[0])
        if kind != "lossy":
            codec.push_pixels(stack, k, part)
        codec.push_code(stack, k)
        codes.append(symbols(k))
        start += size
    packed = stack.get_compressed()[untouched:].astype("<u4").tobytes()
    packed = packed.ljust(least(len(x)), b"\0")
    content = np.concatenate(codes) if kind == "lossy" else x.cpu().numpy().astype(np.uint8)
    about = about._replace(initial=len(words) - untouched, content=zlib.crc32(content.tobytes()))
    return pack(about, packed)


def decompress(model: VLAE, data: bytes, uniform: Float[Tensor, "N C H W"] | None = None) -> UInt8[Tensor, "N C H W"]:
    """The images of a file. Of a lossy one, pixels drawn at `uniform` in [0, 1), by default the most likely ones.

    Raises:
        CodecError: for damaged bytes, another model than the file's, or a machine that computes otherwise.
        ValueError: for `uniform` of another shape than the images, or a prior with scales.
    """
    about, payload = unpack(data)
    lossy, backed = about.kind == "lossy", about.kind == "bits-back"
    if about.spacing not in SPACINGS or len(payload) % 4:
        raise CodecError(f"damaged: codes at 2^{about.spacing} in {len(payload)} bytes")
    words = np.trim_zeros(np.frombuffer(payload, "<u4").astype(np.uint32), "b")
    most = BATCH if about.kind == "two-part" else len(payload)  # or a false count would go on for ever
    if not 1 <= about.images <= most or len(payload) != max(4 * len(words), least(about.images)):
        raise CodecError(f"damaged: {about.images} images in {len(payload)} bytes")
    if uniform is not None and uniform.shape != (about.images, *model.decoder.shape):
        raise ValueError(f"uniform of shape {tuple(uniform.shape)} for {about.images} of {tuple(model.decoder.shape)}")
    codec = Codec(model, 2.0**about.spacing)
    stack = codec.stack(words)
    small, full = layout(about.images)
    left, parts, codes = about.images, [], []
    with alike():
        here = header(model, about.kind, about.spacing, about.images)
        for name in ("batch", "threads", "floats", "model", "fingerprint"):
            theirs, ours = getattr(about, name), getattr(here, name)
            if theirs != ours:
                made = f"torch {about.torch} and constriction {about.constriction}"
                raise CodecError(f"made with {name} {theirs}, which is {ours} here (the file: by {made})")
        sizes = chain(repeat(BATCH, full), reversed(small))  # last in, first out
        for size in progress(sizes, "decompress", about.images, full + len(small)):
            left -= size
            try:
                k = codec.pop_code(stack, size)
                if not lossy:
                    part = codec.pop_pixels(stack, k)
                elif uniform is None:
                    part = codec.likely_pixels(k)
                else:
                    part = decode(model, codec.z(k), uniform[left : left + size].to(codec.device))
                if backed:
                    if stack.num_words() < 2:  # `encoded` left as many below the images
                        raise CodecError("damaged: fewer images than it says")
                    codec.give_back(stack, k, part)
            except FloatingPointError as error:
                raise CodecError(f"damaged: {error}") from error
            codes.append(symbols(k))
            parts.append(part.to(torch.uint8).cpu())
    x = torch.cat(parts[::-1])
    content = np.concatenate(codes[::-1]) if lossy else x.numpy()
    restored = np.array_equal(stack.get_compressed(), seed(about.initial))
    if not restored or zlib.crc32(content.tobytes()) != about.content:
        raise CodecError("damaged, or this machine computes otherwise than the one that made it")
    return x
