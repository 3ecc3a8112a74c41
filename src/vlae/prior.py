"""p(z): an autoregressive flow between codes and noise."""

from collections.abc import Iterator
from math import prod

from jaxtyping import Float
from torch import Tensor, nn

from vlae.flow import Flow, Made, Part
from vlae.layers import at_least
from vlae.window import neighbours, seen, waves, window


class MapMade(nn.Module):
    """The MADE for a code of maps, [C h w] in one row: each number from a window of earlier positions, all their
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
