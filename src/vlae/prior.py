"""p(z): an autoregressive flow between codes and noise."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vlae.layers import MaskedLinear, at_least, small_steps


class Made(nn.Module):
    """Shift and log-scale of each z_i from z_<i: two masked hidden layers (MADE, Germain et al. 2015).

    Hidden units are sorted by degree: a unit of degree m sees z_1..z_m. Both outputs start at zero. Log-scales stay
    within (-2, 2), or are zero where `scale` is false.
    """

    def __init__(self, code: int, width: int, scale: bool):
        super().__init__()
        inputs = torch.arange(code) + 1
        hidden = torch.arange(width) * (code - 1) // width + 1
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

    def forward(self, z: Float[Tensor, "B D"]) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D"]]:
        h = F.relu(self.second(F.relu(self.first(z))))
        log_scale = torch.zeros_like(z) if self.scale is None else 2 * torch.tanh(self.scale(h) / 2)
        return self.shift(h), log_scale

    def one_by_one(self, z: Float[Tensor, "B D"]) -> Iterator[tuple[Float[Tensor, "B"], Float[Tensor, "B"]]]:
        """Shift and log-scale of z_0, then z_1, ...: fill each in before the next. Hidden units are computed once."""
        first, second = (z.new_empty(len(z), self.first.out_features) for _ in range(2))
        done = 0
        for i, ready in enumerate(self.ready):
            new = slice(done, ready)  # units of degree i: they see z_0..z_{i-1}
            first[:, new] = F.relu(F.linear(z[:, :i], self.first.weight[new, :i], self.first.bias[new]))
            second[:, new] = F.relu(F.linear(first[:, :ready], self.second.weight[new, :ready], self.second.bias[new]))
            h, log_scale = second[:, :ready], z.new_zeros(len(z))
            if self.scale is not None:
                log_scale = 2 * torch.tanh((h @ self.scale.weight[i, :ready] + self.scale.bias[i]) / 2)
            yield h @ self.shift.weight[i, :ready] + self.shift.bias[i], log_scale
            done = ready

    def invert(self, eps: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """z with (z - shift(z)) / scale(z) = eps, one dimension after the other."""
        z = torch.empty_like(eps)
        for i, (shift, log_scale) in enumerate(self.one_by_one(z)):
            z[:, i] = eps[:, i] * log_scale.exp() + shift
        return z


class AFPrior(nn.Module):
    """Autoregressive-flow prior of a flat code (VLAE section 3.2; equation eps_i = (z_i - mu_i(z_<i)) / sigma_i(z_<i)).

    `depth` steps, each on the code in reverse order of the step before; depth 0 is N(0, 1). `scale: false` gives
    the paper's mean-only steps, which keep volumes (log_det 0).
    """

    def __init__(self, *, code: int, depth: int, width: int, scale: bool):
        super().__init__()
        at_least(1, width=width)
        at_least(0, depth=depth)
        self.code = code
        self.steps = nn.ModuleList(Made(code, width, scale) for _ in range(depth if code else 0))

    def forward(self, z: Float[Tensor, "B D"]) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B"]]:
        """Noise and log |det d eps / d z|: all dimensions at once. log p(z) = log N(eps; 0, 1) + log_det."""
        log_det = z.new_zeros(len(z))
        with torch.autocast(z.device.type, enabled=False):
            for k, step in enumerate(self.steps):
                z = z.flip(1) if k else z
                shift, log_scale = step(z)
                z = (z - shift) * torch.exp(-log_scale)
                log_det = log_det - log_scale.sum(1)
        return z, log_det

    @torch.no_grad()
    def inverse(self, eps: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """The code of this noise: one dimension after the other. Without gradients."""
        with torch.autocast(eps.device.type, enabled=False), small_steps(eps.device, len(eps)):
            for k, step in reversed(list(enumerate(self.steps))):
                eps = step.invert(eps)
                eps = eps.flip(1) if k else eps
        return eps
