"""Small models in float64, and what a window shows, said once more and differently."""

from math import ceil, floor
from typing import Any

import torch
from torch import nn

from vlae.encoder import MapEncoder
from vlae.model import VLAE, build

SHAPE = (1, 3, 3)
WINDOWS = ["none", "1x1", "2x1", "3x2", "4x2", "5x3", "7x4", "15x8"]


def shaken(module: nn.Module, size: float = 0.3) -> nn.Module:
    """In float64 and away from the start, where last layers are zero and hide what lies before them."""
    module.double()
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=noise, dtype=parameter.dtype))
    return module


def settings(
    code: int | list[int] = 2,
    window: str = "3x2",
    likelihood: str = "Bernoulli",
    grey: bool = False,
    dropout: float = 0.0,
    posterior: str = "normal",
    **prior: Any,
) -> dict[str, Any]:
    """A `model` section, of a flat code or of maps; `prior` overrides its settings. `grey` is for maps, `posterior`
    for a flat code."""
    flow = {"depth": 2, "width": 12, "scale": True}
    encoder: dict[str, Any] = {"widths": [4, 6]}
    decoder = {"receptive_field": window, "features": 5, "width": 8, "depth": 2, "dropout": dropout, **encoder}
    if isinstance(code, list):
        flow["receptive_field"] = "3x2"
        encoder["blocks"] = [1, 1]
        decoder |= {"blocks": [1, 1], "grey": grey}
        names = "MapEncoder", "ConvAFPrior", "MapPixelCNN"
    else:
        for part in (encoder, decoder):
            part["hidden"] = 10
        encoder |= {"posterior": posterior, "depth": 2, "width": 12}
        names = "Encoder", "AFPrior", "PixelCNN"
    more = {"components": 3} if likelihood == "LogisticMixture" else {}
    return {
        "code": code,
        "encoder": {"_target_": f"vlae.encoder.{names[0]}", **encoder},
        "prior": {"_target_": f"vlae.prior.{names[1]}", **flow, **prior},
        "decoder": {"_target_": f"vlae.decoder.{names[2]}", **decoder},
        "likelihood": {"_target_": f"vlae.likelihoods.{likelihood}", **more},
    }


def maps_for(shape: tuple[int, int, int], channels: int = 2, halvings: int = 1) -> list[int]:
    """A code of maps for images of this shape."""
    return [channels, ceil(shape[1] / 2**halvings), ceil(shape[2] / 2**halvings)]


def tiny(shape: tuple[int, int, int] = SHAPE, levels: int = 2, maps: bool = False, **chosen: Any) -> VLAE:
    torch.manual_seed(0)
    code = {"code": maps_for(shape)} if maps else {}
    return shaken(build(settings(**code | chosen), shape, levels))  # type: ignore[return-value]


def last_of(model: VLAE) -> nn.Linear:
    """The layer of means and log-scales."""
    return model.encoder.out if isinstance(model.encoder, MapEncoder) else model.encoder.net[-1]  # type: ignore


def widened(model: VLAE) -> VLAE:
    """With a q wider than the posterior, and not far from it, as the variance of importance weights would not be
    finite otherwise."""
    for step in getattr(getattr(model.encoder, "flow", None), "steps", ()):
        step.shift.weight.data *= 0.1
    last = last_of(model)
    half = last.out_features // 2 if isinstance(model.encoder, MapEncoder) else model.prior.code
    with torch.no_grad():
        for values, wide in ((last.weight, 0.0), (last.bias, 0.7)):
            values[half : 2 * half] = wide
            if isinstance(model.encoder, MapEncoder):
                values[:half] *= 0.1
    return model


def images(shape: tuple[int, int, int] = SHAPE) -> torch.Tensor:
    """All binary images of the shape."""
    count = shape[0] * shape[1] * shape[2]
    return (torch.arange(2**count)[:, None] >> torch.arange(count) & 1).view(-1, *shape)


def seen(receptive_field: str, i: int, j: int, height: int, width: int) -> set[tuple[int, int]]:
    """The pixels that pixel (i, j) sees: asks each pixel of the image in turn."""
    if receptive_field == "none":
        return set()
    wide, tall = map(int, receptive_field.split("x"))
    left, right = ceil((wide - 1) / 2), floor((wide - 1) / 2)
    return {
        (a, b)
        for a in range(height)
        for b in range(width)
        if (i - tall <= a <= i - 1 and j - left <= b <= j + right) or (a == i and j - left <= b <= j - 1)
    }
