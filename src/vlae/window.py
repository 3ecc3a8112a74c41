"""Which earlier pixels a pixel sees, and the order in which pixels can then be computed together."""

import re
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def window(receptive_field: str) -> list[tuple[int, int]]:
    """Offsets (down, right) of the pixels that a window `AxB` or `none` shows, in raster order (VLAE section 3.1).

    `AxB` is the block A wide and B tall right above the pixel, columns -ceil((A-1)/2)..floor((A-1)/2), and the
    ceil((A-1)/2) pixels to its left: 4x2 shows 10, 5x3 17, 7x4 31.

    Raises:
        ValueError: for anything but `none` or `AxB` with A, B >= 1.
    """
    if receptive_field == "none":
        return []
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", receptive_field)
    if match is None:
        raise ValueError(
            f"receptive_field={receptive_field}: must be `none` or AxB (A wide, B tall, both >= 1), such as 7x4"
        )
    wide, tall = int(match[1]), int(match[2])
    left, right = wide // 2, (wide - 1) // 2
    return [(i, j) for i in range(-tall, 0) for j in range(-left, right + 1)] + [(0, j) for j in range(-left, 0)]


def neighbours(window: list[tuple[int, int]], height: int, width: int) -> Int[Tensor, "n N"]:
    """Of each pixel in raster order, the numbers of those in its window; height * width for one beyond a border."""
    pixel = torch.arange(height * width)[:, None]
    down, right = torch.tensor(window, dtype=torch.long).view(-1, 2).unbind(1)
    row, column = pixel // width + down, pixel % width + right
    inside = (row >= 0) & (column >= 0) & (column < width)
    return torch.where(inside, row * width + column, height * width)


def seen(u: Float[Tensor, "B C HW"], neighbours: Int[Tensor, "n N"]) -> Float[Tensor, "B n CN"]:
    """The values in the windows of n pixels; a border is one more pixel after the last, a 0."""
    return F.pad(u, (0, 1))[:, :, neighbours].movedim(1, 2).flatten(2)


def waves(
    window: list[tuple[int, int]], height: int, width: int, device: torch.device
) -> Iterator[tuple[Int[Tensor, "n"], Int[Tensor, "n"]]]:
    """Rows and columns of the pixels of each wave: every pixel's window lies in earlier waves.

    Pixels of equal `column + stride * row`, stride the least that leaves them unseen by one another: one more than the
    window's reach to the right a row up. A row where nothing to the left is seen, the image where nothing is. 7x4 on
    28x28: 136 waves.
    """
    if not any(i == 0 for i, _ in window):
        for pixel in torch.arange(height * width, device=device).split(width if window else height * width):
            yield pixel // width, pixel % width
        return
    stride = min(max(j // -i for i, j in window if i) + 1, width)
    for wave in range(width + stride * (height - 1)):
        first, last = max(0, (wave - width) // stride + 1), min(height - 1, wave // stride)
        i = torch.arange(first, last + 1, device=device)
        yield i, wave - stride * i
