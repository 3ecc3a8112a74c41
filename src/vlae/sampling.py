"""Images from noise: pixels that do not see one another are drawn together; a batch costs about a forward pass."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer
from torch import Tensor

from vlae.layers import small_steps
from vlae.model import VLAE, evaluating
from vlae.window import waves

Choose = Callable[[Tensor, Tensor, Tensor], Tensor]


@torch.no_grad()
def scan(model: VLAE, h: Float[Tensor, "b F H W"], choose: Choose, batch: int) -> Int[Tensor, "B C H W"]:
    """Fills images wave by wave: `choose(params [B P n], i, j)` gives the values [B C n] of the pixels (i, j)."""
    height, width = h.shape[2:]
    x = torch.zeros(batch, model.likelihood.channels, height, width, dtype=torch.long, device=h.device)
    u = model.unit(x)
    order = list(waves(model.decoder.window, height, width, h.device))
    with small_steps(h.device, batch * height * width // len(order)):
        for i, j in order:
            x[:, :, i, j] = values = choose(model.decoder.at(u, h, i, j), i, j)
            u[:, :, i, j] = model.unit(values)
    return x


@evaluating
def decode(model: VLAE, z: Float[Tensor, "B D"], uniform: Float[Tensor, "B C H W"]) -> Int[Tensor, "B C H W"]:
    """Pixels drawn from p(x | z) at `uniform` in [0, 1); ValueError for another shape than the model's images have."""
    if uniform.shape != (len(z), *model.decoder.shape):
        wanted = (len(z), *model.decoder.shape)
        raise ValueError(f"uniform of shape {tuple(uniform.shape)}; {wanted} is needed, a number for each value")
    h = model.decoder.features(z)
    return scan(model, h, lambda params, i, j: model.likelihood.sample(params, uniform[:, :, i, j]), len(z))


@evaluating
def sample(model: VLAE, eps: Float[Tensor, "B D"], uniform: Float[Tensor, "B C H W"]) -> Int[Tensor, "B C H W"]:
    """Images from the model: codes from `eps` ~ N(0, 1), pixels from `uniform`."""
    return decode(model, model.prior.inverse(eps), uniform)


@evaluating
def reconstruct(
    model: VLAE, x: Integer[Tensor, "B C H W"], eps: Float[Tensor, "B D"], uniform: Float[Tensor, "B C H W"]
) -> Int[Tensor, "B C H W"]:
    """A code of x at `eps`, fresh pixels: shows what the code kept of x."""
    z, _ = model.encode(x).rsample_with_log_prob(eps)
    return decode(model, z, uniform)


@evaluating
def interpolate(
    model: VLAE,
    start: Float[Tensor, "B D"],
    end: Float[Tensor, "B D"],
    along: Float[Tensor, "T"],
    uniform: Float[Tensor, "B C H W"],
) -> Int[Tensor, "B T C H W"]:
    """Images between two codes, `along` from 0 (start) to 1 (end) through the prior's noise; pixels share `uniform`."""
    a, b, t = model.prior(start)[0][:, None], model.prior(end)[0][:, None], along[:, None]
    # on the sphere: the middle of a chord is nearer to 0 than noise of N(0, 1) ever is
    eps = F.normalize(a.lerp(b, t), dim=2) * a.norm(dim=2, keepdim=True).lerp(b.norm(dim=2, keepdim=True), t)
    x = sample(model, eps.flatten(0, 1), uniform.repeat_interleave(len(along), 0))
    return x.unflatten(0, (len(start), len(along)))


@evaluating
def complete(
    model: VLAE,
    x: Integer[Tensor, "B C H W"],
    rows: int,
    eps: Float[Tensor, "K B D"],
    pick: Float[Tensor, "R B"],
    uniform: Float[Tensor, "R B C H W"],
) -> Int[Tensor, "R B C H W"]:
    """R times the first `rows` rows of x, each above a draw from p(lower rows | upper rows): exact as K grows.

    Sampling-importance-resampling: of K codes from the prior, at `eps` ~ N(0, 1), `pick` in [0, 1) takes one in
    proportion to p(upper rows | z), which no row below has a part in.

    Raises:
        ValueError: unless 0 <= rows <= H and K >= 1.
    """
    height, width = x.shape[2:]
    if not 0 <= rows <= height:
        raise ValueError(f"rows={rows}: must be 0 to {height}, the height of the images")
    if x.shape[1:] != model.decoder.shape:
        raise ValueError(f"images of {tuple(x.shape[1:])}; the model is for {tuple(model.decoder.shape)}")
    model.refuse_other(x, eps)
    given = torch.arange(rows * width, device=x.device)
    i, j = given // width, given % width

    def log_weight(z: Float[Tensor, "k B D"]) -> Float[Tensor, "k B"]:
        again = x.repeat(len(z), 1, 1, 1)
        params = model.decoder.at(model.unit(again), model.decoder.features(z.flatten(0, 1)), i, j)
        return model.likelihood.log_prob(params, again[:, :, i, j]).sum(1).view(len(z), -1)

    codes = model.prior.inverse(eps.flatten(0, 1)).view_as(eps)
    few = 1 + 64 // (1 + len(x))  # codes of each image a pass, so that a processor's cache holds it
    below = torch.cat([log_weight(z) for z in codes.split(few)]).softmax(0).cumsum(0)
    chosen = (below[:-1, None] <= pick).sum(0)  # [R, B]
    z = codes[chosen, torch.arange(len(x), device=x.device)].flatten(0, 1)
    upper, pixels = x.repeat(len(pick), 1, 1, 1), uniform.flatten(0, 1)

    def choose(params: Tensor, i: Tensor, j: Tensor) -> Tensor:
        drawn = model.likelihood.sample(params, pixels[:, :, i, j])
        return torch.where(i < rows, upper[:, :, i, j], drawn)

    return scan(model, model.decoder.features(z), choose, len(z)).unflatten(0, pick.shape)
