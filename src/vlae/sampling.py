"""Images from noise: pixels that do not see one another are drawn together, at the cost of about one forward pass."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from vlae.model import VLAE

Choose = Callable[[Tensor, Tensor, Tensor], Tensor]


def waves(
    window: list[tuple[int, int]], height: int, width: int
) -> Iterator[tuple[Int[Tensor, "n"], Int[Tensor, "n"]]]:
    """Rows and columns of the pixels of each wave: every pixel's window lies in earlier waves.

    Pixels of equal `column + stride * row` with stride one more than the window's reach to the right; a row where
    nothing to the left is seen, the image where nothing is. 7x4 on 28x28: 136 waves.
    """
    i, j = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    right = max((b for _, b in window), default=0)
    if any(a == 0 for a, _ in window):
        number = j + min(right + 1, width) * i
    else:
        number = i if window else torch.zeros_like(i)
    for wave in range(int(number.max()) + 1):
        rows, columns = torch.where(number == wave)
        yield rows, columns


@torch.no_grad()
def scan(model: VLAE, h: Float[Tensor, "b F H W"], choose: Choose, batch: int) -> Int[Tensor, "B C H W"]:
    """Fills images wave by wave: `choose(params [B P n], i, j)` gives the values [B C n] of the pixels (i, j)."""
    channels, (height, width) = model.likelihood.channels, h.shape[2:]
    x = torch.zeros(batch, channels, height, width, dtype=torch.long, device=h.device)
    u = model.unit(x)
    for i, j in waves(model.decoder.window, height, width):
        i, j = i.to(h.device), j.to(h.device)
        x[:, :, i, j] = choose(model.decoder.at(u, h, i, j), i, j)
        u[:, :, i, j] = model.unit(x[:, :, i, j])
    return x


def decode(model: VLAE, z: Float[Tensor, "B D"], uniform: Float[Tensor, "B C H W"]) -> Int[Tensor, "B C H W"]:
    """Pixels drawn from p(x | z) at `uniform` in [0, 1)."""
    with torch.no_grad():
        h = model.decoder.features(z)
    return scan(model, h, lambda params, i, j: model.likelihood.sample(params, uniform[:, :, i, j]), len(z))


def sample(model: VLAE, eps: Float[Tensor, "B D"], uniform: Float[Tensor, "B C H W"]) -> Int[Tensor, "B C H W"]:
    """Images from the model: codes from `eps` ~ N(0, 1), pixels from `uniform`."""
    return decode(model, model.prior.inverse(eps), uniform)


def reconstruct(
    model: VLAE, x: Integer[Tensor, "B C H W"], eps: Float[Tensor, "B D"], uniform: Float[Tensor, "B C H W"]
) -> Int[Tensor, "B C H W"]:
    """A code of x at `eps`, fresh pixels: shows what the code kept of x."""
    with torch.no_grad():
        z, _ = model.encode(x).rsample_with_log_prob(eps)
    return decode(model, z, uniform)
