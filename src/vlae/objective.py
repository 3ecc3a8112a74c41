"""Terms to the scalar that is minimised."""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlae.model import Terms


class Objective(nn.Module):
    """distortion + weight * rate, in nats per image, batch mean.

    weight: `beta`, reached linearly over `warmup_steps` optimiser steps. `free_bits`: nats per image that the rate
    may cost for nothing, on the batch-mean total rate since a flow prior has none per dimension; `hard` stops the
    rate's gradient below, `soft` scales it by a gamma <= 1 that is divided by 1.1 each batch below and
    multiplied by 1.1 more than 5 % above (VLAE appendix C). Bounds are reported without any of it.
    """

    gamma: Tensor

    def __init__(self, *, beta: float, warmup_steps: int, free_bits: float, kind: Literal["hard", "soft"]):
        super().__init__()
        for name, value in (("beta", beta), ("warmup_steps", warmup_steps), ("free_bits", free_bits)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value}: must be finite and not negative")
        self.beta, self.warmup_steps, self.free_bits, self.kind = beta, warmup_steps, free_bits, kind
        self.register_buffer("gamma", torch.ones(()))

    def forward(
        self, terms: Terms, step: int, mean: Callable[[Tensor], Tensor] = lambda rate: rate
    ) -> Float[Tensor, ""]:
        """`mean` averages a detached scalar over all devices: the floor is for a batch over all of them."""
        rate = terms.rate.mean()
        weight = self.beta * min(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.free_bits:  # a floor of zero is none: one-sample rates may be negative
            total = mean(rate.detach())
            if self.kind == "hard":
                rate = torch.where(total < self.free_bits, self.free_bits, rate)
            else:
                grow = (total > 1.05 * self.free_bits).float() - (total < self.free_bits).float()
                self.gamma.mul_(1.1**grow).clamp_(1e-6, 1)
                rate = self.gamma * rate
        return terms.distortion.mean() + weight * rate
