"""p(x | z, window): the parameters of each pixel from the code and a chosen window of earlier pixels."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlae.layers import ConvBlock, PixelBlock, Up, at_least, maps, pyramid, unit_gain
from vlae.window import neighbours, seen, window

LUMINANCE = 0.299, 0.587, 0.114
CONTRAST = 3.0


class Windowed(nn.Module):
    """What `trunk` makes of the code at every pixel, one look at the window, then pixelwise gated blocks.

    The window is exact (no pixel less, none more, no blind spot), and since nothing after the look mixes pixels,
    `at` gives the parameters of a few pixels at the cost of those pixels. With `grey` the window shows the luminance
    0.299 R + 0.587 G + 0.114 B alone, and the code has to keep colours (VLAE section 4.3). With `contrast` it looks at
    differences from the nearest pixel, enlarged: the same functions, learned faster, as neighbours are nearly equal.

    Raises:
        ValueError: for a bad window, a size below 1, a dropout outside [0, 1), or grey where there are no colours.
    """

    neighbours: Tensor  # of each pixel, the numbers of those in its window: [H W, N]
    luminance: Tensor

    def __init__(
        self,
        trunk: nn.Module,
        *,
        shape: tuple[int, int, int],
        num_params: int,
        receptive_field: str,
        features: int,
        width: int,
        depth: int,
        grey: bool = False,
        dropout: float = 0.0,
        contrast: bool = False,
    ):
        super().__init__()
        at_least(1, features=features, width=width)
        at_least(0, depth=depth)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}: must be at least 0 and below 1")
        if grey and shape[0] != 3:
            raise ValueError(f"grey=true: needs images of 3 channels, these have {shape[0]}")
        self.shape, self.window, self.grey = shape, window(receptive_field), grey
        self.contrast = contrast
        self.register_buffer("neighbours", neighbours(self.window, *shape[1:]), persistent=False)
        self.register_buffer("luminance", torch.tensor(LUMINANCE), persistent=False)
        self.trunk = trunk
        self.mix = nn.Linear(features, width)
        channels = 1 if grey else shape[0]
        self.look = nn.Linear(channels * len(self.window), width, bias=False) if self.window else None
        self.blocks = nn.Sequential(*(PixelBlock(width, dropout) for _ in range(depth)))
        self.head = nn.Linear(width, num_params)
        nn.init.zeros_(self.head.weight)  # a fresh model is uniform
        nn.init.zeros_(self.head.bias)

    def features(self, z: Float[Tensor, "B D"]) -> Float[Tensor, "b F H W"]:
        """What the code says about every pixel; one map for all images (b = 1) where the code is empty, else b = B."""
        return self.mix(self.trunk(z).movedim(1, -1)).movedim(-1, 1)

    def shown(self, u: Float[Tensor, "#B C H W"], neighbours: Int[Tensor, "n N"]) -> Float[Tensor, "#B n _"]:
        """What the look at the windows of n pixels is given."""
        if self.grey:
            u = torch.einsum("bchw,c->bhw", u, self.luminance.to(u))[:, None]
        values = seen(u.flatten(2), neighbours)
        if not self.contrast:
            return values
        others, nearest = values.unflatten(2, (-1, len(self.window))).split([len(self.window) - 1, 1], 3)
        return torch.cat([CONTRAST**2 * (others - nearest), CONTRAST * nearest], 3).flatten(2)

    def pixels(
        self, u: Float[Tensor, "#B C H W"], h: Float[Tensor, "#B n F"], neighbours: Int[Tensor, "n N"]
    ) -> Float[Tensor, "B P n"]:
        if self.look is not None:
            with torch.autocast(u.device.type, enabled=False):  # bfloat16 would round what is seen
                h = (h + self.look(self.shown(u, neighbours))).to(h.dtype)
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


def grown(shape: tuple[int, int, int], code: int, features: int, widths: list[int], hidden: int) -> nn.Sequential:
    """From a flat code: `hidden` units, then residual blocks, twice the size after each of `widths` from the last to
    the first, up to `features` maps."""
    at_least(1, features=features, widths=widths, hidden=hidden, **{"len(widths)": len(widths)})
    sizes = pyramid(*shape[1:], len(widths))
    layers = [nn.Linear(code or 1, hidden), nn.ELU(), nn.Linear(hidden, widths[-1] * sizes[-1][0] * sizes[-1][1])]
    layers += [nn.Unflatten(1, (widths[-1], *sizes[-1]))]
    for size, wide, out in zip(sizes[-2::-1], widths[::-1], [*widths[-2::-1], features], strict=True):
        layers += [ConvBlock(wide), nn.ELU(), Up(wide, out, size)]
    return nn.Sequential(*layers)


class PixelCNN(Windowed):
    """On what `grown` makes of a flat code. With a code of size 0 that is learned constants."""

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
        dropout: float = 0.0,
        widths: list[int],
        hidden: int,
    ):
        super().__init__(
            grown(shape, code, features, widths, hidden),
            shape=shape,
            num_params=num_params,
            receptive_field=receptive_field,
            features=features,
            width=width,
            depth=depth,
            dropout=dropout,
        )
        self.constant = code == 0

    def features(self, z: Float[Tensor, "B D"]) -> Float[Tensor, "b F H W"]:
        return super().features(z.new_ones(1, 1) if self.constant else z)


class MapPixelCNN(Windowed):
    """From a code of maps: the mirror of `MapEncoder`, up to `features` maps, and a dropout in the pixelwise blocks.

    Raises:
        ValueError: for a code of other maps than the last width has, or other than one count of blocks a width.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, int, int],
        code: list[int],
        num_params: int,
        receptive_field: str,
        grey: bool,
        features: int,
        width: int,
        depth: int,
        dropout: float,
        widths: list[int],
        blocks: list[int],
    ):
        at_least(1, features=features)
        sizes = maps(shape, code, widths, blocks)
        layers: list[nn.Module] = [nn.Unflatten(1, tuple(code)), nn.Conv2d(code[0], widths[-1], 3, padding=1)]
        for level in reversed(range(len(widths))):
            layers += [ConvBlock(widths[level]) for _ in range(blocks[level])]
            layers += [nn.ELU(), Up(widths[level], widths[level - 1], sizes[level - 1])] if level else []
        layers += [nn.ELU(), nn.Conv2d(widths[0], features, 1)]
        super().__init__(
            unit_gain(nn.Sequential(*layers)),
            shape=shape,
            num_params=num_params,
            receptive_field=receptive_field,
            features=features,
            width=width,
            depth=depth,
            grey=grey,
            dropout=dropout,
            contrast=True,
        )
