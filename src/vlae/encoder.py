"""q(z | x): images to the distribution of their codes."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vlae.layers import ConvBlock, at_least, full, maps, normal_log_prob, pyramid, unit_gain


class Normal(NamedTuple):
    """Independent normals, one for each number of the code."""

    mean: Float[Tensor, "B D"]
    log_scale: Float[Tensor, "B D"]

    def rsample_with_log_prob(self, eps: Float[Tensor, "B D"]) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B"]]:
        """z = mean + scale * eps and log q(z | x) in nats, differentiable in mean and scale."""
        return self.mean + self.log_scale.exp() * eps, normal_log_prob(eps) - self.log_scale.sum(1)


class Encoder(nn.Module):
    """Residual network: for each of `widths` a stride-2 convolution and a block, then `hidden` units.

    Any image size: sizes are halved and rounded up. A code of size 0 makes an empty posterior without parameters.
    """

    def __init__(self, *, shape: tuple[int, int, int], code: int, widths: list[int], hidden: int):
        super().__init__()
        at_least(1, widths=widths, hidden=hidden)
        layers: list[nn.Module] = []
        channels = shape[0]
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), ConvBlock(width)]
            channels = width
        height, width = pyramid(*shape[1:], len(widths))[-1]
        layers += [nn.ELU(), nn.Flatten(), nn.Linear(channels * height * width, hidden), nn.ELU()]
        self.net = nn.Sequential(*layers, nn.Linear(hidden, 2 * code)) if code else None

    def forward(self, u: Float[Tensor, "B C H W"]) -> Normal:
        if self.net is None:
            return Normal(full(u.new_zeros(len(u), 0)), full(u.new_zeros(len(u), 0)))
        mean, log_scale = full(self.net(u.contiguous(memory_format=torch.channels_last))).chunk(2, 1)
        return Normal(mean, log_scale.clamp(-7, 7))


class MapEncoder(nn.Module):
    """Residual network to a code of maps [C h w], flattened: at each of `widths` as many of `blocks`, a stride-2
    convolution between (VLAE section 4.3: widths 48, 96, 96 and blocks 2, 2, 3).

    Raises:
        ValueError: for a code of other maps than the last width has, or other than one count of blocks a width.
    """

    def __init__(self, *, shape: tuple[int, int, int], code: list[int], widths: list[int], blocks: list[int]):
        super().__init__()
        maps(shape, code, widths, blocks)
        layers: list[nn.Module] = [nn.Conv2d(shape[0], widths[0], 3, padding=1)]
        for level, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            if level:
                layers.append(nn.Conv2d(widths[level - 1], width, 3, stride=2, padding=1))
            layers += [ConvBlock(width) for _ in range(count)]
        self.net = unit_gain(nn.Sequential(*layers, nn.ELU()))
        self.out = nn.Linear(widths[-1], 2 * code[0])

    def forward(self, u: Float[Tensor, "B C H W"]) -> Normal:
        h = self.net(u.contiguous(memory_format=torch.channels_last)).movedim(1, 3)
        # normalised, and no clamp: one large step would leave scales where no gradient reaches them any more
        mean, log_scale = full(self.out(F.layer_norm(h, h.shape[3:]))).movedim(3, 1).chunk(2, 1)
        return Normal(mean.flatten(1), 7 * torch.tanh(log_scale.flatten(1) / 7))
