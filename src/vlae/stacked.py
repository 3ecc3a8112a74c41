"""The paper's own decoder of binary images: a stack of small masked convolutions, which leaves a blind spot."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlae.decoder import grown
from vlae.layers import at_least

BEFORE = ((-1, -1), (-1, 0), (-1, 1), (0, -1))  # what a masked 3x3 convolution sees, (down, right)


class PointBlock(nn.Module):
    """x + W elu(V elu(norm(x))), 1x1; starts as the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.hidden, self.out = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, x: Float[Tensor, "B F H W"]) -> Float[Tensor, "B F H W"]:
        return x + self.out(F.elu(self.hidden(active(x))))


def active(x: Float[Tensor, "B F H W"]) -> Float[Tensor, "B F H W"]:
    """elu(norm(x)), the norm over the channels of each pixel by itself."""
    return F.elu(F.layer_norm(x.movedim(1, 3), x.shape[1:2]).movedim(3, 1))


class StackedPixelCNN(nn.Module):
    """`layers` masked 3x3 convolutions of `filters`, the first without the pixel itself, the others residual and of the
    same weights; two 1x1 residual blocks after every second but the last; beside the image, `features` maps that
    `grown` makes of a flat code and that no mask touches (VLAE section 4.1: 6 layers, 12 filters, 4 maps).

    Where the paper normalises weights, this normalises channels. The window is a triangle: 69 pixels for 6 layers, up
    to 6 rows up, columns -6 to 6. `at` costs a whole pass, and drawing an image one for each wave, 82 at 28x28.

    Raises:
        ValueError: for a size below 1, or fewer than two layers.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, int, int],
        code: int,
        num_params: int,
        features: int,
        filters: int,
        layers: int,
        widths: list[int],
        hidden: int,
    ):
        super().__init__()
        at_least(1, filters=filters)
        at_least(2, layers=layers)
        self.shape, self.layers, self.constant = shape, layers, code == 0
        self.trunk = grown(shape, code, features, widths, hidden)
        self.mix = nn.Conv2d(features, filters, 3, padding=1)
        self.first = nn.Conv2d(shape[0], filters, 3, padding=1, bias=False)
        self.later = nn.Conv2d(filters, filters, 3, padding=1)
        self.points = nn.ModuleList(
            nn.Sequential(PointBlock(filters), PointBlock(filters)) for _ in range(2, layers, 2)
        )
        self.head = nn.Conv2d(filters, num_params, 1)
        nn.init.zeros_(self.head.weight)  # a fresh model is uniform
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]
        mask = torch.zeros(2, 3, 3)
        for down, right in BEFORE:
            mask[:, 1 + down, 1 + right] = 1
        mask[1, 1, 1] = 1
        self.register_buffer("mask", mask, persistent=False)
        offsets = {(0, 0)}
        for _ in range(layers - 1):
            offsets |= {(i + down, j + right) for i, j in offsets for down, right in BEFORE}
        self.window = sorted({(i + down, j + right) for i, j in offsets for down, right in BEFORE})

    mask: Tensor

    def features(self, z: Float[Tensor, "B D"]) -> Float[Tensor, "b F H W"]:
        """What the code says about every pixel; one map for all images (b = 1) where the code is empty, else b = B."""
        return self.mix(self.trunk(z.new_ones(1, 1) if self.constant else z))

    def forward(self, u: Float[Tensor, "#B C H W"], h: Float[Tensor, "#B F H W"]) -> Float[Tensor, "B P H W"]:
        """Parameters of all pixels at once, from the true earlier pixels; one image may go with many codes."""
        x = h + F.conv2d(u, self.first.weight * self.mask[0], padding=1)
        for layer in range(1, self.layers):
            x = x + F.conv2d(active(x), self.later.weight * self.mask[1], self.later.bias, padding=1)
            if layer % 2 and layer + 1 < self.layers:
                x = self.points[layer // 2](x)
        return self.head(active(x))

    def at(
        self, u: Float[Tensor, "B C H W"], h: Float[Tensor, "b F H W"], i: Int[Tensor, "n"], j: Int[Tensor, "n"]
    ) -> Float[Tensor, "B P n"]:
        """Parameters of the pixels (i, j) alone."""
        return self(u, h)[:, :, i, j]
