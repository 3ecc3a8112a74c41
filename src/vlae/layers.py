"""The few blocks that encoder, prior and decoder are made of."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

LOG_2PI = math.log(2 * math.pi)


def full(x: Tensor) -> Tensor:
    """At least float32: densities and sums never run in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextmanager
def small_steps(device: torch.device, rows: int) -> Iterator[None]:
    """One thread for many operations on few rows on a processor: waking others takes longer than what they would do."""
    threads = torch.get_num_threads()
    if device.type == "cpu" and rows <= 3000:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def normal_log_prob(eps: Float[Tensor, "B *code"]) -> Float[Tensor, "B"]:
    """log N(eps; 0, 1) in nats, summed over the code."""
    return -0.5 * (eps.square() + LOG_2PI).flatten(1).sum(1)


def pyramid(height: int, width: int, levels: int) -> list[tuple[int, int]]:
    """Sizes from the image down, each halved and rounded up, as a stride-2 convolution with padding 1 leaves them."""
    return list(
        accumulate(range(levels), lambda size, _: ((size[0] + 1) // 2, (size[1] + 1) // 2), initial=(height, width))
    )


def at_least(low: int, **sizes: int | list[int]) -> None:
    """Raises ValueError for the first size, or list with a size, below `low`."""
    for name, size in sizes.items():
        if any(value < low for value in (size if isinstance(size, list) else [size])):
            raise ValueError(f"{name}={size}: must be at least {low}")


def maps(shape: tuple[int, int, int], code: list[int], widths: list[int], blocks: list[int]) -> list[tuple[int, int]]:
    """Sizes of the levels between images and a code of maps; ValueError where these do not fit."""
    at_least(1, widths=widths, **{"len(widths)": len(widths)})
    at_least(0, blocks=blocks)
    if len(blocks) != len(widths):
        raise ValueError(f"blocks={blocks}: one number for each of widths={widths} is needed")
    sizes = pyramid(*shape[1:], len(widths) - 1)
    if len(code) != 3 or tuple(code[1:]) != sizes[-1]:
        fitting = [code[0], *sizes[-1]]
        raise ValueError(f"model.code={code}: {len(widths)} widths on images {list(shape)} need maps such as {fitting}")
    return sizes


class PixelBlock(nn.Module):
    """x + W drop(a * relu(b)), (a, b) = V norm(x) at each pixel by itself; starts as the identity."""

    def __init__(self, width: int, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        self.gate, self.out = nn.Linear(width, 2 * width), nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Float[Tensor, "*n F"]) -> Float[Tensor, "*n F"]:
        a, b = self.gate(F.layer_norm(x, x.shape[-1:])).chunk(2, -1)
        return x + self.out(F.dropout(a * F.relu(b), self.dropout, self.training))


class ConvBlock(nn.Module):
    """x + conv(elu(conv(norm(elu(x))))), 3x3, the norm over the whole image; starts as the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.conv, self.out = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Float[Tensor, "B F h w"]) -> Float[Tensor, "B F h w"]:
        return x + self.out(F.elu(self.conv(F.group_norm(F.elu(x), 1))))


def unit_gain(net: nn.Sequential) -> nn.Sequential:
    """Convolutions, but for those that start at zero, so that a signal keeps its size through all of them."""
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.any():
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return net


class Up(nn.Module):
    """Twice the size by a 3x3 convolution and a pixel shuffle, cut to the given size."""

    def __init__(self, width: int, out: int, size: tuple[int, int]):
        super().__init__()
        self.conv, self.size = nn.Conv2d(width, 4 * out, 3, padding=1), size

    def forward(self, x: Float[Tensor, "B F h w"]) -> Float[Tensor, "B G H W"]:
        return F.pixel_shuffle(self.conv(x), 2)[..., : self.size[0], : self.size[1]]


class MaskedLinear(nn.Linear):
    """A linear layer that multiplies its weights by a fixed mask of zeros and ones, out x in."""

    mask: Tensor

    def __init__(self, mask: Float[Tensor, "out in"]):
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Float[Tensor, "*n in"]) -> Float[Tensor, "*n out"]:
        return F.linear(x, self.weight * self.mask, self.bias)
