"""p(x | params) of a pixel: densities over integers, in nats."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn

from vlae.layers import at_least, full

Params = Sequence[Float[Tensor, "B M *n"]]


class Likelihood(nn.Module, ABC):
    """The distribution of one pixel's integers 0..levels-1, given `num_params` numbers from the decoder.

    A pixel's channels are autoregressive: `pmf` is the distribution of the next channel given the earlier ones.
    Wherever `*n` stands, any number of pixel axes may stand.
    """

    num_params: int

    def __init__(self, channels: int, levels: int):
        super().__init__()
        self.channels, self.levels = channels, levels

    @abstractmethod
    def log_prob(self, params: Float[Tensor, "B P *n"], x: Integer[Tensor, "B C *n"]) -> Float[Tensor, "B *n"]:
        """log p(x) in nats, summed over the channels of a pixel."""

    @abstractmethod
    def pmf(self, params: Float[Tensor, "B P *n"], x: Integer[Tensor, "B c *n"]) -> Float[Tensor, "B V *n"]:
        """Probabilities of the values of channel c, given channels 0..c-1 in `x`."""

    def sample(self, params: Float[Tensor, "B P *n"], uniform: Float[Tensor, "B C *n"]) -> Int[Tensor, "B C *n"]:
        """The inverse CDF at `uniform` in [0, 1), channel by channel."""
        x = torch.empty_like(uniform[:, :0], dtype=torch.long)
        for c in range(self.channels):
            below = self.pmf(params, x).cumsum(1)[:, :-1] <= uniform[:, c : c + 1]
            x = torch.cat([x, below.sum(1, keepdim=True)], 1)
        return x


class Bernoulli(Likelihood):
    """Black or white: one logit a pixel.

    Raises:
        ValueError: for more than two levels or more than one channel.
    """

    num_params = 1

    def __init__(self, *, channels: int, levels: int):
        super().__init__(channels, levels)
        if (channels, levels) != (1, 2):
            raise ValueError(f"Bernoulli needs 1 channel of 2 levels, got {channels} of {levels}; use LogisticMixture")

    def log_prob(self, params: Float[Tensor, "B P *n"], x: Integer[Tensor, "B C *n"]) -> Float[Tensor, "B *n"]:
        logit, x = full(params[:, 0]), x[:, 0]
        return F.logsigmoid(torch.where(x > 0, logit, -logit))

    def pmf(self, params: Float[Tensor, "B P *n"], x: Integer[Tensor, "B c *n"]) -> Float[Tensor, "B V *n"]:
        logit = full(params[:, :1])
        return torch.cat([-logit, logit], 1).sigmoid()


class LogisticMixture(Likelihood):
    """Discretised mixture of logistics (PixelCNN++, Salimans et al. 2017, 2.1 and 2.2), 2 to 256 levels on [-1, 1].

    A bin is as wide as the step between levels; the lowest and the highest reach to infinity. The channels of a pixel
    share their component, and a channel's mean moves linearly with the earlier channels. Parameters, `components` of
    each: mixture logits; each channel's means; its log-scales; for each pair of channels a coefficient, before its
    tanh. With all of them zero the means are spread over [-1, 1] and the scales 1 / `components`: each
    channel by itself is nearly uniform.

    Raises:
        ValueError: for levels outside 2..256 or no components.
    """

    spread: Tensor

    def __init__(self, *, channels: int, levels: int, components: int):
        super().__init__(channels, levels)
        at_least(1, components=components)
        if not 2 <= levels <= 256:
            raise ValueError(f"LogisticMixture needs 2 to 256 levels, got {levels}")
        self.sizes = [1, channels, channels, channels * (channels - 1) // 2]
        self.num_params = components * sum(self.sizes)
        # equal components would get equal gradients for ever
        means = torch.linspace(-1, 1, components) if components > 1 else torch.zeros(1)
        self.register_buffer("spread", means, persistent=False)

    def split(self, params: Float[Tensor, "B P *n"]) -> Params:
        """Each parameter of the components; by `unbind`, as a slice's gradient is a whole tensor of zeros."""
        return full(params).unflatten(1, (sum(self.sizes), -1)).unbind(1)

    def logistics(
        self, params: Params, x: Integer[Tensor, "B c *m"]
    ) -> tuple[Float[Tensor, "B M *n"], Float[Tensor, "B M *n"]]:
        """Mean and log-scale of each component for channel c, given the earlier channels."""
        c, half = x.shape[1], 1 / (self.levels - 1)
        means, log_scales, coefficients = 1, 1 + self.channels, 1 + 2 * self.channels
        mean = params[means + c] + self.spread.to(params[0]).view(-1, *[1] * (params[0].ndim - 2))
        for j in range(c):
            moves = params[coefficients + c * (c - 1) // 2 + j].tanh()
            mean = mean + moves * (2 * half * x[:, j : j + 1].to(mean) - 1)
        return mean, (params[log_scales + c] - math.log(len(self.spread))).clamp(-7, 7)

    def log_mass(
        self, params: Params, x: Integer[Tensor, "B c *n"], value: Integer[Tensor, "B 1 *n"]
    ) -> Float[Tensor, "B M *n"]:
        """log P(value of channel c) of each component, given the earlier channels."""
        half = 1 / (self.levels - 1)
        mean, log_scale = self.logistics(params, x)
        u = 2 * half * value.to(mean) - 1
        hi, lo = (u + half - mean) * torch.exp(-log_scale), (u - half - mean) * torch.exp(-log_scale)
        # log(sigmoid(hi) - sigmoid(lo)); width is the bin's own, as hi - lo would cancel in float32
        width = 2 * half * torch.exp(-log_scale)
        first, last = value == 0, value == self.levels - 1
        return (
            torch.where(last, 0.0, F.logsigmoid(hi))
            + torch.where(first, 0.0, F.logsigmoid(-lo))
            + torch.where(first | last, 0.0, torch.log(-torch.expm1(-width)))
        )

    def components(self, params: Params, x: Integer[Tensor, "B c *n"]) -> Float[Tensor, "B M *n"]:
        """log(weight x mass of the channels in `x`) of each component."""
        masses = (self.log_mass(params, x[:, :c], x[:, c : c + 1]) for c in range(x.shape[1]))
        return params[0].log_softmax(1) + sum(masses)

    def log_prob(self, params: Float[Tensor, "B P *n"], x: Integer[Tensor, "B C *n"]) -> Float[Tensor, "B *n"]:
        return self.components(self.split(params.contiguous()), x).logsumexp(1)

    def pmf(self, params: Float[Tensor, "B P *n"], x: Integer[Tensor, "B c *n"]) -> Float[Tensor, "B V *n"]:
        """As `log_mass`, but of all values; no logarithms, and one component after the other: several times faster."""
        split, half = self.split(params), 1 / (self.levels - 1)
        edges = 2 * half * torch.arange(self.levels - 1, dtype=split[0].dtype, device=params.device) + half - 1
        total = split[0].new_zeros(len(params), self.levels, *params.shape[2:])
        each = self.components(split, x).softmax(1), *self.logistics(split, x)
        for weight, mean, log_scale in zip(*(part.split(1, 1) for part in each), strict=True):  # [B, 1, *n]
            edge = (edges.view(-1, *[1] * (params.ndim - 2)) - mean) * torch.exp(-log_scale)
            below, above = edge.sigmoid(), (-edge).sigmoid()
            inner = below[:, 1:] * above[:, :-1] * -torch.expm1(-2 * half * torch.exp(-log_scale))
            total += weight * torch.cat([below[:, :1], inner, above[:, -1:]], 1)
        return total

    def sample(self, params: Float[Tensor, "B P *n"], uniform: Float[Tensor, "B C *n"]) -> Int[Tensor, "B C *n"]:
        """As by `pmf`, but by bisection of the CDF: 8 looks at it for 256 levels."""
        split, half = self.split(params), 1 / (self.levels - 1)
        x = torch.empty_like(uniform[:, :0], dtype=torch.long)
        for c in range(self.channels):
            weight, (mean, log_scale) = self.components(split, x).softmax(1), self.logistics(split, x)
            value = torch.zeros_like(uniform[:, c : c + 1], dtype=torch.long)
            for bit in reversed(range((self.levels - 1).bit_length())):
                higher = value + 2**bit
                edge = 2 * half * higher.to(mean) - half - 1  # between `higher` and the value below
                below = (weight * ((edge - mean) * torch.exp(-log_scale)).sigmoid()).sum(1, keepdim=True)
                value = torch.where((higher < self.levels) & (below <= uniform[:, c : c + 1]), higher, value)
            x = torch.cat([x, value], 1)
        return x
