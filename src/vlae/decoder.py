"""p(x | z, window): the parameters of each pixel from the code and a chosen window of earlier pixels."""

import re

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlae.layers import ConvBlock, PixelBlock, Up, at_least, pyramid


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


class PixelCNN(nn.Module):
    """Features of the code at every pixel, one look at the window, then pixelwise gated blocks.

    The window is exact (no pixel less, none more, no blind spot), and since nothing after the look mixes pixels,
    `at` gives the parameters of a few pixels at the cost of those pixels. With a code of size 0 the features are
    learned constants.

    Raises:
        ValueError: for a bad window or a size below 1.
    """

    neighbours: Tensor  # of each pixel, the numbers of those in its window: [H W, N]

    def __init__(
        self,
        *,
        shape: tuple[int, int, int],
        code: int,
        num_params: int,
        receptive_field: str,
        features: int,
        width: int,
        depth: int,
        widths: list[int],
        hidden: int,
    ):
        super().__init__()
        at_least(1, features=features, width=width, widths=widths, hidden=hidden)
        at_least(0, depth=depth)
        at_least(1, **{"len(widths)": len(widths)})
        self.shape, self.window = shape, window(receptive_field)
        pixel = torch.arange(shape[1] * shape[2])[:, None]
        down, right = torch.tensor(self.window, dtype=torch.long).view(-1, 2).unbind(1)
        row, column = pixel // shape[2] + down, pixel % shape[2] + right
        inside = (row >= 0) & (column >= 0) & (column < shape[2])
        # beyond the borders all see one more pixel after the last, a 0
        neighbours = torch.where(inside, row * shape[2] + column, len(pixel))
        self.register_buffer("neighbours", neighbours, persistent=False)

        self.constant = code == 0
        sizes = pyramid(*shape[1:], len(widths))
        layers = [nn.Linear(code or 1, hidden), nn.ELU(), nn.Linear(hidden, widths[-1] * sizes[-1][0] * sizes[-1][1])]
        layers += [nn.Unflatten(1, (widths[-1], *sizes[-1]))]
        for size, wide, out in zip(sizes[-2::-1], widths[::-1], [*widths[-2::-1], features], strict=True):
            layers += [ConvBlock(wide), nn.ELU(), Up(wide, out, size)]
        self.trunk = nn.Sequential(*layers)

        self.mix = nn.Linear(features, width)
        self.look = nn.Linear(shape[0] * len(self.window), width, bias=False) if self.window else None
        self.blocks = nn.Sequential(*(PixelBlock(width) for _ in range(depth)))
        self.head = nn.Linear(width, num_params)
        nn.init.zeros_(self.head.weight)  # a fresh model is uniform
        nn.init.zeros_(self.head.bias)

    def features(self, z: Float[Tensor, "B D"]) -> Float[Tensor, "b F H W"]:
        """What the code says about every pixel; one map for all images (b = 1) where the code is empty, else b = B."""
        h = self.trunk(z.new_ones(1, 1) if self.constant else z)
        return self.mix(h.movedim(1, -1)).movedim(-1, 1)

    def pixels(
        self, u: Float[Tensor, "#B C H W"], h: Float[Tensor, "#B n F"], neighbours: Int[Tensor, "n N"]
    ) -> Float[Tensor, "B P n"]:
        if self.look is not None:
            seen = F.pad(u.flatten(2), (0, 1))[:, :, neighbours]  # [B, C, n, N]
            h = h + self.look(seen.movedim(1, 2).flatten(2))
        return self.head(self.blocks(h)).mT.expand(max(len(u), len(h)), -1, -1)

    def forward(self, u: Float[Tensor, "#B C H W"], h: Float[Tensor, "#B F H W"]) -> Float[Tensor, "B P H W"]:
        """Parameters of all pixels at once, from the true earlier pixels; one image may go with many codes."""
        return self.pixels(u, h.flatten(2).mT, self.neighbours).unflatten(2, h.shape[2:])

    def at(
        self, u: Float[Tensor, "B C H W"], h: Float[Tensor, "b F H W"], i: Int[Tensor, "n"], j: Int[Tensor, "n"]
    ) -> Float[Tensor, "B P n"]:
        """Parameters of the pixels (i, j) alone; `u` needs no more than their windows filled in."""
        pixel = i * h.shape[3] + j
        return self.pixels(u, h.flatten(2).mT.index_select(1, pixel), self.neighbours[pixel])
