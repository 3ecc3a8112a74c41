"""q(z | x): images to the distribution of their codes."""

from math import prod
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vlae.flow import Flow, Made
from vlae.layers import ConvBlock, at_least, full, maps, normal_log_prob, pyramid, unit_gain


class Normal(NamedTuple):
    """Independent normals, one for each number of the code."""

    mean: Float[Tensor, "B D"]
    log_scale: Float[Tensor, "B D"]

    def rsample_with_log_prob(self, eps: Float[Tensor, "B D"]) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B"]]:
        """z = mean + scale * eps and log q(z | x) in nats, differentiable in mean and scale. ValueError for noise of
        another shape, which would be spread over the code."""
        if eps.shape != self.mean.shape:
            raise ValueError(f"noise of shape {tuple(eps.shape)} for codes of shape {tuple(self.mean.shape)}")
        return self.mean + self.log_scale.exp() * eps, normal_log_prob(eps) - self.log_scale.sum(1)

    def repeat(self, k: int) -> "Normal":
        """Of each image k times, all of them in turn."""
        return Normal(*(part.repeat(k, 1) for part in self))


class IAF(NamedTuple):
    """Independent normals, then a flow that sees the image (inverse autoregressive flow, Kingma et al. 2016)."""

    start: Normal
    context: Float[Tensor, "B F"]
    flow: Flow

    def rsample_with_log_prob(self, eps: Float[Tensor, "B D"]) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B"]]:
        """z = flow(mean + scale * eps) and log q(z | x) in nats, differentiable in all that the encoder gives."""
        start, log_q = self.start.rsample_with_log_prob(eps)
        z, log_det = self.flow(start, self.context)
        return z, log_q - log_det

    def repeat(self, k: int) -> "IAF":
        """Of each image k times, all of them in turn."""
        return IAF(self.start.repeat(k), self.context.repeat(k, 1), self.flow)

    @property
    def mean(self) -> Float[Tensor, "B D"]:
        """The code at eps = 0."""
        return self.flow(self.start.mean, self.context)[0]

    @property
    def log_scale(self) -> Float[Tensor, "B D"]:
        """Of the normals before the flow, which shifts alone and reverses the order before each step but the first."""
        scale = self.start.log_scale
        return scale.flip(1) if len(self.flow.steps) % 2 == 0 else scale


def independent(q: Normal | IAF) -> Normal:
    """ValueError for a posterior that is not of independent normals."""
    if not isinstance(q, Normal):
        raise ValueError("model.encoder.posterior=iaf: codes are made into bytes for posterior=normal alone")
    return q


class Encoder(nn.Module):
    """Residual network: for each of `widths` a stride-2 convolution and a block, then `hidden` units.

    Any image size: sizes are halved and rounded up. A code of size 0 makes an empty posterior without parameters.
    `posterior: iaf` adds a flow of `depth` steps that shift alone, as the prior's; the first layer of its hidden units,
    `width` of them, is told what the image is (the ablation of VLAE section 4.1).
    """

    def __init__(
        self,
        *,
        shape: tuple[int, int, int],
        code: int,
        widths: list[int],
        hidden: int,
        posterior: Literal["normal", "iaf"] = "normal",
        depth: int = 4,
        width: int = 640,
    ):
        super().__init__()
        at_least(1, widths=widths, hidden=hidden, depth=depth, width=width)
        layers: list[nn.Module] = []
        channels = shape[0]
        for wide in widths:
            layers += [nn.Conv2d(channels, wide, 3, stride=2, padding=1), ConvBlock(wide)]
            channels = wide
        layers += [nn.ELU(), nn.Flatten(), nn.Linear(channels * prod(pyramid(*shape[1:], len(widths))[-1]), hidden)]
        inverse = posterior == "iaf" and code > 0
        self.flow = (
            Flow(code, False, [Made(code, width, False, context=True) for _ in range(depth)]) if inverse else None
        )
        self.sizes = [code, code, width] if inverse else [code, code]
        self.net = nn.Sequential(*layers, nn.ELU(), nn.Linear(hidden, sum(self.sizes))) if code else None

    def forward(self, u: Float[Tensor, "B C H W"]) -> Normal | IAF:
        if self.net is None:
            return Normal(full(u.new_zeros(len(u), 0)), full(u.new_zeros(len(u), 0)))
        parts = full(self.net(u.contiguous(memory_format=torch.channels_last))).split(self.sizes, 1)
        start = Normal(parts[0], parts[1].clamp(-7, 7))
        return start if self.flow is None else IAF(start, parts[2], self.flow)


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
