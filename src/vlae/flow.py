"""An autoregressive flow between codes and noise: the prior's, or that of a posterior which sees the image."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vlae.layers import MaskedLinear, small_steps

Part = tuple[int | Tensor, Tensor, Tensor]


class Made(nn.Module):
    """Shift and log-scale of each z_i from z_<i: two masked hidden layers (MADE, Germain et al. 2015).

    Hidden units are sorted by degree: a unit of degree m sees z_1..z_m. Both outputs start at zero. Log-scales stay
    within (-2, 2), or are zero where `scale` is false. With `context`, which all units see, degrees begin at 0.
    """

    def __init__(self, code: int, width: int, scale: bool, context: bool = False):
        super().__init__()
        inputs, least = torch.arange(code) + 1, 0 if context else 1
        hidden = torch.arange(width) * (code - least) // width + least
        sees = [
            (hidden[:, None] >= inputs).float(),
            (hidden[:, None] >= hidden).float(),
            (inputs[:, None] > hidden).float(),
        ]
        self.first, self.second = MaskedLinear(sees[0]), MaskedLinear(sees[1])
        self.shift = MaskedLinear(sees[2])
        self.scale = MaskedLinear(sees[2]) if scale else None
        for layer in (self.shift, self.scale):
            if layer is not None:
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
        # units with degree below i+1: all that z_i may use
        self.ready = [int((hidden < i).sum()) for i in inputs]

    def forward(
        self, z: Float[Tensor, "*n D"], context: Float[Tensor, "*n F"] | None = None
    ) -> tuple[Float[Tensor, "*n D"], Float[Tensor, "*n D"]]:
        first = self.first(z) if context is None else self.first(z) + context
        h = F.relu(self.second(F.relu(first)))
        log_scale = torch.zeros_like(z) if self.scale is None else 2 * torch.tanh(self.scale(h) / 2)
        return self.shift(h), log_scale

    def one_by_one(self, z: Float[Tensor, "B D"], context: Float[Tensor, "B F"] | None = None) -> Iterator[Part]:
        """i, shift and log-scale of z_0, then z_1, ...: fill each in before the next. Each hidden unit once."""
        first, second = (z.new_empty(len(z), self.first.out_features) for _ in range(2))
        done = 0
        for i, ready in enumerate(self.ready):
            new = slice(done, ready)  # units of degree i: they see z_0..z_{i-1}
            own = F.linear(z[:, :i], self.first.weight[new, :i], self.first.bias[new])
            first[:, new] = F.relu(own if context is None else own + context[:, new])
            second[:, new] = F.relu(F.linear(first[:, :ready], self.second.weight[new, :ready], self.second.bias[new]))
            h, log_scale = second[:, :ready], z.new_zeros(len(z))
            if self.scale is not None:
                log_scale = 2 * torch.tanh((h @ self.scale.weight[i, :ready] + self.scale.bias[i]) / 2)
            yield i, h @ self.shift.weight[i, :ready] + self.shift.bias[i], log_scale
            done = ready


class Flow(nn.Module):
    """Steps between code and noise, each on the code in reverse order of the step before; none is the identity.

    `code` counts the numbers of a code; `scale` says whether steps change volumes.
    """

    def __init__(self, code: int, scale: bool, steps: list[nn.Module]):
        super().__init__()
        self.code, self.scale, self.steps = code, scale, nn.ModuleList(steps)

    def forward(
        self, z: Float[Tensor, "B D"], context: Float[Tensor, "B F"] | None = None
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B"]]:
        """Noise and log |det d eps / d z|: all dimensions at once. log p(z) = log N(eps; 0, 1) + log_det.

        Steps made for a context, and only these, are given one.
        """
        log_det = z.new_zeros(len(z))
        with torch.autocast(z.device.type, enabled=False):
            for k, step in enumerate(self.steps):
                z = z.flip(1) if k else z
                shift, log_scale = step(z) if context is None else step(z, context)
                z = (z - shift) * torch.exp(-log_scale)
                log_det = log_det - log_scale.sum(1)
        return z, log_det

    @torch.no_grad()
    def inverse(self, eps: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """The code of this noise: one dimension, or one channel of a wave, after the other. Without gradients."""
        with torch.autocast(eps.device.type, enabled=False), small_steps(eps.device, len(eps)):
            for k, step in reversed(list(enumerate(self.steps))):
                z = torch.empty_like(eps)
                for where, shift, log_scale in step.one_by_one(z):
                    z[:, where] = eps[:, where] * log_scale.exp() + shift
                eps = z.flip(1) if k else z
        return eps
