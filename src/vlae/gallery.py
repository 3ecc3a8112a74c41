"""Pictures that show what a model's code keeps and what its decoder makes up; each says in words what it is.

All take the model, images x to start from and a generator of noise, and return a picture.
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Integer, UInt8
from torch import Tensor

from vlae.figures import captioned, grid, heat_maps, noise_histogram, save, window_over
from vlae.model import VLAE
from vlae.noise import generator
from vlae.sampling import complete, interpolate, reconstruct, sample

Picture = UInt8[np.ndarray, "h w rgb"]
Images = Integer[Tensor, "N C H W"]


def samples(model: VLAE, x: Images, noise: torch.Generator) -> Picture:
    eps = torch.randn(4 * len(x), model.prior.code, generator=noise).to(x.device)
    uniform = torch.rand(4 * len(x), *x.shape[1:], generator=noise).to(x.device)
    text = "Samples: codes from the prior, pixels drawn from the decoder"
    return captioned(grid(sample(model, eps, uniform), model.likelihood.levels, 8), text)


def reconstructions(model: VLAE, x: Images, noise: torch.Generator) -> Picture:
    eps = torch.randn(len(x), model.prior.code, generator=noise).to(x.device)
    uniform = torch.rand(7, *x.shape, generator=noise).to(x.device)
    drawn = torch.stack([x, *(reconstruct(model, x, eps, pixels) for pixels in uniform)], 1)
    text = "First column: images. Others: drawn seven times from the code of that image alone. "
    text += "What all share the code kept; where they differ the decoder made it up"
    return captioned(grid(drawn.flatten(0, 1), model.likelihood.levels, 8), text)


def interpolations(model: VLAE, x: Images, noise: torch.Generator) -> Picture:
    eps = torch.randn(len(x), model.prior.code, generator=noise).to(x.device)
    half = max(1, len(x) // 2)
    uniform = torch.rand(half, *x.shape[1:], generator=noise).to(x.device)
    with torch.no_grad():
        z, _ = model.encode(x).rsample_with_log_prob(eps)
    along = torch.linspace(0, 1, 8, device=x.device)
    paths = interpolate(model, z[:half], z[-half:], along, uniform)
    text = "Each row: from the code of one image to that of another, along the prior's noise"
    return captioned(grid(paths.flatten(0, 1), model.likelihood.levels, 8), text)


def completions(model: VLAE, x: Images, noise: torch.Generator) -> Picture:
    rows, top = x.shape[2] // 2, model.likelihood.levels - 1
    shown = 2 * x  # on a scale with a level of grey in the middle also where there are two
    shown[:, :, rows:] = top
    codes = torch.randn(256, len(x), model.prior.code, generator=noise).to(x.device)
    picks = torch.rand(6, len(x), generator=noise).to(x.device)
    uniform = torch.rand(6, *x.shape, generator=noise).to(x.device)
    drawn = complete(model, x, rows, codes, picks, uniform)
    text = "First column: images. Second: the upper half that the model is shown. Others: lower halves that it draws"
    row = torch.stack([2 * x, shown, *(2 * each for each in drawn)], 1)
    return captioned(grid(row.flatten(0, 1), 2 * top + 1, 8), text)


PICTURES: dict[str, Callable[[VLAE, Images, torch.Generator], Picture]] = {
    function.__name__: function for function in (samples, reconstructions, interpolations, completions)
}


def draw(model: VLAE, x: Images, names: Iterable[str], seed: int, folder: Path) -> dict[str, Picture]:
    """Writes the named pictures of eight of the images as PNG files, and returns them; the same noise for a seed."""
    x = x[:8].long()
    drawn = {name: PICTURES[name](model, x, generator("pictures", seed)) for name in names}
    for name, picture in drawn.items():
        save(picture, folder / f"{name}.png")
    return drawn


@torch.no_grad()
def plot(model: VLAE, x: Images, seed: int, folder: Path) -> list[Path]:
    """Writes figures of the bits that pixels of eight images cost, of the noise of all codes, and of the window.

    Needs matplotlib.
    """
    levels, noise = model.likelihood.levels, generator("plots", seed)
    paths = [folder / f"{name}.png" for name in ("bits", "window", "noise")]
    eps = torch.randn(len(x), model.prior.code, generator=noise).to(x.device)
    heat_maps(x[:8], -model(x[:8], eps[:8]).log_px / math.log(2), levels, paths[0])
    window_over(x[0], model.decoder.window, levels, paths[1])
    if not model.prior.code:
        return paths[:2]
    z, _ = model.encode(x).rsample_with_log_prob(eps)
    noise_histogram(model.prior(z)[0], paths[2])
    return paths
