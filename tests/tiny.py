"""Small models in float64, and what a window shows, said once more and differently."""

from math import ceil, floor
from typing import Any

import torch
from torch import nn

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


def settings(code: int = 2, window: str = "3x2", likelihood: str = "Bernoulli", **prior: Any) -> dict[str, Any]:
    """A `model` section; `prior` overrides its settings."""
    more = {"components": 3} if likelihood == "LogisticMixture" else {}
    return {
        "code": code,
        "encoder": {"_target_": "vlae.encoder.Encoder", "widths": [4, 6], "hidden": 10},
        "prior": {"_target_": "vlae.prior.AFPrior", "depth": 2, "width": 12, "scale": True, **prior},
        "decoder": {
            "_target_": "vlae.decoder.PixelCNN",
            "receptive_field": window,
            "features": 5,
            "width": 8,
            "depth": 2,
            "widths": [4, 6],
            "hidden": 10,
        },
        "likelihood": {"_target_": f"vlae.likelihoods.{likelihood}", **more},
    }


def tiny(shape: tuple[int, int, int] = SHAPE, levels: int = 2, **chosen: Any) -> VLAE:
    torch.manual_seed(0)
    return shaken(build(settings(**chosen), shape, levels))  # type: ignore[return-value]


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
