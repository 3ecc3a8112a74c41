"""p(z): an autoregressive flow between codes and noise."""

from collections.abc import Iterator
from math import prod

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vlae.layers import MaskedLinear, at_least, small_steps
from vlae.window import neighbours, seen, waves, window

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


class MapMade(nn.Module):
    """The same for a code of maps, [C h w] in one row: each number from a window of earlier positions, all their
    channels, and from the earlier channels of its own position.

    One linear look at the window, then a MADE over the channels at every position. A wave of positions that do not
    see one another is one step for each channel.
    """

    neighbours: Tensor

    def __init__(self, code: list[int], width: int, scale: bool, receptive_field: str):
        super().__init__()
        self.code, self.window = code, window(receptive_field)
        if not self.window:
            raise ValueError("receptive_field=none: a prior of maps needs a window AxB, such as 7x3")
        self.register_buffer("neighbours", neighbours(self.window, *code[1:]), persistent=False)
        self.look = nn.Linear(code[0] * len(self.window), width, bias=False)
        self.channels = Made(code[0], width, scale, context=True)

    def forward(self, z: Float[Tensor, "B D"]) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D"]]:
        maps = z.unflatten(1, (self.code[0], -1))
        shift, log_scale = self.channels(maps.mT, self.look(seen(maps, self.neighbours)))
        return shift.mT.flatten(1), log_scale.mT.flatten(1)

    def one_by_one(self, z: Float[Tensor, "B D"]) -> Iterator[Part]:
        """Where in the code, shifts and log-scales there: fill each part in before the next."""
        channels, height, width = self.code
        maps = z.unflatten(1, (channels, height * width))
        for i, j in waves(self.window, height, width, z.device):
            position = i * width + j
            context = self.look(seen(maps, self.neighbours[position])).flatten(0, 1)
            here = z.new_zeros(len(context), channels)
            for c, shift, log_scale in self.channels.one_by_one(here, context):
                where = c * height * width + position
                yield where, shift.view(len(z), len(position)), log_scale.view(len(z), len(position))
                here[:, c] = z[:, where].flatten()


class Flow(nn.Module):
    """Steps between code and noise, each on the code in reverse order of the step before; none is N(0, 1).

    `code` counts the numbers of a code; `scale` says whether steps change volumes.
    """

    def __init__(self, code: int, scale: bool, steps: list[nn.Module]):
        super().__init__()
        self.code, self.scale, self.steps = code, scale, nn.ModuleList(steps)

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
        """The code of this noise: one dimension, or one channel of a wave, after the other. Without gradients."""
        with torch.autocast(eps.device.type, enabled=False), small_steps(eps.device, len(eps)):
            for k, step in reversed(list(enumerate(self.steps))):
                z = torch.empty_like(eps)
                for where, shift, log_scale in step.one_by_one(z):
                    z[:, where] = eps[:, where] * log_scale.exp() + shift
                eps = z.flip(1) if k else z
        return eps


class AFPrior(Flow):
    """Autoregressive-flow prior of a flat code (VLAE section 3.2; equation eps_i = (z_i - mu_i(z_<i)) / sigma_i(z_<i)).

    `depth` steps; depth 0 is N(0, 1). `scale: false` gives the paper's mean-only steps, which keep volumes (log_det
    0). Generation takes a step for each number of the code and each of `depth`.
    """

    def __init__(self, *, code: int, depth: int, width: int, scale: bool):
        at_least(1, width=width)
        at_least(0, depth=depth)
        super().__init__(code, scale, [Made(code, width, scale) for _ in range(depth if code else 0)])


class ConvAFPrior(Flow):
    """The same for a code of maps [C h w] (VLAE section 4.3): each step looks at a window of earlier positions.

    Positions are in raster order and the channels of a position in theirs, both reversed by the next step. Generation
    takes C steps for each wave of positions and each of `depth`: 16 * 36 * 6 for 16 maps of 8x8 and a window 7x3.
    """

    def __init__(self, *, code: list[int], depth: int, width: int, scale: bool, receptive_field: str):
        at_least(1, width=width)
        at_least(0, depth=depth)
        super().__init__(prod(code), scale, [MapMade(code, width, scale, receptive_field) for _ in range(depth)])
