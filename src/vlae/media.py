"""What W&B shows of a model beside its curves."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Integer
from torch import Tensor

from vlae.figures import grid
from vlae.model import VLAE
from vlae.noise import generator
from vlae.sampling import reconstruct


@torch.no_grad()
def media(
    model: VLAE, x: Integer[Tensor, "N C H W"], y: Integer[Tensor, " N"] | None, pictures: dict[str, Any], seed: int
) -> dict[str, Any]:
    """The pictures (arrays of uint8, or paths); a histogram of the noise that the prior finds for codes of x, what is
    beyond 6 at its ends; and by classes y, unless -1, a table: an image of each, 50 at most, and reconstructions of it.
    """
    import wandb

    # uint8, as it draws floats in [0, 1] black
    shown: dict[str, Any] = {f"pictures/{name}": wandb.Image(picture) for name, picture in pictures.items()}
    noise, code = generator("media", seed), model.prior.code
    if code:
        eps = torch.randn(len(x), code, generator=noise).to(x.device)
        found, _ = model.prior(model.encode(x).rsample_with_log_prob(eps)[0])
        counted = np.histogram(found.float().clamp(-6, 6).cpu(), 64, (-6, 6))
        shown["codes/noise"] = wandb.Histogram(np_histogram=counted)
    if y is not None and y.min() >= 0:
        classes, first = np.unique(y, return_index=True)
        x = x[first[:50]]
        eps = torch.randn(len(x), code, generator=noise).to(x.device)
        uniform = torch.rand(4, *x.shape, generator=noise).to(x.device)
        drawn = torch.stack([x, *(reconstruct(model, x, eps, pixels) for pixels in uniform)], 1)
        table = wandb.Table(columns=["class", "original", *(f"reconstruction {k}" for k in range(1, 5))])
        for label, row in zip(classes, drawn, strict=False):
            cells = (wandb.Image(grid(each[None], model.likelihood.levels, 1)) for each in row)
            table.add_data(int(label), *cells)
        shown["reconstructions/by_class"] = table
    return shown
